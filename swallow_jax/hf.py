"""Weights at the borders: HF safetensors (and GGUF in), config.json, one table of names for both directions.

Nothing is transposed or rescaled, so import followed by export gives the same bytes. Files are memory-mapped and read
one tensor (or a device's slice of it) at a time; every tensor is consumed exactly once, an unknown one is refused.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from swallow_jax import gguf_files, llama, run
from swallow_jax import mesh as meshes
from swallow_jax.llama import LlamaConfig, Params, RopeScaling

# Our path -> HF's name; `{i}` is the layer.
NAMES: dict[tuple[str, ...], str] = {
    ("embed",): "model.embed_tokens.weight",
    ("layers", "input_norm"): "model.layers.{i}.input_layernorm.weight",
    ("layers", "q"): "model.layers.{i}.self_attn.q_proj.weight",
    ("layers", "k"): "model.layers.{i}.self_attn.k_proj.weight",
    ("layers", "v"): "model.layers.{i}.self_attn.v_proj.weight",
    ("layers", "o"): "model.layers.{i}.self_attn.o_proj.weight",
    ("layers", "post_norm"): "model.layers.{i}.post_attention_layernorm.weight",
    ("layers", "gate"): "model.layers.{i}.mlp.gate_proj.weight",
    ("layers", "up"): "model.layers.{i}.mlp.up_proj.weight",
    ("layers", "down"): "model.layers.{i}.mlp.down_proj.weight",
    ("norm",): "model.norm.weight",
    ("lm_head",): "lm_head.weight",
}
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SHARD_BYTES = 5_000_000_000

Tensors = dict[str, Callable[[], np.ndarray]]  # HF name -> reader of a (memory-mapped) array


# Config.


def read_config(path: str | os.PathLike) -> LlamaConfig:
    """The model config of an HF folder or of a GGUF file; what this model cannot compute is refused by name."""
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_files.read_config(path)
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give an HF model folder with config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    return parse_config(raw, str(file))


def parse_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """HF's config.json as a LlamaConfig; reads transformers 5's `rope_parameters` and 4's `rope_theta` + `rope_scaling`."""
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for field, wanted in fixed.items():
        if (value := raw.get(field, wanted)) != wanted:
            raise ValueError(f"{where}: {field} is {value!r}; this model computes {wanted!r} only")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    if missing := [f for f in required if raw.get(f) is None]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    if rope.get("rope_theta", raw.get("rope_theta")) is None:
        raise ValueError(f"{where}: neither rope_parameters nor rope_theta is there; take it from the original checkpoint")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        if missing := [f.name for f in dataclasses.fields(RopeScaling) if rope.get(f.name) is None]:
            raise ValueError(f"{where}: the llama3 rope scaling lacks {', '.join(missing)}; take it from the original checkpoint")
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    elif kind != "default":
        raise ValueError(f"{where}: rope_type is {kind!r}; known: default, llama3")
    heads = int(raw["num_attention_heads"])
    config = LlamaConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta"))),
        rope_scaling=scaling,
        rms_norm_eps=float(raw["rms_norm_eps"]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
    )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ValueError(f"{where}: {heads} heads over {config.num_kv_heads} key-value heads of {config.head_dim} do not divide")
    return config


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """config.json for both readers: transformers 5 takes `rope_parameters` and `dtype`, 4 the older names beside them.

    A file with the new names alone loads in transformers 4 with theta 10000, silently.
    """
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": dtype,
        "torch_dtype": dtype,
        "initializer_range": 0.02,
    }


# In.


