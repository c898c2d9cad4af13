"""Weights at the borders: HF folders in and out (GGUF in), config.json, one table of names for both directions.

Nothing is transposed or rescaled, so import followed by export gives the same bytes. Tensors pass in row blocks
(`weights`); every one is consumed exactly once, an unknown one is refused.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from swallow_jax import gguf_files, llama, placing, run, weights
from swallow_jax import mesh as meshes
from swallow_jax.llama import LlamaConfig, Params, RopeScaling
from swallow_jax.weights import Tensor, Tensors, open_tensors, read_safetensors  # noqa: F401 (also under these names)

# Our path -> HF's name; `{i}` is the layer.
NAMES: dict[tuple[str, ...], str] = {
    ("embed",): "model.embed_tokens.weight",
    ("layers", "input_norm"): "model.layers.{i}.input_layernorm.weight",
    ("layers", "q"): "model.layers.{i}.self_attn.q_proj.weight",
    ("layers", "k"): "model.layers.{i}.self_attn.k_proj.weight",
    ("layers", "v"): "model.layers.{i}.self_attn.v_proj.weight",
    ("layers", "o"): "model.layers.{i}.self_attn.o_proj.weight",
    ("layers", "q_norm"): "model.layers.{i}.self_attn.q_norm.weight",
    ("layers", "k_norm"): "model.layers.{i}.self_attn.k_norm.weight",
    ("layers", "post_norm"): "model.layers.{i}.post_attention_layernorm.weight",
    ("layers", "gate"): "model.layers.{i}.mlp.gate_proj.weight",
    ("layers", "up"): "model.layers.{i}.mlp.up_proj.weight",
    ("layers", "down"): "model.layers.{i}.mlp.down_proj.weight",
    ("norm",): "model.norm.weight",
    ("lm_head",): "lm_head.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What config.json of a model type says beside the shapes, and which of our switches make it that type."""

    architecture: str
    fixed: dict[str, Any]  # fields with the one value that is computed here (also where config.json leaves them out)
    required: tuple[str, ...]  # fields whose default in transformers is not what the others give
    switches: dict[str, Any]  # fields of LlamaConfig


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        required=(),
        switches={"qk_norm": False},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        required=("head_dim",),  # 128 in transformers, whatever hidden_size says
        switches={"qk_norm": True},
    ),
}
_SHARD_BYTES = 5_000_000_000


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
    family = FAMILIES.get(raw.get("model_type", "llama"))
    if family is None:
        raise ValueError(f"{where}: model_type is {raw['model_type']!r}; known: {', '.join(FAMILIES)}")
    for field, wanted in {**family.fixed, "quantization_config": None}.items():
        if (value := raw.get(field, wanted)) != wanted:
            raise ValueError(f"{where}: {field} is {value!r}; this model computes {wanted!r} only")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    if missing := [f for f in (*required, *family.required) if raw.get(f) is None]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    if raw.get("model_type") == "llama" and not {"rope_theta", "rope_parameters", "head_dim"} & set(raw) and len(rope) == 1:
        rope["rope_theta"] = 10000.0  # Llama 2's files are older than these fields; 10000 is what their readers compute
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
        **family.switches,
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
    model_type, family = next((t, f) for t, f in FAMILIES.items() if f.switches.items() <= vars(config).items())
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **family.fixed,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
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


def load(
    path: str | os.PathLike, *, dtype: Any = None, mesh: Any = None, check_values: bool = True
) -> tuple[Params, LlamaConfig]:
    """Parameters (layer-stacked, on `mesh` or the default device) and config of an HF folder or a GGUF file.

    dtype None keeps the file's; where the layers of one stacked leaf differ, the smallest float that holds all of them.
    Raises ValueError naming the tensor for a wrong shape, a missing, unknown or truncated one, and (`check_values`) for NaN.
    """
    config = read_config(path)
    return place(open_weights(path, config), config, dtype=dtype, mesh=mesh, check_values=check_values), config


