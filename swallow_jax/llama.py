"""The Llama 3 family (3, 3.1, 3.2, 3.3) as small NNX modules whose steps run on a plain pytree of arrays.

Letters: B batch, T query positions, S key positions, D model, N query heads, K key-value heads, G = N/K, H head size,
F feed-forward, V vocabulary, L layers. Weights keep HF's orientation [out, in] and HF's half-split RoPE, so import
and export copy bytes. Every constant comes from the checkpoint's config.json (`hf.read_config`).

One `Block` serves training and decoding: `params["layers"]` holds its leaves stacked over L (scan or a plain loop), or a
list with one dict a layer (`unstack_layers`: one donated KV buffer a layer).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swallow_jax.attention import attend
from swallow_jax.mesh import constrain

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The llama3 rule: stretch low frequencies by `factor`, keep high ones, blend between (HF rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants of a checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same numbers are computed: activation dtype, rematerialisation, loop form, attention backend."""

    dtype: str  # "float32" | "bfloat16": matmul inputs; norms, softmax and logits are float32 either way
    remat: str  # "none" | "dots" | "full"
    scan_layers: bool  # one compiled layer (scan) or all of them unrolled: scan compiles faster, unrolled runs faster on CPU
    attention: str  # backend: see attention.py


class Block(nnx.Module):
    """One decoder layer. `stack` is () for a single layer or (L,) for leaves stacked over the layers."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any, stack: tuple[int, ...] = ()):
        c = config
        self.config = c
        lead = ("layers",) * len(stack)

        def weight(out_axis: str, out: int, in_axis: str, into: int, scale: float = 1.0) -> nnx.Param:
            # Std 1/sqrt(fan_in); layers that write into the residual stream are damped by 1/sqrt(2L) (GPT-2 section 2.3).
            value = jax.random.normal(rngs.params(), (*stack, out, into), jnp.float32) * (scale * into**-0.5)
            return nnx.Param(value.astype(dtype), axes=(*lead, out_axis, in_axis))

        def norm() -> nnx.Param:
            return nnx.Param(jnp.ones((*stack, c.hidden_size), dtype), axes=(*lead, "norm"))

        damped = (2 * c.num_layers) ** -0.5
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.input_norm = norm()
        self.q = weight("heads", queries, "embed", c.hidden_size)
        self.k = weight("kv_heads", keys, "embed", c.hidden_size)
        self.v = weight("kv_heads", keys, "embed", c.hidden_size)
        self.o = weight("embed", c.hidden_size, "heads", queries, damped)
        self.post_norm = norm()
        self.gate = weight("ffn", c.intermediate_size, "embed", c.hidden_size)
        self.up = weight("ffn", c.intermediate_size, "embed", c.hidden_size)
        self.down = weight("embed", c.hidden_size, "ffn", c.intermediate_size, damped)

    def __call__(self, x_BTD, rope, positions_BT, segments_BT, cache, backend):
        """One layer; `cache` is None or this layer's (k, v), each [B, S, K, H]. Returns (x, cache)."""
        c = self.config
        B, T, _ = x_BTD.shape
        h_BTD = rms_norm(x_BTD, self.input_norm[...], c.rms_norm_eps)
        q_BTNH = _matmul(h_BTD, self.q[...]).reshape(B, T, c.num_heads, c.head_dim)
        k_BTKH = _matmul(h_BTD, self.k[...]).reshape(B, T, c.num_kv_heads, c.head_dim)
        v_BTKH = _matmul(h_BTD, self.v[...]).reshape(B, T, c.num_kv_heads, c.head_dim)
        q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        # Query head n reads key-value head n // G: neighbours share one (HF repeat_kv), so K comes first.
        q_BTKGH = q_BTNH.reshape(B, T, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        fresh = cache is None
        if fresh:
            k_positions_BS = positions_BT
        else:
            rows = jnp.arange(B)[:, None]
            k_BTKH = cache[0].at[rows, positions_BT].set(k_BTKH.astype(cache[0].dtype), mode="drop")
            v_BTKH = cache[1].at[rows, positions_BT].set(v_BTKH.astype(cache[1].dtype), mode="drop")
            cache = (k_BTKH, v_BTKH)
            k_positions_BS = jnp.broadcast_to(jnp.arange(k_BTKH.shape[1]), (B, k_BTKH.shape[1]))
        a_BTKGH = attend(
            q_BTKGH,
            k_BTKH.astype(q_BTKGH.dtype),
            v_BTKH.astype(q_BTKGH.dtype),
            q_positions_BT=positions_BT,
            k_positions_BS=k_positions_BS,
            segments_BT=segments_BT,
            aligned=fresh,
            backend=backend,
        )
        x_BTD = x_BTD + _matmul(a_BTKGH.reshape(B, T, -1), self.o[...])
        x_BTD = constrain(x_BTD, ("batch", "seq", "features"))
        h_BTD = rms_norm(x_BTD, self.post_norm[...], c.rms_norm_eps)
        h_BTF = jax.nn.silu(_matmul(h_BTD, self.gate[...])) * _matmul(h_BTD, self.up[...])
        x_BTD = x_BTD + _matmul(h_BTF, self.down[...])
        return constrain(x_BTD, ("batch", "seq", "features")), cache


class Llama(nnx.Module):
    """The parameters of a whole model: embedding, stacked blocks, final norm and, unless tied, the output head."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any):
        V, D = config.vocab_size, config.hidden_size
        axes = ("vocab", "embed")
        table = jax.random.normal(rngs.params(), (V, D), jnp.float32) * D**-0.5
        self.embed = nnx.Param(table.astype(dtype), axes=axes)
        self.layers = Block(config, rngs=rngs, dtype=dtype, stack=(config.num_layers,))
        self.norm = nnx.Param(jnp.ones((D,), dtype), axes=("norm",))
        if not config.tie_word_embeddings:
            head = jax.random.normal(rngs.params(), (V, D), jnp.float32) * D**-0.5
            self.lm_head = nnx.Param(head.astype(dtype), axes=axes)


def init_params(config: LlamaConfig, key: jax.Array, dtype: Any) -> Params:
    """Random parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(params=key), dtype=dtype), nnx.Param))


