"""Cross-entropy over a large vocabulary in chunks of tokens: scores [tokens, V] never exist whole, and none is computed twice.

The forward pass of a training step already makes the gradients: for a sum of per-token losses they need no more than the
scores of the chunk at hand, so each chunk costs its three matrix products once (scores, gradient of the hidden states, gradient
of the head), where recomputing the scores in the backward pass would cost a fourth. (The idea is Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989 section 3.2, written here for a mesh.)

On a mesh it runs inside `shard_map`: every device keeps the gradient of the head over its own tokens and adds it to the others'
once, after the last chunk; left to the compiler, it would be added after every chunk. A vocabulary split over the `tensor`
axis needs two sums and a maximum a token, never the gathered scores.

Letters: B batch, T positions, D model, V vocabulary (of this device inside `shard_map`), C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from swallow_jax import mesh as meshes

_DATA = ("replica", "fsdp", "context")  # mesh axes that split tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weighted cross-entropies in nats, sum of weighted squared log-normalisers, cross-entropy of each token), float32.

    Sums are scalars over all devices, the last is [B, T], unweighted.

    hidden_BTD are the final hidden states in the compute dtype; head_VD is the float32 head (or tied embedding), cast here.
    `chunk` is the number of a device's tokens whose scores exist at once. The gradient of `first + z_loss * second` is
    what flows back, whatever the cotangents of the second and third are; weights and targets get none.
    """
    return _sums(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, z_loss, with_gradients=False)


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, z_loss):
    *sums, d_hidden_BTD, d_head_VD = _sums(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, z_loss, with_gradients=True)
    return tuple(sums), (d_hidden_BTD, d_head_VD.astype(head_VD.dtype))


def _backward(chunk, z_loss, gradients, cotangents):
    scale = cotangents[0]
    d_hidden_BTD, d_head_VD = (scale.astype(g.dtype) * g for g in gradients)
    return d_hidden_BTD, d_head_VD, None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _sums(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, z_loss, *, with_gradients):
    local = functools.partial(_local, chunk=chunk, z_loss=z_loss, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(hidden_BTD, head_VD, targets_BT, weights_BT, axes=())
    tokens, head = meshes.spec(("batch", "seq")), meshes.spec(("vocab", "embed"))
    hidden = meshes.spec(("batch", "seq", None))
    out = (PartitionSpec(), PartitionSpec(), tokens) + ((hidden, head) if with_gradients else ())
    return jax.shard_map(
        functools.partial(local, axes=meshes.AXES), in_specs=(hidden, head, tokens, tokens), out_specs=out, check_vma=False
    )(hidden_BTD, head_VD, targets_BT, weights_BT)


def _local(hidden_BTD, head_VD, targets_BT, weights_BT, *, chunk, z_loss, with_gradients, axes):
    """One device's tokens against its part of the vocabulary; `axes` are the mesh's, () on one device."""
    dtype, D = hidden_BTD.dtype, hidden_BTD.shape[-1]
    head_VD = head_VD.astype(dtype)
    first = 0
    if axes:
        head_VD = jax.lax.all_gather(head_VD, "fsdp", axis=1, tiled=True)  # in the compute dtype: half the bytes
        first = jax.lax.axis_index("tensor") * head_VD.shape[0]
    tokens = targets_BT.size
    chunk = min(chunk, tokens)
    if tokens % chunk:
        raise ValueError(f"train.loss_chunk={chunk} does not divide the {tokens} tokens of a device; choose a divisor")
    columns = (hidden_BTD.reshape(-1, chunk, D), targets_BT.reshape(-1, chunk), weights_BT.reshape(-1, chunk))

    def over_vocabulary(reduce, x):
        return reduce(x, "tensor") if axes else x

    def one(carry, part):
        loss, squares, d_head_VD = carry
        hidden_CD, targets_C, weights_C = part
        scores_CV = jnp.einsum("CD,VD->CV", hidden_CD, head_VD, preferred_element_type=jnp.float32)
        highest_C = over_vocabulary(jax.lax.pmax, scores_CV.max(axis=-1))
        powers_CV = jnp.exp(scores_CV - highest_C[:, None])
        total_C = over_vocabulary(jax.lax.psum, powers_CV.sum(axis=-1))
        normaliser_C = highest_C + jnp.log(total_C)
        hit_CV = targets_C[:, None] - first == jnp.arange(scores_CV.shape[1])[None]
        target_C = over_vocabulary(jax.lax.psum, jnp.where(hit_CV, scores_CV, 0.0).sum(axis=-1))
        losses_C = normaliser_C - target_C
        loss += jnp.sum(losses_C * weights_C)
        squares += jnp.sum(jnp.square(normaliser_C) * weights_C)
        if not with_gradients:
            return (loss, squares, d_head_VD), (losses_C, None)
        # d(normaliser) = softmax, so the z-term adds 2 z normaliser softmax.
        slope_C = weights_C * (1 + 2 * z_loss * normaliser_C)
        d_scores_CV = powers_CV * (slope_C / total_C)[:, None] - jnp.where(hit_CV, weights_C[:, None], 0.0)
        d_scores_CV = d_scores_CV.astype(dtype)
        d_hidden_CD = jnp.einsum("CV,VD->CD", d_scores_CV, head_VD, preferred_element_type=jnp.float32)
        d_head_VD += jnp.einsum("CV,CD->VD", d_scores_CV, hidden_CD, preferred_element_type=jnp.float32)
        return (loss, squares, d_head_VD), (losses_C, over_vocabulary(jax.lax.psum, d_hidden_CD).astype(dtype))

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(head_VD.shape, jnp.float32) if with_gradients else None)
    (loss, squares, d_head_VD), (losses, d_hidden) = jax.lax.scan(one, start, columns)
    losses_BT = losses.reshape(targets_BT.shape)
    if axes:
        loss, squares = jax.lax.psum((loss, squares), _DATA)
    if not with_gradients:
        return loss, squares, losses_BT
    if axes:
        d_head_VD = jax.lax.psum_scatter(d_head_VD, "fsdp", scatter_dimension=1, tiled=True)
        d_head_VD = jax.lax.psum(d_head_VD, ("replica", "context"))
        # Added up before the layers go backward: else the sum waits for the optimiser, and the whole [V, D] stays until then.
        d_hidden, d_head_VD = jax.lax.optimization_barrier((d_hidden, d_head_VD))
    return loss, squares, losses_BT, d_hidden.reshape(hidden_BTD.shape), d_head_VD
