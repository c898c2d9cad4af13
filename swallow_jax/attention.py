"""Grouped-query attention over packed documents or a cache: one door, several backends.

Letters: B batch, T query positions, S key positions, K key-value heads, G query heads per key-value head, H head size.
A query attends to a key when both belong to one segment and the key's position is not after its own. Positions are
those inside the document, so the rule is the same for packed rows (segments given) and for a cache (slot = position).
"""

import jax
import jax.numpy as jnp

QUERY_BLOCK = 1024  # longer rows go block by block, so that [T, S] scores never exist whole
_MASKED = -1e30  # finite: a row without any key would be NaN with -inf; exp(_MASKED - max) is exactly 0


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    backend: str,
) -> jax.Array:
    """Softmax attention in float32, scaled by 1/sqrt(H); returns [B, T, K, G, H] in the dtype of q.

    Documents are isolated exactly: a masked key has probability 0.0, so changing it changes no bit of the output.
    """
    if backend != "xla":
        raise ValueError(f"unknown attention backend {backend!r}; known: xla")

    def block(q: jax.Array, positions: jax.Array, segments: jax.Array | None) -> jax.Array:
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
        scores = scores * (q.shape[-1] ** -0.5)
        allowed = positions[:, :, None] >= k_positions_BS[:, None, :]
        if segments is not None:
            allowed &= segments[:, :, None] == k_segments_BS[:, None, :]
        scores = jnp.where(allowed[:, None, None], scores, _MASKED)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum(
            "BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
        ).astype(q.dtype)

    B, T = q_positions_BT.shape
    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        return block(q_BTKGH, q_positions_BT, q_segments_BT)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // QUERY_BLOCK, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    queries = (split(q_BTKGH), split(q_positions_BT), None if q_segments_BT is None else split(q_segments_BT))
    out = jax.lax.map(jax.checkpoint(lambda one: block(*one)), queries)
    return jnp.moveaxis(out, 0, 1).reshape(q_BTKGH.shape)
