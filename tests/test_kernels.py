"""Accelerator kernels against the reference, run by Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import kernels
from swallow_jax.attention import attend

B, T, K, G, H = 2, 256, 2, 2, 128
SEGMENTS = jnp.asarray([[1] * 100 + [2] * 100 + [0] * 56, [1] * 256], jnp.int32)
POSITIONS = jnp.asarray([[*range(100), *range(100), *range(56)], range(256)], jnp.int32)


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, K, G, H), jnp.float32)
    k, v = (jax.random.normal(key, (B, T, K, H), jnp.float32) for key in keys[1:])
    return q, k, v


def reference(q, k, v):
    kinds = {"q_positions_BT": POSITIONS, "k_positions_BS": POSITIONS, "segments_BT": SEGMENTS}
    return attend(q, k, v, **kinds, aligned=True, backend="xla")


def splash(q, k, v):
    return kernels.splash(q, k, v, SEGMENTS, interpret=True)


def test_splash_equals_the_reference_in_value_and_gradient():
    q, k, v = arrays()
    np.testing.assert_allclose(splash(q, k, v), reference(q, k, v), rtol=2e-5, atol=2e-5)
    weights = jax.random.normal(jax.random.key(1), q.shape)
    ours = jax.grad(lambda *a: jnp.sum(splash(*a) * weights), argnums=(0, 1, 2))(q, k, v)
    theirs = jax.grad(lambda *a: jnp.sum(reference(*a) * weights), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_splash_isolates_packed_documents_to_the_bit():
    q, k, v = arrays()
    other = jnp.where((SEGMENTS == 1)[:, :, None, None], 7.0, 0.0)
    same = SEGMENTS[0] == 2
    before, after = splash(q, k, v)[0, same], splash(q, k + other, v + other)[0, same]
    assert np.array_equal(before, after)
    gradient = jax.grad(lambda v: jnp.sum(splash(q, k, v)[0, same] ** 2))(v)
    assert np.all(gradient[0, :100] == 0) and np.any(gradient[0, 100:200] != 0)