def open_weights(path: str | os.PathLike, config: LlamaConfig) -> Tensors:
    """The tensors that `config` asks for, by HF name, of an HF folder or a GGUF file; nothing is read yet."""
    path = Path(path)
    tensors = gguf_files.open_tensors(path, config) if path.suffix == ".gguf" else open_tensors(path)
    wanted = {name: shape for name, _, shape in _items(llama.abstract_params(config, np.float32)[0])}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is not None and not _same(head, embedding):
            raise ValueError(f"{path}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding; set it false")
    for name in [n for n in tensors if n.endswith("rotary_emb.inv_freq")]:
        tensors.pop(name)  # a buffer of old transformers versions; it follows from config.json
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{path}: {len(unknown)} tensors are unknown to this model, the first is {unknown[0]}")
    for name, shape in wanted.items():
        if (have := tensors[name].shape) != shape:
            raise ValueError(f"{path}: {name} has shape {have}, config.json asks for {shape}")
    return tensors


def open_run_weights(step: Path, config: LlamaConfig) -> Tensors:
    """The parameters of a run's checkpoint (a folder of its checkpoints/), by HF name; nothing is read yet."""
    shapes = llama.abstract_params(config, np.float32)[0]
    wanted = {name: shape for name, _, shape in _items(shapes)}
    arrays = weights.open_checkpoint(step, [keys for keys in NAMES if _leaf(shapes, keys) is not None])
    tensors = {}
    for keys, array in arrays.items():
        for name, layer in _layers(keys, array.shape):
            tensors[name] = weights.stored_tensor(array, layer)
            if tensors[name].shape != wanted.get(name):
                raise ValueError(f"{step}: {name} has shape {tensors[name].shape}, config.json asks for {wanted.get(name)}")
    return tensors


def place(tensors: Tensors, config: LlamaConfig, *, dtype: Any, mesh: Any, check_values: bool) -> Params:
    """Parameters on their devices, each read straight into the memory that it keeps; no second copy of the model."""
    shapes, _ = llama.abstract_params(config, np.float32)
    with weights.progress(sum(t.nbytes for t in tensors.values()), "reading") as bar:

        def leaf(keys: tuple[str, ...], shape: tuple[int, ...], where: Any) -> jax.Array:
            names = [name for name, _ in _layers(keys, shape)]
            kinds = {tensors[n].dtype for n in names}
            kind = np.dtype(dtype) if dtype is not None else kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
            mine, stacked = {n: tensors[n] for n in names}, keys[0] == "layers"
            return placing.place(mine, kind, where, stacked=stacked, check=check_values, bar=bar)

        return _map_leaves(leaf, shapes, placements(config, mesh))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(np.array_equal(_bits(a.rows(*block)), _bits(b.rows(*block))) for block in a.blocks())


