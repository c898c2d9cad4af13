"""Accelerator kernels behind `attention.attend`, off the reading path. All of them isolate packed documents.

splash  JAX's Splash attention (Pallas, TPU): causal over the row, blocks of keys behind the query skipped, segment ids
        compared in the kernel, so that no [T, T] array exists. Compiled for TPU topologies by tools.plan and run by the tests
        in interpret mode; its speed on a TPU is unverified until notebooks/LOG.md has a figure.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from swallow_jax import mesh as meshes


def splash(
    q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention inside each segment of a packed row, [B, T, K, G, H]; scores are scaled by 1/sqrt(H).

    T must be a multiple of 128 and the mesh's context axis 1. Rows are split over the data axes, key-value heads over `tensor`.
    """
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    mesh = jax.sharding.get_abstract_mesh()
    many = not mesh.empty and mesh.size > 1
    if many and mesh.shape["context"] > 1:
        raise ValueError(f"attention 'splash' with mesh context={mesh.shape['context']}; set it to 1, or attention 'xla'")
    if T % 128:
        raise ValueError(f"attention 'splash' wants rows of a multiple of 128 tokens, these have {T}; change the row length")
    # Scaled in float32 and rounded once: H**-0.5 is no power of two for H = 128.
    q_BTKGH = (q_BTKGH.astype(jnp.float32) * H**-0.5).astype(q_BTKGH.dtype)

    def rows(q_BTKGH, k_BTKH, v_BTKH, segments_BT):
        heads = q_BTKGH.shape[2] * q_BTKGH.shape[3]
        kernel = _splash_kernel(heads, T, interpret)
        q_BNTH = q_BTKGH.reshape(*q_BTKGH.shape[:2], heads, H).swapaxes(1, 2)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), _segment_ids(segments_BT))
        return out_BNTH.swapaxes(1, 2).reshape(q_BTKGH.shape)

    if not many:
        return rows(q_BTKGH, k_BTKH, v_BTKH, segments_BT)
    query = meshes.spec(("batch", "seq", "kv_heads", None, None))
    keys = meshes.spec(("batch", "seq", "kv_heads", None))
    specs = (query, keys, keys, meshes.spec(("batch", "seq")))
    return jax.shard_map(rows, in_specs=specs, out_specs=query, check_vma=False)(q_BTKGH, k_BTKH, v_BTKH, segments_BT)


def _segment_ids(segments_BT: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=segments_BT, kv=segments_BT)


def _splash_kernel(heads: int, length: int, interpret: bool) -> Any:
    """The kernel for one row: [N, T, H] queries, [K, T, H] keys and values."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    block = functools.reduce(lambda best, size: size if length % size == 0 else best, (128, 256, 512, 1024), 128)
    sizes = sa.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512),
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=min(block, 512), block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = sa.MultiHeadMask([sa.CausalMask((length, length))] * heads)
    return sa.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
