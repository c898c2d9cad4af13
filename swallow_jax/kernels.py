"""Accelerator kernels behind `attention.attend`, off the reading path. All of them isolate packed documents.

splash  JAX's Splash attention (Pallas, TPU): causal over the row, blocks of keys behind the query skipped, segment ids
        compared in the kernel, so that no [T, T] array exists. Compiled for TPU topologies by tools.plan and run by the tests
        in interpret mode; its speed on a TPU is unverified until notebooks/LOG.md has a figure.
cudnn   cuDNN's packed layout (Hopper and later, bfloat16), through a private function of JAX: documents are sequences of their
        own, told by lengths and offsets. The tests lower it for CUDA and check the lengths; that it runs, isolates and how fast
        is unverified until notebooks/LOG.md has `tools.bench train --case=h200-correct` on such a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from swallow_jax import mesh as meshes

RESIDUALS = "attention_residuals"  # name under which rematerialisation can keep what a backward pass of attention needs
# Most documents in a row for cuDNN, whose log-sum-exps take B * this * N * T floats (134 MB for 128, one row of 8,192, 32 heads).
CUDNN_DOCUMENTS = 128


def splash(
    q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention inside each segment of a packed row, [B, T, K, G, H]; scores are scaled by 1/sqrt(H).

    T must be a multiple of 128 and the mesh's context axis 1. Rows are split over the data axes, key-value heads over `tensor`.
    """
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
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

    return _each_device(rows, "splash", q_BTKGH, k_BTKH, v_BTKH, segments_BT)


def cudnn(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """As `splash`, on a Hopper GPU, in bfloat16; segments must be 1, 2, ... from the left, padding (0) at the end.

    A row of more than CUDNN_DOCUMENTS documents comes back as NaN, so that the run stops instead of training on a leak.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if q_BTKGH.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'cudnn' computes in bfloat16, not {q_BTKGH.dtype}; set compute.dtype, or attention 'xla'")

    def rows(q_BTKGH, k_BTKH, v_BTKH, segments_BT):
        B, T, K, G, H = q_BTKGH.shape
        real = (segments_BT > 0)[:, :, None, None]
        lengths_BM, offsets_BM = document_spans(segments_BT, CUDNN_DOCUMENTS)
        # Padding belongs to no sequence: what stands there is undefined, in values and gradients. Keys and values for every
        # query head: JAX 0.10-0.12 computes their offsets with the number of query heads.
        q, k, v = (
            jnp.where(real, x, 0)
            for x in (q_BTKGH.reshape(B, T, K * G, H), jnp.repeat(k_BTKH, G, axis=2), jnp.repeat(v_BTKH, G, axis=2))
        )
        out = dot_product_attention(
            q, k, v, q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=offsets_BM, kv_offsets=offsets_BM,
            scale=H**-0.5, mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip
        out = jnp.where(real, checkpoint_name(out, RESIDUALS), 0)
        too_many = segments_BT.max(axis=1) > CUDNN_DOCUMENTS
        return jnp.where(too_many[:, None, None, None], jnp.nan, out).astype(out.dtype).reshape(q_BTKGH.shape)

    return _each_device(rows, "cudnn", q_BTKGH, k_BTKH, v_BTKH, segments_BT)


def document_spans(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, most] and first positions [B, most + 1] of the documents of each row, -1 where there is none."""
    numbers = jnp.arange(1, most + 1)
    lengths_BM = (segments_BT[:, None] == numbers[:, None]).sum(axis=-1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(lengths_BM, axis=1, dtype=jnp.int32) - lengths_BM
    none = lengths_BM == 0
    return jnp.where(none, -1, lengths_BM), jnp.pad(jnp.where(none, -1, starts_BM), ((0, 0), (0, 1)), constant_values=-1)


def _each_device(rows: Callable, name: str, q_BTKGH, k_BTKH, v_BTKH, segments_BT) -> jax.Array:
    """`rows` on one device's part of the batch and of the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return rows(q_BTKGH, k_BTKH, v_BTKH, segments_BT)
    if mesh.shape["context"] > 1:
        raise ValueError(f"attention {name!r} with mesh context={mesh.shape['context']}; set it to 1, or attention 'xla'")
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
    return sa.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret, residual_checkpoint_name=RESIDUALS
    )