def placements(config: LlamaConfig, mesh: Any = None) -> Any:
    """The sharding of each parameter: by its logical axes on `mesh`, else all on the first device."""
    axes = llama.abstract_params(config, np.float32)[1]
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda names: one if mesh is None else meshes.sharding(mesh, names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


# Out.


def save(
    folder: str | os.PathLike,
    params: Params,
    config: LlamaConfig,
    *,
    dtype: str,
    source_folder: str | os.PathLike | None = None,
) -> None:
    """`save_tensors` of parameters in memory; what they inherit (licences, attributions) is what `source_folder` says."""
    inherited = run.inherited([source_folder]) if source_folder is not None else {}
    save_tensors(folder, tensors_of(params), config, dtype=dtype, source_folder=source_folder, manifest=inherited, threads=False)


def save_tensors(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    config: LlamaConfig,
    *,
    dtype: str,
    source_folder: str | os.PathLike | None = None,
    manifest: Mapping[str, Any],
    card: Callable[[dict[str, Any]], str] | None = None,
    max_shard_bytes: int | None = None,
    check_values: bool = True,
    digest: bool = True,
    threads: bool = True,
) -> dict[str, Any]:
    """Write an HF folder: safetensors (sharded by size), config.json with both RoPE schemas, the source's other files.

    dtype is "float32", "bfloat16", "float16", or "source": each tensor in the dtype it has in `source_folder`. `manifest`
    (base, licences, attributions, parents) goes into manifest.json, with the hashes of what was written; returns it.
    `card` makes README.md of it. Written under a temporary name and renamed when whole; an existing folder is refused.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another place or remove it")
    if dtype not in ("float32", "bfloat16", "float16", "source"):
        raise ValueError(f"dtype {dtype!r}; known: float32, bfloat16, float16, source")
    kinds = {name: t.dtype if dtype == "source" else np.dtype(dtype) for name, t in tensors.items()}
    if dtype == "source":
        kinds |= {name: t.dtype for name, t in open_tensors(source_folder).items() if name in kinds}
    with _whole_or_absent(folder, sum(kinds[name].itemsize * int(np.prod(t.shape)) for name, t in tensors.items())) as temporary:
        sha256 = weights.write_shards(
            temporary,
            tensors,
            kinds,
            max_shard_bytes=max_shard_bytes or _SHARD_BYTES,
            check=check_values,
            digest=digest,
            threads=threads,
        )
        written = {str(kind) for kind in kinds.values()}
        _write_companions(temporary, config, dtype if dtype != "source" else "bfloat16", source_folder, keep=dtype == "source")
        manifest = {
            "format_version": run.FORMAT_VERSION,
            **manifest,
            "dtype": written.pop() if len(written) == 1 else "mixed",
            "params_sha256": sha256,
            "files": {p.name: run.sha256_file(p) for p in sorted(temporary.iterdir()) if p.suffix != ".safetensors"},
        }
        if card is not None:
            run.write_text(temporary / "README.md", card(manifest))
        run.write_json(temporary / "manifest.json", manifest)
    return manifest


@contextlib.contextmanager
def _whole_or_absent(folder: Path, size: int) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends well, and goes when it does not."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of an export that was killed
        if not Path("/proc", left.name.split(".")[-2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(folder.parent).free) < size:
        need = f"{folder} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
        raise ValueError(f"{need}; make room or choose another place")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_companions(folder: Path, config: LlamaConfig, dtype: str, source: str | os.PathLike | None, *, keep: bool) -> None:
    """config.json, generation config, tokenizer and chat template; `keep`: the source's config but for RoPE."""
    from swallow_jax import text

    raw = config_json(config, dtype)
    if source is not None:
        source = Path(source)
        file = source / "config.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before.pop("auto_map", None)  # names code of the source folder, which is neither copied nor run
        raw = {**before, **raw} if not keep else {**raw, **before, **_rope_fields(raw)}
        if source.suffix == ".gguf":
            gguf_files.write_tokenizer(source, folder)
        elif (source / "tokenizer.json").is_file() or list(source.glob("*.model")):
            text.copy_tokenizer(source, folder)
        _for_both_versions(folder)
        if (folder / "tokenizer.json").is_file() and not (folder / "generation_config.json").is_file():
            # Without it transformers and vLLM would not stop at the chat template's end of turn.
            tokenizer = text.load_tokenizer(folder)
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
            run.write_json(folder / "generation_config.json", ids)
            raw = {**raw, "bos_token_id": ids["bos_token_id"], "eos_token_id": ids["eos_token_id"]}
    run.write_json(folder / "config.json", raw)


def _for_both_versions(folder: Path) -> None:
    """Make tokenizer_config.json say what transformers 4 and 5 both understand.

    5 writes a class (TokenizersBackend) and a list of extra tokens that 4 cannot read; the generic class takes
    tokenizer.json as it stands in both.
    """
    file = folder / "tokenizer_config.json"
    if not (file.is_file() and (folder / "tokenizer.json").is_file()):
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    after = {**before, "tokenizer_class": "PreTrainedTokenizerFast"}
    after.pop("auto_map", None)
    if isinstance(extra := after.get("extra_special_tokens"), list):
        after.pop("extra_special_tokens")
        after["additional_special_tokens"] = extra
    if after != before:
        run.write_json(file, after)


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: raw[k] for k in ("rope_theta", "rope_scaling", "rope_parameters")}