def load(path: str | os.PathLike, *, dtype: Any = None, mesh: Any = None) -> tuple[Params, LlamaConfig]:
    """Parameters (layer-stacked, on `mesh` or the default device) and config of an HF folder or a GGUF file.

    dtype None keeps the file's; where the layers of one stacked leaf differ, the smallest float that holds all of them.
    Raises ValueError naming the tensor for a wrong shape, a missing, unknown or truncated one.
    """
    path = Path(path)
    config = read_config(path)
    tensors = gguf_files.open_tensors(path, config) if path.suffix == ".gguf" else open_tensors(path)
    shapes, _ = llama.abstract_params(config, np.float32)
    wanted = {name: shape for name, _, shape in _items(shapes)}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        if not np.array_equal(_bits(tensors["lm_head.weight"]()), _bits(tensors["model.embed_tokens.weight"]())):
            raise ValueError(f"{path}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding; set it false")
        tensors.pop("lm_head.weight")
    for name in [n for n in tensors if n.endswith("rotary_emb.inv_freq")]:
        tensors.pop(name)  # a buffer of old transformers versions; it follows from config.json
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{path}: {len(unknown)} tensors are unknown to this model, the first is {unknown[0]}")
    for name, shape in wanted.items():
        if (have := tensors[name]().shape) != shape:
            raise ValueError(f"{path}: {name} has shape {have}, config.json asks for {shape}")

    def leaf(keys: tuple[str, ...], shape: tuple[int, ...], place: Any) -> jax.Array:
        names = [NAMES[keys].format(i=i) for i in range(shape[0])] if keys[0] == "layers" else [NAMES[keys]]
        kinds = {tensors[n]().dtype for n in names}
        kind = np.dtype(dtype) if dtype is not None else kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if keys[0] != "layers":
                return np.asarray(tensors[names[0]]()[index], kind)
            layers = names[index[0]]
            return np.stack([np.asarray(tensors[n]()[index[1:]], kind) for n in layers])

        return jax.make_array_from_callback(shape, place, read)

    return _map_leaves(leaf, shapes, placements(config, mesh)), config


def placements(config: LlamaConfig, mesh: Any = None) -> Any:
    """The sharding of each parameter: by its logical axes on `mesh`, else all on the first device."""
    axes = llama.abstract_params(config, np.float32)[1]
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda names: one if mesh is None else meshes.sharding(mesh, names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def open_tensors(folder: str | os.PathLike) -> Tensors:
    """Readers of all tensors of a folder: model.safetensors, or the shards that the index names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
            raise ValueError(f"{index}: truncated, or no index of weights; download it again") from None
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = None, ["model.safetensors"]
    tensors: Tensors = {}
    for name in files:
        file = folder / name
        if file.name != name or not file.is_file():
            raise FileNotFoundError(f"weight file {file} is missing; download it again (only safetensors are read)")
        for tensor, reader in read_safetensors(file).items():
            if tensor in tensors or (weight_map is not None and weight_map.get(tensor) != name):
                raise ValueError(f"{file}: tensor {tensor} is not where the index says, or stands twice")
            tensors[tensor] = reader
    if weight_map is not None and (lost := sorted(set(weight_map) - set(tensors))):
        raise ValueError(f"{index}: {lost[0]} is in the index but in no file")
    return tensors


def read_safetensors(file: Path) -> Tensors:
    """Readers of one file's tensors: views into a memory map, checked against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8 or length > 100_000_000:
            raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(f.read(length).decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file}: the header is not JSON; download it again") from None
    start = 8 + length
    data = np.memmap(file, np.uint8, "r") if size > start else np.zeros(start, np.uint8)
    tensors: Tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry.get("dtype") not in _DTYPES:
            raise ValueError(f"{file}: {name} has dtype {entry.get('dtype')!r}; known: {', '.join(_DTYPES)}")
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if last - first != dtype.itemsize * int(np.prod(shape)) or first < 0:
            raise ValueError(f"{file}: {name} of shape {shape} does not fit its {last - first} bytes; the header is broken")
        if start + last > size:
            raise ValueError(f"{file}: truncated ({name} ends at byte {start + last}, the file at {size}); download it again")
        tensors[name] = lambda a=start + first, b=start + last, d=dtype, s=shape: data[a:b].view(d).reshape(s)
    return tensors


# Out.


def save(
    folder: str | os.PathLike,
    params: Params,
    config: LlamaConfig,
    *,
    dtype: str,
    source_folder: str | os.PathLike | None = None,
) -> None:
    """Write an HF folder: safetensors (sharded by size), config.json with both RoPE schemas, the source's other files.

    dtype is "float32", "bfloat16", "float16", or "source": each tensor in the dtype it has in `source_folder`. Written
    under a temporary name and renamed when whole; an existing folder is refused.
    """
    from swallow_jax import text

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another place or remove it")
    if dtype not in ("float32", "bfloat16", "float16", "source"):
        raise ValueError(f"dtype {dtype!r}; known: float32, bfloat16, float16, source")
    kinds = {}
    if dtype == "source":
        kinds = {name: reader().dtype for name, reader in open_tensors(source_folder).items()}
    names = [(name, kinds.get(name, None if dtype == "source" else np.dtype(dtype))) for name, _, _ in _items(params)]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, params, dict(names))
        raw = config_json(config, dtype if dtype != "source" else "bfloat16")
        if source_folder is not None:
            file = Path(source_folder) / "config.json"
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            raw = {**before, **raw} if dtype != "source" else {**raw, **before, **_rope_fields(raw)}
            if Path(source_folder).suffix == ".gguf":
                gguf_files.write_tokenizer(Path(source_folder), temporary)
            elif (source := Path(source_folder) / "tokenizer.json").is_file() or list(source.parent.glob("*.model")):
                text.copy_tokenizer(source_folder, temporary)
            if (temporary / "tokenizer.json").is_file() and not (temporary / "generation_config.json").is_file():
                # Without it transformers and vLLM would not stop at the chat template's end of turn.
                tokenizer = text.load_tokenizer(temporary)
                ids = {
                    "bos_token_id": tokenizer.bos_id,
                    "eos_token_id": list(tokenizer.eos_ids),
                    "pad_token_id": tokenizer.pad_id,
                }
                run.write_json(temporary / "generation_config.json", ids)
                raw = {**raw, "bos_token_id": ids["bos_token_id"], "eos_token_id": ids["eos_token_id"]}
        run.write_json(temporary / "config.json", raw)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: raw[k] for k in ("rope_theta", "rope_scaling", "rope_parameters")}


