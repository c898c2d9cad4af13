"""LoRA (Hu et al., 2021): small trained matrices beside frozen weights, merged into them or as an adapter in peft's format.

y = x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ, with A [rank, in] and B [out, rank] for each target matrix of each layer. An adapter
is the tree {"layers": {target: {"a": [L, rank, in], "b": [L, out, rank]}}} of float32 arrays; targets have the names
that `llama.Block` gives its matrices. B starts at zero, so an untrained adapter changes nothing.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import hf, llama, run
from swallow_jax.llama import LlamaConfig, Params
from swallow_jax.weights import Tensor, Tensors

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
Adapter = dict[str, dict[str, dict[str, jax.Array]]]
# Of peft's options, those that change what is computed, with the value computed here.
_PEFT = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get an adapter, and its size."""

    rank: int
    alpha: float  # the adapter's product is scaled by alpha / rank
    targets: tuple[str, ...]

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: at least 1 is wanted")
        if not self.targets or set(self.targets) - set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets={self.targets}: some of {', '.join(TARGETS)} are wanted, each once")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen weight and its adapter, in the weight's place in the parameters; b carries the scale."""

    weight: jax.Array
    a: jax.Array
    b: jax.Array

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        low_BTR = jnp.einsum("BTI,RI->BTR", x_BTI, self.a)
        return jnp.einsum("BTI,OI->BTO", x_BTI, self.weight) + jnp.einsum("BTR,OR->BTO", low_BTR, self.b)

    def __getitem__(self, _: Any) -> "Adapted":  # a Block reads its weights as `weight[...]`
        return self


def init(config: LlamaConfig, lora: LoraConfig, key: jax.Array) -> Adapter:
    """An adapter before training, as peft starts it: A uniform in ±1/sqrt(in), B zero."""
    layers = {}
    keys = jax.random.split(key, len(lora.targets))
    for target, (depth, out, into), own in zip(lora.targets, _shapes(config, lora), keys, strict=True):
        a = jax.random.uniform(own, (depth, lora.rank, into), jnp.float32, -(into**-0.5), into**-0.5)
        layers[target] = {"a": a, "b": jnp.zeros((depth, out, lora.rank), jnp.float32)}
    return {"layers": layers}


def axes(config: LlamaConfig, lora: LoraConfig) -> Any:
    """The logical axes of an adapter: those of its weight, the rank unsharded."""
    weights = llama.abstract_params(config, jnp.float32)[1]["layers"]
    split = {target: weights[target] for target in lora.targets}
    return {"layers": {t: {"a": (depth, None, into), "b": (depth, out, None)} for t, (depth, out, into) in split.items()}}


