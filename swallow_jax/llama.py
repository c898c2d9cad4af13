"""The Llama family (2, 3, 3.1, 3.2, 3.3, and Qwen3 dense) as small NNX modules whose steps run on a plain pytree of arrays.

Letters: B batch, T query positions, S key positions, D model, N query heads, K key-value heads, G = N/K, H head size,
F feed-forward, V vocabulary, L layers. Weights keep HF's orientation [out, in] and HF's half-split RoPE, so import
and export copy bytes. Every constant comes from the checkpoint's config.json (`hf.read_config`).

One `Block` serves training and decoding: `params["layers"]` holds its leaves stacked over L (scan or a plain loop), or a
list with one dict a layer (`unstack_layers`: one donated KV buffer a layer).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from swallow_jax.attention import RESIDUALS, attend, attend_cached
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
    qk_norm: bool = False  # RMSNorm over each head of q and k before RoPE (Qwen3; hf.FAMILIES says who has it)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same numbers are computed: activation dtype, rematerialisation, loop form, attention backend."""

    dtype: str  # "float32" | "bfloat16": matmul inputs; norms, softmax and logits are float32 either way
    remat: str  # what the backward pass computes again: "none" | "dots" | "attention" | "full", or names of SAVED kept, "q,k,v"
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

        def norm(size: int) -> nnx.Param:
            return nnx.Param(jnp.ones((*stack, size), dtype), axes=(*lead, "norm"))

        damped = (2 * c.num_layers) ** -0.5
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.input_norm = norm(c.hidden_size)
        self.q = weight("heads", queries, "embed", c.hidden_size)
        self.k = weight("kv_heads", keys, "embed", c.hidden_size)
        self.v = weight("kv_heads", keys, "embed", c.hidden_size)
        self.o = weight("embed", c.hidden_size, "heads", queries, damped)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)
        self.post_norm = norm(c.hidden_size)
        self.gate = weight("ffn", c.intermediate_size, "embed", c.hidden_size)
        self.up = weight("ffn", c.intermediate_size, "embed", c.hidden_size)
        self.down = weight("embed", c.hidden_size, "ffn", c.intermediate_size, damped)

    def __call__(self, x_BTD, rope, positions_BT, segments_BT, cache, prefix, backend):
        """One layer, (x, cache); `cache` is None or its (k, v) as in `init_cache`, `prefix` as in `attend_cached`."""
        c = self.config
        B, T, _ = x_BTD.shape
        h_BTD = rms_norm(x_BTD, self.input_norm[...], c.rms_norm_eps)
        q_BTO, k_BTO, v_BTO = _matmuls(h_BTD, self.q[...], self.k[...], self.v[...])
        q_BTNH = q_BTO.reshape(B, T, c.num_heads, c.head_dim)
        k_BTKH = k_BTO.reshape(B, T, c.num_kv_heads, c.head_dim)
        v_BTKH = v_BTO.reshape(B, T, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], c.rms_norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], c.rms_norm_eps)
        q_BTNH, k_BTKH = checkpoint_name(apply_rope(q_BTNH, *rope), "q"), checkpoint_name(apply_rope(k_BTKH, *rope), "k")
        # Query head n reads key-value head n // G: neighbours share one (HF repeat_kv), so K comes first.
        q_BTKGH = q_BTNH.reshape(B, T, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        if cache is None:
            a_BTKGH = attend(
                q_BTKGH,
                k_BTKH,
                checkpoint_name(v_BTKH, "v"),
                q_positions_BT=positions_BT,
                k_positions_BS=positions_BT,
                segments_BT=segments_BT,
                aligned=True,
                backend=backend,
            )
        else:
            rows, slots_BT = jnp.arange(B)[:, None], positions_BT - (0 if prefix is None else prefix[2])
            k_BKHS = cache[0].at[rows, :, :, slots_BT].set(k_BTKH.astype(cache[0].dtype), mode="drop")
            v_BKSH = cache[1].at[rows, :, slots_BT].set(v_BTKH.astype(cache[1].dtype), mode="drop")
            cache = (k_BKHS, v_BKSH)
            a_BTKGH = attend_cached(q_BTKGH, k_BKHS, v_BKSH, slots_BT=slots_BT, prefix=prefix, backend=backend)
        a_BTO = checkpoint_name(a_BTKGH.reshape(B, T, -1), "attention")
        x_BTD = x_BTD + checkpoint_name(_matmul(a_BTO, self.o[...]), "o")
        x_BTD = constrain(x_BTD, ("batch", "seq", "features"))
        h_BTD = rms_norm(x_BTD, self.post_norm[...], c.rms_norm_eps)
        gate_BTF, up_BTF = _matmuls(h_BTD, self.gate[...], self.up[...])
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        x_BTD = x_BTD + _matmul(jax.nn.silu(gate_BTF) * up_BTF, self.down[...])
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
    """Empty KV buffers, one a layer; slot s of a row holds its token at position s (behind a shared prefix: at length + s).

    Keys are [batch, K, H, length], values [batch, K, length, H]: as the two products of decoding read them, so that no step
    transposes them (XLA:CPU: 5.0 against 6.9 ms a step for eight layers of 16 rows, 4 heads of 64 and 192 slots).
    """
    K, H = config.num_kv_heads, config.head_dim
    shapes = {"k": (batch, K, H, length), "v": (batch, K, length, H)}
    return {name: [jnp.zeros(shape, dtype) for _ in range(config.num_layers)] for name, shape in shapes.items()}


def forward(
    params: Params,
    config: LlamaConfig,
    compute: Compute,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    cache: dict[str, list[jax.Array]] | None = None,
    prefix: dict[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, list[jax.Array]] | None]:
    """Hidden states after the final norm, [B, T, D] in `compute.dtype`, and the cache after writing.

    Without a cache: causal attention inside each segment. With one: the token at position p is written to slot p of its
    row (dropped when p >= S) and sees the slots up to p, so right padding in a prefill is harmless: a later step
    overwrites those slots before any query can reach them. `prefix` is what all rows have before their own tokens, stored once:
    {"k": [K, H, P] a layer, "v": [K, P, H] a layer, "length": int32}; position p is then written to slot p - length.
    """
    dtype = jnp.dtype(compute.dtype)
    rope = rope_cos_sin(config, positions_BT)
    if cache is None:
        # Once for all layers: XLA:CPU would fuse the cosines into every use of them (4 % of a training step).
        rope = jax.lax.optimization_barrier(rope)
    x_BTD = constrain(params["embed"][tokens_BT].astype(dtype), ("batch", "seq", "features"))

    def layer(leaves, x_BTD, layer_cache, layer_prefix):
        leaves = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if not _joined(leaf) and leaf.ndim == 2 else leaf, leaves, is_leaf=_joined
        )
        block = nnx.merge(*_block(config, leaves))
        return block(x_BTD, rope, positions_BT, segments_BT, layer_cache, layer_prefix, compute.attention)

    layer = _remat(layer, compute.remat)
    layers = params["layers"]
    if cache is None and compute.scan_layers and not isinstance(layers, list):
        x_BTD, _ = jax.lax.scan(lambda x, leaves: (layer(leaves, x, None, None)[0], None), x_BTD, layers)
    else:
        keys, values = [], []
        if not isinstance(layers, list):
            # One split, whose gradient is one concatenation; that of L slices would be a sum of L padded arrays.
            leaves, tree = jax.tree.flatten(layers)
            pieces = [jax.lax.split(leaf, (1,) * config.num_layers) for leaf in leaves]
            layers = [tree.unflatten([piece[0] for piece in one]) for one in zip(*pieces, strict=True)]
        for i in range(config.num_layers):
            leaves = layers[i]
            shared = None if prefix is None else (prefix["k"][i], prefix["v"][i], prefix["length"])
            x_BTD, kv = layer(leaves, x_BTD, None if cache is None else (cache["k"][i], cache["v"][i]), shared)
            if kv is not None:
                keys.append(kv[0])
                values.append(kv[1])
        cache = None if cache is None else {"k": keys, "v": values}
    return rms_norm(x_BTD, params["norm"], config.rms_norm_eps), cache