def _write_shards(folder: Path, params: Params, kinds: dict[str, np.dtype]) -> None:
    shards: list[list[tuple[str, Callable[[], jax.Array], tuple[int, ...], np.dtype]]] = [[]]
    used = 0
    for name, reader, shape in _items(params):
        kind = kinds[name] or np.dtype(reader().dtype)
        size = kind.itemsize * int(np.prod(shape))
        if shards[-1] and used + size > _SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append((name, reader, shape, kind))
        used += size
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, _, shape, kind in shard:
            size = kind.itemsize * int(np.prod(shape))
            header[name] = {"dtype": _CODES[kind], "shape": list(shape), "data_offsets": [offset, offset + size]}
            weight_map[name] = file
            offset += size
        blob = json.dumps(header, separators=(",", ":")).encode("utf-8")
        blob += b" " * (-len(blob) % 8)
        with open(folder / file, "wb") as f:
            f.write(len(blob).to_bytes(8, "little") + blob)
            for _, reader, _, kind in shard:
                f.write(np.ascontiguousarray(np.asarray(reader()).astype(kind, copy=False)).view(np.uint8).reshape(-1).data)
            f.flush()
            os.fsync(f.fileno())
        total += offset
    if len(shards) > 1:
        run.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def params_sha256(params: Params, config: LlamaConfig) -> str:
    """SHA-256 over the parameters in sorted HF-name order, each as name, shape, dtype and row-major bytes."""
    digest = hashlib.sha256()
    for name, reader, shape in sorted(_items(params), key=lambda item: item[0]):
        value = np.ascontiguousarray(np.asarray(reader()))
        digest.update(f"{name} {list(shape)} {value.dtype.name}\n".encode())
        digest.update(value.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


# The table at work.


def _items(params: Params) -> Iterator[tuple[str, Callable[[], Any], tuple[int, ...]]]:
    """(HF name, reader, shape) of every tensor; stacked leaves give one a layer."""
    for keys, name in NAMES.items():
        node: Any = params
        for key in keys:
            node = node.get(key) if node is not None else None
        if node is None:
            continue
        if keys[0] != "layers":
            yield name, lambda leaf=node: leaf, tuple(node.shape)
        else:
            for i in range(node.shape[0]):
                yield name.format(i=i), lambda leaf=node, i=i: leaf[i], tuple(node.shape[1:])


def _map_leaves(make: Callable, shapes: Params, *trees: Any) -> Params:
    def visit(keys: tuple[str, ...], shape: Any, *nodes: Any) -> Any:
        if isinstance(shape, dict):
            return {k: visit((*keys, k), shape[k], *(n[k] for n in nodes)) for k in shape}
        return make(keys, tuple(shape.shape), *nodes)

    return visit((), shapes, *trees)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)
