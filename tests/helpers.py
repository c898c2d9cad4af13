"""What several tests share: tiny models with real shapes' quirks, and folders that hold them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import hf, llama
from swallow_jax.llama import Compute, LlamaConfig, RopeScaling

LLAMA31_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
FLOAT32 = Compute(dtype="float32", remat="none", scan_layers=True, attention="xla")

# Llama 3.1's kind: grouped heads, head_dim that is not hidden/heads, scaled RoPE, untied.
LLAMA31 = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=112,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=500000.0,
    rope_scaling=LLAMA31_ROPE,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
)
LLAMA32_TIED = dataclasses.replace(LLAMA31, tie_word_embeddings=True, rope_scaling=dataclasses.replace(LLAMA31_ROPE, factor=32.0))
LLAMA3_FP16 = dataclasses.replace(LLAMA31, rope_scaling=None)
MQA = dataclasses.replace(LLAMA31, num_kv_heads=1)
# Llama 2's kind (Swallow 7B): one key-value head a query head, theta 10000, no scaling, 4,096 positions.
LLAMA2 = dataclasses.replace(
    LLAMA3_FP16, num_kv_heads=4, head_dim=16, rope_theta=10000.0, rms_norm_eps=1e-6, max_position_embeddings=4096
)
# Qwen3's kind: norms over each head of q and k, theta 1e6, heads of 128 whatever the hidden size.
QWEN3 = dataclasses.replace(LLAMA3_FP16, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, qk_norm=True)
KINDS = {
    "llama31": LLAMA31,
    "llama32_tied": LLAMA32_TIED,
    "llama3_fp16_shards": LLAMA3_FP16,
    "mqa": MQA,
    "llama2": LLAMA2,
    "qwen3": QWEN3,
}
_DTYPES = {"llama3_fp16_shards": "float16", "llama2": "float16", "mqa": "float32"}


def random_params(config: LlamaConfig, seed: int = 0, dtype=jnp.float32) -> llama.Params:
    """Random parameters whose norms are not all one, so that a forgotten norm shows."""
    params = llama.init_params(config, jax.random.key(seed), jnp.float32)
    rng = np.random.default_rng(seed)

    def jitter(path, leaf):
        if not str(path[-1].key).endswith("norm"):
            return leaf.astype(dtype)
        return jnp.asarray(1 + 0.2 * rng.standard_normal(leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(jitter, params)


def model_logits(params, config: LlamaConfig, tokens, compute: Compute = FLOAT32, segments=None, positions=None) -> np.ndarray:
    """Float32 logits [B, T, V] of whole rows."""
    tokens = jnp.asarray(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(_logits(params, config, compute, tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _logits(params, config, compute, tokens, positions, segments):
    hidden, _ = llama.forward(params, config, compute, tokens, positions, segments_BT=segments)
    return llama.logits(params, config, hidden)


def write_checkpoint(folder: Path, kind: str, *, seed: int = 0) -> LlamaConfig:
    """A tiny random checkpoint of one of KINDS: bf16, fp16 in shards, or float32, as the kind says."""
    config = KINDS[kind]
    dtype = _DTYPES.get(kind, "bfloat16")
    params = random_params(config, seed)
    before = hf._SHARD_BYTES
    try:
        hf._SHARD_BYTES = 200_000 if kind == "llama3_fp16_shards" else before
        hf.save(folder, params, config, dtype=dtype)
    finally:
        hf._SHARD_BYTES = before
    return config
