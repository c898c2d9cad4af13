"""Log-probabilities of the tokens of one given text, and the likeliest token at each place: what a server's `echo` tells.

Letters: T positions that run together, K likeliest tokens told, X positions whose scores exist at once, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import llama
from swallow_jax.generate.scorer import padded
from swallow_jax.generate.steps import cache_dtype, decode_form

_PIECE = 1024  # positions that run together
_SCORES = 1 << 24  # float32 scores that exist at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """For n tokens: of each but the first its log-probability, and behind each the K likeliest next tokens, best first."""

    logprobs: np.ndarray  # [n - 1]
    top_ids: np.ndarray  # [n, K]
    top_logprobs: np.ndarray  # [n, K]; that of a token which is given next is equal to its `logprobs` to the bit


class Echo:
    """Runs one text at a time, in pieces, so that neither its length nor the vocabulary decides what must exist at once."""

    def __init__(self, params: dict[str, Any], config: llama.LlamaConfig, compute: llama.Compute):
        self.config, self.compute = config, dataclasses.replace(compute, remat="none", scan_layers=False)
        self.params = decode_form(params, compute.dtype)

    def __call__(self, ids: Sequence[int], *, top: int) -> Told:
        """Scores of `ids` (at least one; all below the vocabulary's size), with the `top` >= 1 likeliest tokens."""
        n = len(ids)
        T = min(_PIECE, padded(n, 32))
        length = -(-n // T) * T
        tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
        tokens[:n], targets[: n - 1] = ids, ids[1:]
        cache = llama.init_cache(self.config, 1, length, cache_dtype(self.compute))
        parts = []
        for first in range(0, length, T):
            span = slice(first, first + T)
            cache, *part = _piece(
                self.params, cache, tokens[span], targets[span], np.int32(first),
                config=self.config, compute=self.compute, top=min(top, self.config.vocab_size),
            )  # fmt: skip
            parts.append(part)
        logprobs, top_ids, top_logprobs = (np.concatenate([np.asarray(p) for p in pieces]) for pieces in zip(*parts, strict=True))
        if not np.all(np.isfinite(logprobs[:n])):
            raise ValueError("the model's scores are not finite; check the weights")
        return Told(logprobs=logprobs[: n - 1], top_ids=top_ids[:n], top_logprobs=top_logprobs[:n])


@functools.partial(jax.jit, static_argnames=("config", "compute", "top"), donate_argnames=("cache",))
def _piece(params, cache, tokens_T, targets_T, first, *, config, compute, top):
    T = tokens_T.shape[0]
    positions_1T = first + jnp.arange(T)[None]
    hidden_1TD, cache = llama.forward(params, config, compute, tokens_T[None], positions_1T, cache=cache)
    X = min(T, max(1, _SCORES // config.vocab_size))
    fill = -T % X

    def block(given):
        hidden_XD, targets_X = given
        logits_XV = llama.logits(params, config, hidden_XD)
        logprobs_XV = logits_XV - jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True)
        if top == 1:  # top_k sorts on some platforms
            ids_XK = jnp.argmax(logprobs_XV, axis=-1)[:, None]
        else:
            ids_XK = jax.lax.top_k(logprobs_XV, top)[1]
        told_XK = jnp.take_along_axis(logprobs_XV, ids_XK, axis=-1)
        return jnp.take_along_axis(logprobs_XV, targets_X[:, None], axis=-1)[:, 0], ids_XK, told_XK

    blocks = jnp.pad(hidden_1TD[0], ((0, fill), (0, 0))).reshape(-1, X, hidden_1TD.shape[-1])
    logprobs, ids, told = jax.lax.map(block, (blocks, jnp.pad(targets_T, (0, fill)).reshape(-1, X)))
    return cache, logprobs.reshape(-1)[:T], ids.reshape(-1, ids.shape[-1])[:T], told.reshape(-1, told.shape[-1])[:T]
