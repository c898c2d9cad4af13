"""The training step as a program: what every config compiles to, before any device is paid for."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from configs import meshes as named
from configs.cpt import llama31_swallow_8b
from experiments import door
from swallow_jax import hf, llama, lora, mesh, optim, run, train
from tests.helpers import FLOAT32, LLAMA31
from tests.test_train import OPTIM, TRAIN

ROOT = Path(__file__).parent.parent
FILES = sorted(str(f.relative_to(ROOT)) for room in ("cpt", "sft") for f in (ROOT / "configs" / room).glob("[!_]*.py"))
ARGUMENTS = [f"configs/cpt/llama31_swallow_8b.py:{name}" for name in (*llama31_swallow_8b.CHOICES, "v5e-16")]


def shape_of(config) -> llama.LlamaConfig | None:
    """The model of a config: its own section, or that of a folder that is here."""
    if config.get("model"):
        return hf.parse_config(config.model.to_dict(), "model")
    folder = ROOT / config.init
    return hf.read_config(folder) if (folder / "config.json").is_file() else None


def abstract_batch(rows: int, length: int, place=None) -> dict[str, jax.ShapeDtypeStruct]:
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=place) for name, kind in kinds.items()}


def abstract_params(shape, devices) -> dict:
    shapes, axes = llama.abstract_params(shape, jnp.float32)
    places = jax.tree.map(lambda _, a: NamedSharding(devices, mesh.spec(a)), shapes, axes)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


@pytest.mark.parametrize("file", [*FILES, *ARGUMENTS])
def test_every_config_s_step_has_its_shapes_on_its_mesh(file):
    config = door.load_config(str(ROOT / file))
    shape = shape_of(config)
    if shape is None:  # a run's or a download's: checked where its shape is written
        assert config.init.startswith(("runs/", "models/")), file
        return
    size = run.build(mesh.MeshConfig, config.mesh.to_dict(), "mesh")
    devices = AbstractMesh(dataclasses.astuple(size), mesh.AXES, axis_types=(AxisType.Auto,) * 4)
    compute = run.build(llama.Compute, config.compute.to_dict(), "compute")
    section = {**config.train.to_dict(), "targets_per_row": 0}
    settings = run.build(train.TrainConfig, {"steps": 500, **section}, "train")
    optimizer = optim.make_optimizer(run.build(optim.OptimConfig, config.optim.to_dict(), "optim"), settings.steps)
    adapter = run.build(lora.LoraConfig, config.lora.to_dict(), "lora") if config.get("lora") else None
    params, frozen = abstract_params(shape, devices), None
    mesh.placements(params, llama.abstract_params(shape, jnp.float32)[1], devices)
    if adapter:
        frozen, params = params, jax.eval_shape(lambda: lora.init(shape, adapter, jax.random.key(0)))
    kinds = {"config": shape, "compute": compute, "train": settings, "optimizer": optimizer, "adapter": adapter}
    length = config.data.get("row_length", min(8192, shape.max_position_embeddings))
    with jax.sharding.use_abstract_mesh(devices):
        state = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), params)
        step = functools.partial(train.train_step, **kinds)
        new, metrics = jax.eval_shape(step, state, abstract_batch(config.data.batch_size, length), frozen)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(lambda s: (s.shape, s.dtype), state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


def test_the_meshes_of_the_configs_are_those_that_exist():
    assert set(llama31_swallow_8b.CHOICES) <= set(named.MESHES)


def test_the_step_lowers_inside_a_program_with_explicit_axes():
    """Callers may hold their arrays under Explicit axes: inside, the step's axes are Auto again (jax.sharding.auto_axes)."""
    devices = AbstractMesh((1, 4, 2, 1), mesh.AXES, axis_types=(AxisType.Explicit,) * 4)
    optimizer = optim.make_optimizer(OPTIM, 8)
    params = abstract_params(LLAMA31, devices)
    settings = dataclasses.replace(TRAIN, loss_chunk=16)
    step = functools.partial(train.train_step, config=LLAMA31, compute=FLOAT32, train=settings, optimizer=optimizer)
    abstract = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), params)
    places = train.state_placements(abstract, params, optimizer, devices)
    with jax.sharding.use_abstract_mesh(devices):
        state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, places)
        everywhere = NamedSharding(devices, PartitionSpec())
        names = ("loss", "grad_norm", "update_norm", "targets", "tokens")
        out = (places, dict.fromkeys(names, everywhere))
        explicit = jax.sharding.auto_axes(step, out_sharding=jax.tree.map(lambda place: place.spec, out))
        batch = abstract_batch(8, 16, NamedSharding(devices, mesh.spec(("batch", "seq"))))
        traced = jax.jit(explicit).trace(state, batch)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "manual_computation" in text or "shard_map" in text  # the loss over the vocabulary's parts
    assert "sharding_constraint" in text


def test_an_unrolled_step_without_remat_computes_little_more_than_the_model():
    """FLOPs of the program over those of the formula (causal attention at half): at most 5 % more, with attention's blocks, its
    scores computed again in the backward pass, norms, the loss and AdamW."""
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2}
    shape = dataclasses.replace(LLAMA31, **sizes, num_heads=8, num_kv_heads=4, head_dim=128)
    compute = dataclasses.replace(FLOAT32, scan_layers=False)
    optimizer = optim.make_optimizer(OPTIM, 8)
    step = functools.partial(train.train_step, config=shape, compute=compute, train=TRAIN, optimizer=optimizer)
    state = jax.eval_shape(lambda key: train.init_state(llama.init_params(shape, key, jnp.float32), optimizer), jax.random.key(0))
    rows, length = 16, 256
    executed = jax.jit(step).lower(state, abstract_batch(rows, length)).cost_analysis()["flops"]
    model = llama.train_flops_per_token(shape, length) * rows * length
    assert 1.0 <= executed / model <= 1.05, executed / model