def abstract_params(config: LlamaConfig, dtype: Any) -> tuple[Params, Params]:
    """(shapes, logical axes): two trees like the parameters, of ShapeDtypeStruct and of tuples of axis names."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0), dtype=dtype))
    state = nnx.state(model, nnx.Param)
    axes = jax.tree.map(lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def unstack_layers(params: Params) -> Params:
    """The decode form: `params["layers"]` becomes a list with one dict of leaves a layer."""
    if isinstance(params["layers"], list):
        return params
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]}


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> dict[str, list[jax.Array]]:
    """Empty KV buffers, one a layer: [batch, length, K, H]; slot s of a row holds the token at position s."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return {name: [jnp.zeros(shape, dtype) for _ in range(config.num_layers)] for name in ("k", "v")}


def forward(
    params: Params,
    config: LlamaConfig,
    compute: Compute,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    cache: dict[str, list[jax.Array]] | None = None,
) -> tuple[jax.Array, dict[str, list[jax.Array]] | None]:
    """Hidden states after the final norm, [B, T, D] in `compute.dtype`, and the cache after writing.

    Without a cache: causal attention inside each segment. With one: the token at position p is written to slot p of its
    row (dropped when p >= S) and sees the slots up to p, so right padding in a prefill is harmless: a later step
    overwrites those slots before any query can reach them.
    """
    dtype = jnp.dtype(compute.dtype)
    rope = rope_cos_sin(config, positions_BT)
    x_BTD = constrain(params["embed"][tokens_BT].astype(dtype), ("batch", "seq", "features"))

    def layer(leaves, x_BTD, layer_cache):
        leaves = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 2 else leaf, leaves)
        block = nnx.merge(*_block(config, leaves))
        return block(x_BTD, rope, positions_BT, segments_BT, layer_cache, compute.attention)

    layer = _remat(layer, compute.remat)
    layers = params["layers"]
    if cache is None and compute.scan_layers and not isinstance(layers, list):
        x_BTD, _ = jax.lax.scan(lambda x, leaves: (layer(leaves, x, None)[0], None), x_BTD, layers)
    else:
        keys, values = [], []
        for i in range(config.num_layers):
            leaves = layers[i] if isinstance(layers, list) else jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            x_BTD, kv = layer(leaves, x_BTD, None if cache is None else (cache["k"][i], cache["v"][i]))
            if kv is not None:
                keys.append(kv[0])
                values.append(kv[1])
        cache = None if cache is None else {"k": keys, "v": values}
    return rms_norm(x_BTD, params["norm"], config.rms_norm_eps), cache


