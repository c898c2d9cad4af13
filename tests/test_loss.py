"""The chunked loss equals the loss written out, in value and gradient (on meshes: eight_devices.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax.loss import chunked_cross_entropy

B, T, D, V = 4, 8, 16, 24


def written_out(hidden, head, targets, weights, z_loss):
    scores = jnp.einsum("btd,vd->btv", hidden, head)
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    losses = normaliser - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights) + z_loss * jnp.sum(jnp.square(normaliser) * weights)


def chunked(hidden, head, targets, weights, chunk, z_loss):
    loss, squares, _ = chunked_cross_entropy(hidden, head, targets, weights, chunk, z_loss)
    return loss + z_loss * squares


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights),
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [4, 32])
def test_value_and_gradients_equal_the_loss_written_out(arrays, chunk, z_loss):
    value, grads = jax.value_and_grad(written_out, argnums=(0, 1))(*arrays, z_loss)
    ours, our_grads = jax.value_and_grad(chunked, argnums=(0, 1))(*arrays, chunk, z_loss)
    np.testing.assert_allclose(ours, value, rtol=1e-6)
    for a, b in zip(our_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_scaled_loss_scales_its_gradient(arrays):
    grad = jax.grad(lambda *a: 3.0 * chunked(*a, 8, 0.0), argnums=1)(*arrays)
    np.testing.assert_allclose(grad, 3.0 * jax.grad(written_out, argnums=1)(*arrays, 0.0), rtol=1e-5, atol=1e-5)


def test_a_chunk_that_does_not_divide_the_tokens_is_refused(arrays):
    with pytest.raises(ValueError, match="loss_chunk=5 does not divide the 32 tokens"):
        chunked(*arrays, 5, 0.0)
