"""Grouped-query attention over packed documents or a cache: one door, several backends.

Letters: B batch, T query positions, S key positions, K key-value heads, G query heads per key-value head, H head size.
A query attends to a key when both belong to one segment and the key's position is not after its own. Positions are
those inside the document, so the rule is the same for packed rows (segments given) and for a cache (slot = position).

Backends, all exact and all isolating packed documents:
  xla   all rows at once, in query blocks of 1024, so that [T, S] scores never exist whole: the reference
  rows  one row after the other, in query blocks of 128, whose temporaries stay in a core's cache: on a CPU the gradient takes
        a quarter of the time (28 against 112 ms at B=16, T=256; 59 against 270 ms at B=8, T=512)
  splash, cudnn  kernels for TPUs and Hopper GPUs (kernels.py); against a cache they compute as `xla` does
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from swallow_jax import kernels
from swallow_jax import mesh as meshes
from swallow_jax.kernels import RESIDUALS

_BLOCKS = {"xla": 1024, "rows": 128}
_KERNELS = {"splash": kernels.splash, "cudnn": kernels.cudnn}
_SCORES = 1 << 27  # float32 scores against a cache that exist at once: 512 MiB
_MASKED = -1e30  # finite: a row without any key would be NaN with -inf; exp(_MASKED - max) is exactly 0


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    segments_BT: jax.Array | None,
    aligned: bool,
    backend: str,
) -> jax.Array:
    """Softmax attention in float32, scaled by 1/sqrt(H); returns [B, T, K, G, H] in the dtype of q.

    `aligned` says that key i is the token of query i (no cache), so that blocks of keys behind the last query are left out;
    segments need it. Documents are isolated exactly: a masked key has weight 0.0, so changing it changes no bit.
    """
    if backend in _KERNELS:
        if not aligned:
            raise ValueError(f"attention {backend!r} reads rows, no cache; attend_cached serves a cache")
        rows = jnp.ones(q_positions_BT.shape, jnp.int32) if segments_BT is None else segments_BT
        return _KERNELS[backend](q_BTKGH, k_BSKH, v_BSKH, rows)
    if backend not in _BLOCKS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join((*_KERNELS, *_BLOCKS))}")
    if segments_BT is not None and not aligned:
        raise ValueError("packed documents cannot be read through a cache; give one document a row")
    columns = (q_BTKGH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, segments_BT, segments_BT)
    mesh = jax.sharding.get_abstract_mesh()
    if aligned and not mesh.empty and mesh.shape.get("context", 1) > 1:
        return checkpoint_name(_over_context(columns, backend), RESIDUALS)
    return checkpoint_name(_rows(columns, backend, aligned=aligned), RESIDUALS)


def _over_context(columns, backend: str) -> jax.Array:
    """Context parallelism: each device has a part of the queries and gathers the keys and values of the whole row.

    Correct for any packing, as documents and positions decide who sees whom; the devices with the first queries compute as much
    as the others although they see less.
    """
    head, row = ("kv_heads", None), ("batch", "seq")
    axes = ((*row, "kv_heads", None, None), (*row, *head), (*row, *head), row, row, row, row)
    present = [column is not None for column in columns]

    def local(*given):
        given = iter(given)
        q, k, v, q_positions, k_positions, q_segments, k_segments = (next(given) if here else None for here in present)
        k, v, k_positions, k_segments = jax.tree.map(
            lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True), (k, v, k_positions, k_segments)
        )
        return _rows((q, k, v, q_positions, k_positions, q_segments, k_segments), backend, aligned=False)

    given = [column for column in columns if column is not None]
    specs = tuple(meshes.spec(names) for names, here in zip(axes, present, strict=True) if here)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*given)


def _rows(columns, backend: str, *, aligned: bool) -> jax.Array:
    row = functools.partial(_row, block=_BLOCKS[backend], aligned=aligned)
    if backend == "xla" or columns[0].shape[0] == 1:
        return jax.vmap(row)(*columns)
    return jax.lax.map(lambda one: row(*one), columns)


def attend_cached(
    q_BTKGH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    slots_BT: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None,
    backend: str,
) -> jax.Array:
    """Attention to a cache in the layout of `llama.init_cache`; a query sees the slots up to its own, `slots_BT`.

    `prefix` is (k_KHP, v_KPH, length), the keys and values that all rows see before their own slots: stored once and, with
    all rows' queries stacked, read once. Its scores and the row's own are one softmax, merged by their maxima and sums.
    Products are taken in the cache's dtype with float32 sums; returns [B, T, K, G, H] in the dtype of q.
    """
    backend = "xla" if backend in _KERNELS else backend
    if backend not in _BLOCKS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join((*_KERNELS, *_BLOCKS))}")
    B, T, K, G, H = q_BTKGH.shape
    S, dtype = k_BKHS.shape[-1], k_BKHS.dtype
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def one(q_BTKGH, slots_BT):
        T = q_BTKGH.shape[1]
        q = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H).astype(dtype)
        scores = product(q, k_BKHS).reshape(B, K, G, T, S) * H**-0.5
        scores = jnp.where((slots_BT[..., None] >= jnp.arange(S))[:, None, None], scores, _MASKED)
        most = scores.max(axis=-1)
        if prefix is not None:
            k_KHP, v_KPH, length = prefix
            q = q_BTKGH.transpose(2, 0, 3, 1, 4).reshape(K, B * G * T, H).astype(dtype)
            before = jnp.where(jnp.arange(k_KHP.shape[-1]) < length, product(q, k_KHP) * H**-0.5, _MASKED)
            most = jnp.maximum(most, before.max(axis=-1).reshape(K, B, G, T).swapaxes(0, 1))
        weights = jnp.exp(scores - most[..., None])
        total = weights.sum(axis=-1)
        out = product(weights.reshape(B, K, G * T, S).astype(dtype), v_BKSH).reshape(B, K, G, T, H)
        if prefix is not None:
            weights = jnp.exp(before - most.swapaxes(0, 1).reshape(K, B * G * T, 1))
            total += weights.sum(axis=-1).reshape(K, B, G, T).swapaxes(0, 1)
            out += product(weights.astype(dtype), v_KPH).reshape(K, B, G, T, H).swapaxes(0, 1)
        return (out / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q_BTKGH.dtype)

    # As many queries at a time as their scores over all slots stay within bounds.
    slots = S + (0 if prefix is None else prefix[0].shape[-1])
    block = max(1, min(_BLOCKS[backend], _SCORES // (B * K * G * slots)))
    outs = [one(q_BTKGH[:, i : i + block], slots_BT[:, i : i + block]) for i in range(0, T, block)]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _row(
    q_TKGH, k_SKH, v_SKH, q_positions_T, k_positions_S, q_segments_T, k_segments_S, *, block: int, aligned: bool
) -> jax.Array:
    """One row of the batch, block of queries after block of queries."""
    T, K, G, H = q_TKGH.shape

    @jax.checkpoint  # scores are computed again in the backward pass rather than kept
    def one(q_TKGH, k_SKH, v_SKH, allowed_TS):
        length = q_TKGH.shape[0]
        # Two matmuls a key-value head, its G query heads stacked as rows.
        q = q_TKGH.transpose(1, 2, 0, 3).reshape(K, G * length, H)
        scores = jnp.matmul(q, k_SKH.transpose(1, 2, 0), preferred_element_type=jnp.float32) * H**-0.5
        scores = jnp.where(allowed_TS, scores.reshape(K, G, length, -1), _MASKED)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1)
        weights = weights.reshape(K, G * length, -1).astype(v_SKH.dtype)
        out = jnp.matmul(weights, v_SKH.transpose(1, 0, 2), preferred_element_type=jnp.float32)
        out = out.reshape(K, G, length, H) / total[..., None]
        return out.transpose(2, 0, 1, 3).astype(q_TKGH.dtype)

    outs = []
    for first in range(0, T, block):
        last = min(first + block, T)
        seen = slice(0, last) if aligned else slice(None)
        allowed = q_positions_T[first:last, None] >= k_positions_S[None, seen]
        if q_segments_T is not None:
            allowed &= q_segments_T[first:last, None] == k_segments_S[None, seen]
        outs.append(one(q_TKGH[first:last], k_SKH[seen], v_SKH[seen], allowed))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs)