def attach(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """Parameters that compute with the adapter beside the weights; any step of `llama` takes them."""
    scale = lora.alpha / lora.rank
    pairs = adapter["layers"].items()
    adapted = {t: Adapted(params["layers"][t], pair["a"], pair["b"] * scale) for t, pair in pairs}
    return {**params, "layers": {**params["layers"], **adapted}}


def merge(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """Parameters with the adapter added in: W + (alpha / rank) B A, in float32 and back in W's dtype."""

    @jax.jit
    def add(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        delta = jnp.einsum("LOR,LRI->LOI", b, a, precision="highest") * (lora.alpha / lora.rank)
        return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

    merged = {t: add(params["layers"][t], pair["a"], pair["b"]) for t, pair in adapter["layers"].items()}
    return {**params, "layers": {**params["layers"], **merged}}


def merge_tensors(tensors: Mapping[str, Tensor], adapter: Adapter, lora: LoraConfig) -> Tensors:
    """`merge` for tensors that pass in row blocks: the adapter's targets become float32, the others stay what they are."""
    merged = dict(tensors)

    def rows(weight: Tensor, a: np.ndarray, b: np.ndarray, first: int, last: int) -> np.ndarray:
        delta = b[first:last] @ a
        delta *= np.float32(lora.alpha / lora.rank)
        delta += weight.rows(first, last).astype(np.float32)
        return delta

    for target, pair in adapter["layers"].items():
        for i, (a, b) in enumerate(zip(np.asarray(pair["a"]), np.asarray(pair["b"]), strict=True)):
            name = hf.NAMES["layers", target].format(i=i)
            weight = tensors[name]
            added = functools.partial(rows, weight, a, b)
            merged[name] = Tensor(shape=weight.shape, dtype=np.dtype(np.float32), rows=added, align=weight.align)
    return merged


def adapter_sha256(adapter: Adapter) -> str:
    """SHA-256 over the matrices in the order of their names, each as name, shape, dtype and row-major bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(_named(adapter), key=lambda item: item[0]):
        digest.update(f"{name} {list(value.shape)} {value.dtype.name}\n".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


# peft's format.


def save(folder: str | os.PathLike, adapter: Adapter, lora: LoraConfig, *, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft and vLLM read beside the model `base`.

    Written under a temporary name and renamed when whole; an existing folder is refused.
    """
    from safetensors.numpy import save as to_bytes

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another place or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        tensors = {name: np.ascontiguousarray(value) for name, value in _named(adapter)}
        run.write_bytes(temporary / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
        modules = [_module(target).split(".")[-1] for target in lora.targets]
        settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": modules}
        settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
        run.write_json(temporary / "adapter_config.json", {**_PEFT, **settings})
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: str | os.PathLike, config: LlamaConfig) -> tuple[Adapter, LoraConfig]:
    """The adapter in a folder of peft's format, for a model of this shape; what is not computed here is refused by name."""
    raw = read_settings(folder)
    for field, wanted in _PEFT.items():
        if (value := raw.get(field, wanted)) != wanted and (value or wanted):
            raise ValueError(f"{folder}/adapter_config.json: {field} is {value!r}; only {wanted!r} is computed here")
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"weight file {file} is missing; save the adapter as safetensors")
    tensors = hf.read_safetensors(file)
    targets = tuple(t for t in TARGETS if _name(t, 0, "a") in tensors)
    lora = LoraConfig(rank=int(raw["r"]), alpha=float(raw["lora_alpha"]), targets=targets)
    wanted = {}
    for target, (depth, out, into) in zip(targets, _shapes(config, lora), strict=True):
        for i in range(depth):
            wanted |= {_name(target, i, "a"): (lora.rank, into), _name(target, i, "b"): (out, lora.rank)}
    if different := sorted(wanted.keys() ^ tensors.keys()):
        where = "missing" if different[0] in wanted else "unknown to this model"
        raise ValueError(f"{file}: {len(different)} tensors are missing or unknown; {different[0]} is {where}")
    for name, shape in wanted.items():
        if (have := tensors[name]().shape) != shape:
            raise ValueError(f"{file}: {name} has shape {have}, {shape} is wanted")

    def stacked(target: str, half: str) -> jax.Array:
        layers = (tensors[_name(target, i, half)]().astype(np.float32) for i in range(config.num_layers))
        return jnp.asarray(np.stack(list(layers)))

    return {"layers": {t: {"a": stacked(t, "a"), "b": stacked(t, "b")} for t in targets}}, lora


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """adapter_config.json, with its rank, alpha and base model present."""
    file = Path(folder) / "adapter_config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if missing := [f for f in ("r", "lora_alpha", "base_model_name_or_path") if not raw.get(f)]:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    return raw


def _shapes(config: LlamaConfig, lora: LoraConfig) -> list[tuple[int, int, int]]:
    weights = llama.abstract_params(config, jnp.float32)[0]["layers"]
    return [weights[target].shape for target in lora.targets]


def _module(target: str) -> str:
    return hf.NAMES["layers", target].removesuffix(".weight")


def _name(target: str, layer: int, half: str) -> str:
    return f"base_model.model.{_module(target).format(i=layer)}.lora_{half.upper()}.weight"


def _named(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    for target, pair in adapter["layers"].items():
        for half, stack in pair.items():
            for i, value in enumerate(np.asarray(stack)):
                yield _name(target, i, half), value
