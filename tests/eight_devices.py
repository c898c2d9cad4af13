"""Claims about meshes, on eight CPU devices; test_eight_devices.py runs this file in a process of its own.

JAX_NUM_CPU_DEVICES=8 python -m pytest tests/eight_devices.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import mesh as meshes
from tests.test_loss import chunked, written_out

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
