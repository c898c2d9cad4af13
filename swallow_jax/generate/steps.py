"""The compiled programs of the sampler: prefill a prompt, put it into a slot, draw its first token, decode a chunk.

Letters: B slots, T prompt positions of one call, S cache length, V vocabulary, N steps of a chunk. All of a sequence's
settings are arrays, so no setting compiles anything anew.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import llama, quant
from swallow_jax.generate import sampling

Arrays = dict[str, Any]
PREFIXES = 4  # shared prefixes kept on the device
NO_TOKEN = -1  # what a row that has ended reports
_JOINED = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def decode_form(params: Arrays, dtype: str, *, int8: bool = False, device: Any = None) -> Arrays:
    """Layers unstacked and matrices laid out for decoding (`quant.Matrix`), so that no step converts or packs them again.

    On a CPU they are float32 whatever the dtype (the same numbers, without a conversion in each step); with int8 all but the
    embedding's rows are 8 bits wide. `device` is where they go, leaf by leaf, from wherever they are. Weights sharded
    over several devices keep their arrays. Parameters in this form already are returned as they are.
    """
    layers = params["layers"]
    if isinstance(layers, list) and isinstance(layers[0]["q"], quant.Matrix):
        return params
    if any(callable(weight) for weight in (layers[0] if isinstance(layers, list) else layers).values()):
        raise ValueError("the parameters carry an adapter; merge it (lora.merge) before decoding")
    params = llama.unstack_layers(params)
    if len(params["embed"].sharding.device_set) > 1:
        if int8:
            raise ValueError("int8 weights are for one device; the parameters are sharded over several")
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 2 else leaf, params)
    place = functools.partial(jax.device_put, device=device) if device is not None else lambda leaf: leaf
    cpu = (device or jax.devices()[0]).platform == "cpu"

    def matrix(*weights: jax.Array) -> quant.Matrix:
        # Rounded to the compute dtype first: the CPU's float32 copies are to hold the same numbers.
        weights = [weight.astype(dtype) for weight in weights]
        return place(quant.matrix(weights, dtype=jnp.float32 if cpu else dtype, int8=int8, cpu=cpu))

    def layer(leaves: Arrays) -> Arrays:
        made = {name: place(leaf) for name, leaf in leaves.items() if leaf.ndim == 1}
        for first, *rest in _JOINED:
            made[first] = matrix(leaves[first], *(leaves[name] for name in rest))
            made |= {name: quant.Joined() for name in rest}
        return made

    head = params["lm_head"] if "lm_head" in params else params["embed"]
    return {
        "embed": place(params["embed"].astype(dtype)),
        "layers": [layer(leaves) for leaves in params["layers"]],
        "norm": place(params["norm"]),
        "lm_head": matrix(head),
    }


def cache_dtype(compute: llama.Compute) -> Any:
    """Of keys and values: the compute dtype, but float32 on a CPU, whose bfloat16 products convert their operands."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else compute.dtype)


def empty_state(slots: int) -> Arrays:
    """What the device knows of each slot; `tokens` is the last token drawn, `positions` where it will stand."""
    kinds = {
        "tokens": jnp.int32, "positions": jnp.int32, "budgets": jnp.int32, "alive": jnp.bool_, "seeds": jnp.uint32,
        "temperatures": jnp.float32, "top_ks": jnp.int32, "top_ps": jnp.float32,
    }  # fmt: skip
    return {name: jnp.zeros(slots, kind) for name, kind in kinds.items()}


@functools.partial(jax.jit, static_argnames=("config", "compute", "slots"), donate_argnames=("cache",))
def prefill(params, tokens_1T, start, last, cache, prefix, *, config, compute, slots):
    """Run T tokens of one prompt, the first at position `start` behind the shared prefix (or None), into a cache of `slots`
    (None: an empty one is made): the cache and the scores after token `last` of these, [1, V]."""
    if cache is None:
        cache = llama.init_cache(config, 1, slots, cache_dtype(compute))
    first = start if prefix is None else prefix["length"] + start
    positions_1T = first + jnp.arange(tokens_1T.shape[1])[None]
    hidden_1TD, cache = llama.forward(params, config, compute, tokens_1T, positions_1T, cache=cache, prefix=prefix)
    last_1D = jax.lax.dynamic_slice_in_dim(hidden_1TD, last, 1, axis=1)[:, 0]
    return cache, llama.logits(params, config, last_1D)


