"""Before paying: compile a training config's step for a TPU topology, on this machine, and say what it needs.

    python -m tools.plan --config=configs/cpt/llama31_swallow_8b.py --topology=v5p:2x2x2
    python -m tools.plan --config=configs/cpt/llama31_swallow_8b.py:h100x8 --gpu=h100 --mfu=0.4 --price=2.5

With --topology the TPU compiler (extra [tpu]; no TPU is needed) compiles the real step: memory a chip and collective bytes are
read from the program. With --gpu the figures are arithmetic and labelled "estimated". Hours and price follow from --mfu (share of
the peak, causal attention counted once), --tokens (default: the config's steps) and --price (a chip-hour). Nothing is downloaded.
"""

import functools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door

_CONFIG = flags.DEFINE_string("config", None, "a training config of configs/cpt or configs/sft (FILE or FILE:ARGUMENT)")
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU topology, e.g. v5p:2x2x2, v5e:4x4, v6e:8x8")
_GPU = flags.DEFINE_enum("gpu", "", ["", "h100", "h200"], "estimate for these GPUs instead")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 8192, "tokens a row (the shards decide in a real run)")
_MFU = flags.DEFINE_float("mfu", 0.4, "assumed share of peak FLOP/s")
_TOKENS = flags.DEFINE_float("tokens", 0.0, "token budget (default: steps x rows x length of the config)")
_PRICE = flags.DEFINE_float("price", 0.0, "price of a chip-hour, in any currency")

# Memory a chip and dense bf16 FLOP/s, vendors' data sheets.
CHIPS = {
    "v5p": (95e9, 459e12),
    "v5e": (16e9, 197e12),
    "v6e": (32e9, 918e12),
    "tpu7x": (192e9, 2307e12),
    "h100": (80e9, 989e12),
    "h200": (141e9, 989e12),
}
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1, "s64": 8, "u64": 8}


def main() -> dict[str, Any]:
    """Print a table; returns argument_gb, temp_gb, total_gb (a device), collective bytes, FLOPs, hours and price."""
    if not _CONFIG.value or bool(_TOPOLOGY.value) == bool(_GPU.value):
        raise ValueError("--config and one of --topology and --gpu are needed; --help shows an example")
    kind = _GPU.value or _TOPOLOGY.value.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"--topology={_TOPOLOGY.value}: unknown kind {kind!r}; known: {', '.join(CHIPS)}")
    config = door.load_config(_CONFIG.value)
    found = estimate(config, _ROW_LENGTH.value) if _GPU.value else compile_step(config, _TOPOLOGY.value, _ROW_LENGTH.value)
    memory, peak = CHIPS[kind]
    tokens = _TOKENS.value or config.train.steps * found["tokens_per_step"]
    per_second = _MFU.value * peak * found["chips"] / found["model_flops_per_token"]
    hours = tokens / per_second / 3600
    found |= {
        "fits": found["total_gb"] <= memory / 1e9,
        "memory_gb": memory / 1e9,
        "tokens": tokens,
        "assumed_mfu": _MFU.value,
        "tokens_per_day": round(per_second * 86400),
        "hours": round(hours, 2),
        "price": round(hours * found["chips"] * _PRICE.value, 2),
    }
    for name, value in found.items():
        print(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}", flush=True)
    if not found["fits"]:
        print(f"does not fit: {found['total_gb']:.1f} GB of {memory / 1e9:.0f} GB a device; more devices, remat, or fewer rows")
    return found


def settings(config: Any, steps: int) -> tuple[Any, ...]:
    """(shape, compute, train, optimizer) of a training config, as its program builds them."""
    from swallow_jax import hf, llama, optim, run, train

    if not config.get("model"):
        raise ValueError(f"{_CONFIG.value}: a plan needs the model's shape in config.model; see configs/models.py")
    shape = hf.parse_config(config.model.to_dict(), "model")
    compute = run.build(llama.Compute, config.compute.to_dict(), "compute")
    section = {**config.train.to_dict(), "steps": steps, "targets_per_row": 0}
    optimizer = optim.make_optimizer(run.build(optim.OptimConfig, config.optim.to_dict(), "optim"), steps)
    return shape, compute, run.build(train.TrainConfig, section, "train"), optimizer