def logits(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
    """Float32 scores over the vocabulary, [..., V], from hidden states [..., D]."""
    head_VD = params["embed"] if config.tie_word_embeddings else params["lm_head"]
    return jnp.einsum("...D,VD->...V", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with float32 statistics, rounded to x's dtype *before* the weight, as HF's LlamaRMSNorm does."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * x32.astype(x.dtype)


def inverse_frequencies(config: LlamaConfig) -> jax.Array:
    """RoPE's float32 inverse frequencies [H/2], with the llama3 scaling of the checkpoint (applied at all lengths).

    Computed in the order of HF's `_compute_llama3_parameters`, so that the bits agree; the power is taken in float64 and
    rounded, since numpy's float32 power is off by one bit where torch's is not.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1) / np.power(config.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    s = config.rope_scaling
    if s is not None:
        low = s.original_max_position_embeddings / s.low_freq_factor
        high = s.original_max_position_embeddings / s.high_freq_factor
        # torch divides a number by a tensor as reciprocal times number; the last bit follows.
        wavelength = np.float32(1) / inv_freq * np.float32(2 * math.pi)
        slow = np.where(wavelength > low, inv_freq / np.float32(s.factor), inv_freq)
        rotations = np.float32(1) / wavelength * np.float32(s.original_max_position_embeddings)
        smooth = (rotations - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
        blend = (1 - smooth) * slow / np.float32(s.factor) + smooth * slow
        inv_freq = np.where((wavelength >= high) & (wavelength <= low), blend, slow).astype(np.float32)
    return jnp.asarray(inv_freq)


def rope_cos_sin(config: LlamaConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 cosines and sines [B, T, H/2] (angles in bfloat16 would collide past position 256)."""
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTXH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of each head (HF layout: dimension i pairs with i + H/2), in float32."""
    first, second = jnp.split(x_BTXH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTXH.dtype)


def parameter_count(config: LlamaConfig) -> tuple[int, int]:
    """(all parameters, those that take part in matmuls: all but an untied input embedding)."""
    shapes, _ = abstract_params(config, jnp.float32)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return total, total - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def train_flops_per_token(config: LlamaConfig, length: int) -> float:
    """Model FLOPs of one trained token, forward and backward, with causal attention counted at half."""
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * length
    return 6.0 * parameter_count(config)[1] + attention


def _matmul(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    return jnp.einsum("BTI,OI->BTO", x, weight_OI)


@functools.lru_cache(maxsize=16)
def _block_split(config: LlamaConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(params=0), dtype=jnp.float32)))


def _block(config: LlamaConfig, leaves: Params) -> tuple[Any, Any]:
    graph, state = _block_split(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: replacing in place would leak tracers into the cache
    nnx.replace_by_pure_dict(state, leaves)
    return graph, state


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "dots":
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"unknown remat policy {policy!r}; known: none, dots, full")