@dataclasses.dataclass
class Prompts:
    """Prefills prompts in pieces of the largest bucket and a last one in its own; every shape is a function of the prompt
    (and, through `slots`, of its budget) alone."""

    params: Arrays
    config: llama.LlamaConfig
    compute: llama.Compute
    buckets: tuple[int, ...]
    _prefixes: dict[tuple[int, ...], Arrays] = dataclasses.field(default_factory=dict)

    def run(self, ids: Sequence[int], prefix: Arrays | None, *, slots: int) -> tuple[Arrays, jax.Array]:
        """A prompt's cache, no longer than `slots`, and the scores after it, [1, V]."""
        piece, cache = self.buckets[-1], None
        slots = min(slots, self._bucket(len(ids))) if len(ids) <= piece else slots
        for first in range(0, len(ids), piece):
            part = ids[first : first + piece]
            tokens_1T = np.zeros((1, min(self._bucket(len(part)), slots)), np.int32)
            tokens_1T[0, : len(part)] = part
            cache, logits_1V = prefill(
                self.params, tokens_1T, np.int32(first), np.int32(len(part) - 1), cache, prefix,
                config=self.config, compute=self.compute, slots=slots,
            )  # fmt: skip
        return cache, logits_1V

    def prefix(self, ids: Sequence[int]) -> Arrays:
        """Keys and values of a shared prefix, as `llama.forward` takes them; the last few stay on the device."""
        ids = tuple(ids)
        found = self._prefixes.pop(ids, None)
        if found is None:
            if len(self._prefixes) == PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            cache, _ = self.run(ids, None, slots=-(-len(ids) // self.buckets[-1]) * self.buckets[-1])
            found = {name: [leaf[0] for leaf in leaves] for name, leaves in cache.items()} | {"length": np.int32(len(ids))}
        self._prefixes[ids] = found  # the last one used stands last
        return found

    def _bucket(self, n: int) -> int:
        return next(b for b in self.buckets if b >= n)


def power_of_two_buckets(longest: int, smallest: int = 32) -> tuple[int, ...]:
    """smallest, 2 smallest, ... and `longest` itself."""
    buckets = []
    while smallest < longest:
        buckets.append(smallest)
        smallest *= 2
    return (*buckets, longest)


@functools.partial(jax.jit, donate_argnames=("cache",))
def insert(cache, prompt, slot):
    """Copy a prompt's KV into a slot. What the slot held beyond the prompt stays: the new sequence overwrites a position
    before it can attend to it."""
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (slot, 0, 0, 0)), cache, prompt)


@functools.partial(jax.jit, donate_argnames=("state",))
def start(state, logits_1V, slot, row, stop_ids):
    """Draw a sequence's first token from its prompt's scores and set up its slot: (state, tokens [1, 1], logprobs [1, 1])."""
    one = {name: value[None] for name, value in row.items()}
    tokens_1, logprobs_1 = sampling.sample(
        logits_1V, one["seed"], one["position"], one["temperature"], one["top_k"], one["top_p"]
    )
    new = {
        "tokens": tokens_1[0], "positions": row["position"], "budgets": row["budget"] - 1, "seeds": row["seed"],
        "alive": (row["budget"] > 1) & ~jnp.any(tokens_1[0] == stop_ids),
        "temperatures": row["temperature"], "top_ks": row["top_k"], "top_ps": row["top_p"],
    }  # fmt: skip
    state = {name: state[name].at[slot].set(new[name]) for name in state}
    return state, tokens_1[:, None], logprobs_1[:, None]


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """What makes a row's bits on a CPU independent of the number of rows; None where XLA does not know it.

    XLA:CPU hands a sum to its kernel library when there are enough of them, which adds in another order (2 and 16 rows of an
    RMSNorm differ in the last bit); restricted to matrix products (JAX 0.10), or without it (from JAX 0.11 on its products, too,
    depend on the number of rows), every number of rows takes the same path. tests/test_engine.py asks each version.
    """
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if jax.__version_info__ < (0, 11) else ""
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


@functools.cache
def decode_program() -> Any:
    """`_decode`, compiled so that a row's bits do not depend on the number of rows."""
    static, donated = ("config", "compute", "chunk"), ("state", "cache")
    return jax.jit(_decode, static_argnames=static, donate_argnames=donated, compiler_options=compiler_options())


def _decode(params, state, cache, prefix, stop_ids, *, config, compute, chunk):
    """`chunk` steps for all slots: (state, cache, tokens_BN, logprobs_BN); a row that has ended reports NO_TOKEN."""

    def step(carry, _):
        state, cache = carry
        alive_B = state["alive"]
        hidden_B1D, cache = llama.forward(
            params, config, compute, state["tokens"][:, None], state["positions"][:, None], cache=cache, prefix=prefix
        )
        drawn_B, logprobs_B = sampling.sample(
            llama.logits(params, config, hidden_B1D[:, 0]),
            state["seeds"], state["positions"] + 1,
            jnp.where(alive_B, state["temperatures"], 0.0), state["top_ks"], state["top_ps"],
        )  # fmt: skip
        budgets_B = state["budgets"] - alive_B
        stopped_B = jnp.any(drawn_B[:, None] == stop_ids[None], axis=-1)
        state = state | {
            # A row that has ended repeats its last step: the same token at the same position.
            "tokens": jnp.where(alive_B, drawn_B, state["tokens"]),
            "positions": state["positions"] + alive_B,
            "budgets": budgets_B,
            "alive": alive_B & (budgets_B > 0) & ~stopped_B,
        }
        return (state, cache), (jnp.where(alive_B, drawn_B, NO_TOKEN), jnp.where(alive_B, logprobs_B, 0.0))

    # A static trip count: XLA:GPU then loops without asking the host whether to go on.
    (state, cache), (tokens_NB, logprobs_NB) = jax.lax.scan(step, (state, cache), length=chunk)
    return state, cache, tokens_NB.T, logprobs_NB.T