def logits(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
    """Float32 scores over the vocabulary, [..., V], from hidden states [..., D]."""
    # The decode form of a tied model has an lm_head too: the embedding, laid out for the product.
    head_VD = params["lm_head"] if "lm_head" in params else params["embed"]
    if callable(head_VD):
        return head_VD(hidden, jnp.float32)
    return jnp.einsum("...D,VD->...V", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with float32 statistics, rounded to x's dtype *before* the weight, as HF's LlamaRMSNorm does."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * x32.astype(x.dtype)


def inverse_frequencies(config: LlamaConfig) -> jax.Array:
    """RoPE's float32 inverse frequencies [H/2], with the llama3 scaling of the checkpoint (applied at all lengths).

    Computed in the order of HF's `_compute_llama3_parameters`, with the power rounded correctly: to the bit what torch computes
    number by number. Its vectorised power (SLEEF, on AVX2 and AVX-512) rounds one number in a hundred the other way, so
    that torch itself gives two answers for one config; tests/test_verify_live.py holds both to that.
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


def train_flops_per_token(config: LlamaConfig, length: int, *, frozen: bool = False) -> float:
    """Model FLOPs of one trained token, forward and backward, with causal attention counted at half.

    Frozen weights (under adapters, whose own FLOPs are left out) get no gradient: a third less.
    """
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * length
    return (4.0 if frozen else 6.0) * parameter_count(config)[1] + attention


def _matmul(x: jax.Array, weight_OI: Any) -> jax.Array:
    if callable(weight_OI):  # no array: a weight that brings its own product, as lora.Adapted does
        return weight_OI(x)
    return jnp.einsum("BTI,OI->BTO", x, weight_OI)


def _matmuls(x: jax.Array, *weights: Any) -> Sequence[jax.Array]:
    """Products of one input with several weights, which the decode form joins into the first (`quant.Matrix`)."""
    return weights[0].split_product(x) if _joined(weights[0]) else [_matmul(x, weight) for weight in weights]


def _joined(weight: Any) -> bool:
    return hasattr(weight, "split_product")


@functools.lru_cache(maxsize=16)
def _block_split(config: LlamaConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(params=0), dtype=jnp.float32)))


def _block(config: LlamaConfig, leaves: Params) -> tuple[Any, Any]:
    graph, state = _block_split(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: replacing in place would leak tracers into the cache
    nnx.replace_by_pure_dict(state, leaves)
    return graph, state


# Arrays of a layer that a rematerialisation policy can keep: q and k with RoPE, what attention returns, the products.
SAVED = ("q", "k", "v", "attention", "o", "gate", "up")


def _remat(layer, policy: str):
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "dots":
        return jax.checkpoint(layer, policy=policies.dots_with_no_batch_dims_saveable)
    # "attention": what an attention kernel needs to go backward, so that its forward pass is not run again.
    names = ("q", "k", "v", RESIDUALS) if policy == "attention" else tuple(policy.split(","))
    if policy != "attention" and set(names) - set(SAVED):
        raise ValueError(f"unknown remat policy {policy!r}; known: none, dots, attention, full, or some of {','.join(SAVED)}")
    return jax.checkpoint(layer, policy=policies.save_only_these_names(*names))