def params_sha256(params: Params, config: LlamaConfig) -> str:
    """SHA-256 over the parameters in sorted HF-name order, each as name, shape, dtype and row-major bytes."""
    return weights.sha256(tensors_of(params), threads=False)


def tensors_of(params: Params) -> Tensors:
    """Parameters in memory as tensors by HF name; rows come to the host when they are asked for."""
    tensors = {}
    for keys in NAMES:
        if (leaf := _leaf(params, keys)) is not None:
            for name, layer in _layers(keys, leaf.shape):
                shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
                tensors[name] = Tensor(shape=shape, dtype=np.dtype(leaf.dtype), rows=functools.partial(_host_rows, leaf, layer))
    return tensors


def _host_rows(leaf: Any, layer: int | None, first: int, last: int) -> np.ndarray:
    devices = leaf.devices() if isinstance(leaf, jax.Array) else set()
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # other processes hold parts: all of them ask for it
        everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
        begin = (layer, first) if layer is not None else (first,)
        sizes = (1, last - first) if layer is not None else (last - first,)
        block = np.asarray(_slice_everywhere(everywhere, sizes + leaf.shape[len(sizes) :])(leaf, np.array(begin, np.int32)))
        return block[0] if layer is not None else block
    if len(devices) > 1 or any(d.platform != "cpu" for d in devices):
        # One program for all layers and blocks of a size; a plain slice would be compiled for each.
        start = ((layer,) if layer is not None else ()) + (first,)
        sizes = ((1,) if layer is not None else ()) + (last - first,)
        rest = leaf.shape[len(start) :]
        block = np.asarray(jax.lax.dynamic_slice(leaf, start + (0,) * len(rest), sizes + rest))
        return block[0] if layer is not None else block
    whole = np.asarray(leaf)  # a view on the CPU
    return whole[first:last] if layer is None else whole[layer, first:last]


@functools.lru_cache(maxsize=64)
def _slice_everywhere(everywhere: Any, sizes: tuple[int, ...]) -> Callable:
    def cut(leaf: jax.Array, begin: jax.Array) -> jax.Array:
        starts = [begin[i] for i in range(begin.shape[0])] + [0] * (len(sizes) - begin.shape[0])
        return jax.lax.dynamic_slice(leaf, starts, sizes)

    return jax.jit(cut, out_shardings=everywhere)


# The table at work.


def _items(params: Params) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(HF name, leaf, shape) of every tensor; stacked leaves give one a layer."""
    for keys in NAMES:
        if (leaf := _leaf(params, keys)) is not None:
            for name, layer in _layers(keys, leaf.shape):
                yield name, leaf, tuple(leaf.shape if layer is None else leaf.shape[1:])


def _leaf(params: Params, keys: tuple[str, ...]) -> Any:
    node: Any = params
    for key in keys:
        node = node.get(key) if node is not None else None
    return node


def _layers(keys: tuple[str, ...], shape: Sequence[int]) -> list[tuple[str, int | None]]:
    """(HF name, layer) of the tensors that a leaf holds; layer None for a leaf outside the layers."""
    if keys[0] != "layers":
        return [(NAMES[keys], None)]
    return [(NAMES[keys].format(i=i), i) for i in range(shape[0])]


def _map_leaves(make: Callable, shapes: Params, *trees: Any) -> Params:
    def visit(keys: tuple[str, ...], shape: Any, *nodes: Any) -> Any:
        if isinstance(shape, dict):
            return {k: visit((*keys, k), shape[k], *(n[k] for n in nodes)) for k in shape}
        return make(keys, tuple(shape.shape), *nodes)

    return visit((), shapes, *trees)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)
