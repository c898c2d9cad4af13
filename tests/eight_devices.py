"""Claims about meshes, on eight CPU devices; test_eight_devices.py runs this file in a process of its own.

JAX_NUM_CPU_DEVICES=8 python -m pytest tests/eight_devices.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import llama, optim, train
from swallow_jax import mesh as meshes
from tests.helpers import FLOAT32, random_params
from tests.test_loss import chunked, written_out
from tests.test_train import OPTIM, SMALL, TRAIN, make_batch

MESHES = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1)]


def build(shape):
    return meshes.build(meshes.MeshConfig(**dict(zip(meshes.AXES, shape, strict=True))))


@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_gives_one_device_s_loss_and_gradients(shape):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 8, 16), (24, 16)))
    targets = jnp.asarray(rng.integers(0, 24, (8, 8)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (8, 8)), jnp.float32)
    arrays = (hidden, head, targets, weights)
    value, grads = jax.value_and_grad(written_out, argnums=(0, 1))(*arrays, 0.01)
    mesh = build(shape)
    axes = (("batch", "seq", None), ("vocab", "embed"), ("batch", "seq"), ("batch", "seq"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, meshes.sharding(mesh, names)) for x, names in zip(arrays, axes, strict=True)]
        ours, our_grads = jax.jit(jax.value_and_grad(lambda *a: chunked(*a, 4, 0.01), argnums=(0, 1)))(*placed)
    np.testing.assert_allclose(ours, value, rtol=1e-6)
    for a, b in zip(our_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# Kinds of mesh, each axis split; pieces of a row of 16 cut through its documents.
STEPS = [((2, 2, 2, 1), "xla", 1), ((1, 2, 2, 2), "xla", 1), ((2, 1, 1, 4), "rows", 2)]


@pytest.fixture(scope="module")
def one_device():
    return step_on((1, 1, 1, 1), "xla")


def step_on(shape, attention, **changes):
    """(metrics, parameters) after two steps with unequal weights and packed rows; the second has a learning rate."""
    config = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2)
    devices = meshes.build(meshes.MeshConfig(**dict(zip(meshes.AXES, shape, strict=True))), jax.devices()[: int(np.prod(shape))])
    compute = dataclasses.replace(FLOAT32, attention=attention)
    settings = dataclasses.replace(TRAIN, loss_chunk=2, **changes)
    # Adam divides by the size of the gradient: with a large eps rounding stays rounding.
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIM, eps=1e-3), 8)
    kinds = {"config": config, "compute": compute, "train": settings, "optimizer": optimizer}
    with jax.set_mesh(devices):
        axes = llama.abstract_params(config, jnp.float32)[1]
        params = jax.tree.map(lambda p, a: jax.device_put(p, meshes.sharding(devices, a)), random_params(config), axes)
        state, step = train.init_state(params, optimizer), jax.jit(functools.partial(train.train_step, **kinds))
        for seed in (0, 1):
            place = meshes.sharding(devices, ("batch", "seq"))
            state, metrics = step(state, {k: jax.device_put(v, place) for k, v in make_batch(seed, rows=16).items()})
    return {k: float(v) for k, v in metrics.items()}, jax.tree.map(np.asarray, state["params"])


@pytest.mark.parametrize(("shape", "attention", "micro_batches"), STEPS)
def test_eight_devices_train_as_one(shape, attention, micro_batches, one_device):
    """Float32 sums in other orders: 1e-5 of the loss and of the gradient's norm; 1 % of the learning rate in a parameter."""
    metrics, params = step_on(shape, attention, micro_batches=micro_batches)
    for name in ("loss", "grad_norm", "targets", "tokens"):
        assert metrics[name] == pytest.approx(one_device[0][name], rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, one_device[1])