def abstract_step(config: Any, devices: Any, row_length: int) -> tuple[Any, Any, Any, Any]:
    """(jitted step, abstract state, abstract batch, mesh): the training step with shapes in place of arrays."""
    import jax
    import jax.numpy as jnp

    from swallow_jax import llama, mesh, run, train

    shape, compute, training, optimizer = settings(config, config.train.steps)
    devices = mesh.build(run.build(mesh.MeshConfig, config.mesh.to_dict(), "mesh"), devices)
    shapes, axes = llama.abstract_params(shape, jnp.float32)
    params = jax.tree.map(
        lambda s, names: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=mesh.sharding(devices, names)), shapes, axes
    )
    abstract = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), params)
    places = train.state_placements(abstract, params, optimizer, devices)
    state = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), abstract, places)
    size, place = (config.data.batch_size, row_length), mesh.sharding(devices, ("batch", "seq"))
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(size, kind, sharding=place) for name, kind in kinds.items()}
    step = functools.partial(train.train_step, config=shape, compute=compute, train=training, optimizer=optimizer)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None)), state, batch, devices


def compile_step(config: Any, topology: str, row_length: int) -> dict[str, Any]:
    """What the TPU compiler says about the step on this topology."""
    # Read when libtpu starts: no metadata server is asked, no crash log written.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}
    import jax
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu raises several kinds; each means that there is no such topology, or no compiler
        first = str(error).splitlines()[0]
        raise ValueError(f"--topology={topology}: {first}; pip install 'jax[tpu]' brings the compiler") from None
    step, state, batch, mesh = abstract_step(config, devices, row_length)
    began = time.perf_counter()
    print(f"compiling for {len(devices)} x {devices[0].device_kind}, some minutes on two cores ...", file=sys.stderr, flush=True)
    with jax.set_mesh(mesh):
        program = step.lower(state, batch).compile()
    memory, text = program.memory_analysis(), program.as_text()
    if dump := os.environ.get("SWALLOW_PLAN_HLO"):
        Path(dump).write_text(text, encoding="utf-8")
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    moved = collective_bytes(text)
    theory = fsdp_bytes(config, mesh)
    return {
        "source": "compiled",
        "chips": len(devices),
        **sizes(config, row_length),
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "total_gb": total / 1e9,
        "collective_gb_per_step": sum(moved.values()) / 1e9,
        "collective_gb_by_kind": {kind: round(size / 1e9, 3) for kind, size in sorted(moved.items())},
        "collective_ratio_to_fsdp_theory": round(sum(moved.values()) / theory, 4) if theory else None,
        "whole_scores": whole_scores(config, text, len(devices), row_length),
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def sizes(config: Any, row_length: int) -> dict[str, Any]:
    """Parameters, tokens a step and model FLOPs (causal attention counted at half, no recomputation)."""
    from swallow_jax import llama

    shape = settings(config, config.train.steps)[0]
    per_token = llama.train_flops_per_token(shape, row_length)
    tokens = config.data.batch_size * row_length
    return {
        "parameters": llama.parameter_count(shape)[0],
        "tokens_per_step": tokens,
        "model_flops_per_token": per_token,
        "model_flops_per_step": per_token * tokens,
    }


def fsdp_bytes(config: Any, mesh: Any) -> float:
    """Bytes a device receives in a step of fully sharded training: the weights twice in the compute dtype (forward, backward),
    the gradients once in float32, each less the part that it holds itself."""
    import jax.numpy as jnp

    from swallow_jax import llama

    shape, compute, training, _ = settings(config, config.train.steps)
    n = mesh.shape["fsdp"]
    each = 2 * jnp.dtype(compute.dtype).itemsize + 4
    return each * llama.parameter_count(shape)[0] * (n - 1) / n / mesh.shape["tensor"] * training.micro_batches


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that a device receives in one execution of a compiled program, by kind of collective, loops multiplied out.

    A ring brings (n - 1)/n of a gathered array or of one to be scattered, and twice that of one reduced in place.
    """
    bodies = _computations(text)
    counts = _executions(text, bodies)
    moved: dict[str, float] = {}
    pattern = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
    for name, lines in bodies.items():
        for line in lines:
            if not (found := pattern.search(line)):
                continue
            kind, n = found[2], _group_size(line)
            shapes = [math.prod(map(int, filter(None, dims.split(",")))) * _BYTES[dtype] for dtype, dims in _shapes(found[1])]
            if not shapes or n < 2:
                continue
            # A -start returns (operand, result); of a gather the result is the largest, of a scatter the operand.
            size = max(shapes) if "-start(" in line else sum(shapes)
            if kind == "reduce-scatter" and "-start(" not in line:
                size *= n
            share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
            moved[kind] = moved.get(kind, 0.0) + size * share * counts.get(name, 1)
    return moved


def _shapes(words: str) -> list[tuple[str, str]]:
    return [(dtype, dims) for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", words) if dtype in _BYTES]


def _group_size(line: str) -> int:
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return 2 if "source_target_pairs" in line else 0


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of an HLO module."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = found[1]
            bodies[name] = []
        elif line == "}":
            name = None
        elif name is not None:
            bodies[name].append(line)
    return bodies


def _executions(text: str, bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs: the trip counts of the loops around it, multiplied."""
    callers: dict[str, tuple[str, int]] = {}
    for name, lines in bodies.items():
        for line in lines:
            trips = 1
            if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
                trips = int(found[1])
            pattern = r"(?:body|calls|to_apply|called_computations=\{|branch_computations=\{)=?%?([\w.\-]+)"
            for called in re.findall(pattern, line):
                callers.setdefault(called, (name, trips))
    counts = {}
    for name in bodies:
        total, at, seen = 1, name, set()
        while at in callers and at not in seen:
            seen.add(at)
            at, trips = callers[at]
            total *= trips
        counts[name] = total
    return counts


def whole_scores(config: Any, text: str, chips: int, row_length: int) -> bool:
    """Whether the program holds scores of all tokens of a device over the whole vocabulary."""
    tokens = config.data.batch_size * row_length // chips
    sizes = {math.prod(map(int, filter(None, dims.split(",")))) for _, dims in set(_shapes(text))}
    vocabulary = config.model.vocab_size
    return any(size >= tokens * vocabulary and size % vocabulary == 0 and size // vocabulary % tokens == 0 for size in sizes)


def estimate(config: Any, row_length: int) -> dict[str, Any]:
    """Arithmetic for GPUs: weights, moments and gradients by dtype; with full remat, a layer's input a token and one layer's
    activations. Labelled: to be compared with a measured case of notebooks/LOG.md."""
    from swallow_jax import llama

    shape, compute, training, _ = settings(config, config.train.steps)
    c, m = shape, config.mesh
    chips = m.replica * m.fsdp * m.tensor * m.context
    total = llama.parameter_count(shape)[0] / (m.fsdp * m.tensor)
    arguments = total * (8 + (2 if config.optim.mu_dtype == "bfloat16" else 4))
    tokens = config.data.batch_size * row_length / (m.replica * m.fsdp * m.context) / training.micro_batches
    width = 2 if compute.dtype == "bfloat16" else 4
    layer = 4 * c.hidden_size + 3 * c.intermediate_size + 2 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    whole = c.num_layers * layer
    kept = {"full": c.num_layers * c.hidden_size + layer, "none": whole}.get(compute.remat, whole / 2)
    chunk = min(training.loss_chunk or tokens, tokens)
    scores = 2 * chunk * c.vocab_size / m.tensor * 4
    head = c.vocab_size * c.hidden_size / m.tensor * (width + 4)
    temporary = total * 4 + tokens * kept * width / m.tensor + scores + head
    return {
        "source": "estimated",
        "chips": chips,
        **sizes(config, row_length),
        "argument_gb": arguments / 1e9,
        "temp_gb": temporary / 1e9,
        "total_gb": (arguments + temporary) / 1e9,
    }


if __name__ == "__main__":
    door.tool(main, __doc__)
