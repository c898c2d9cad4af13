"""Log-likelihood of several continuations of one context: prefill only, the context computed and stored once.

A prefix that many questions have in common (a few-shot block) is computed and stored once too, and a long context is run in
pieces, so that what exists at once is bounded.

Letters: R requests of a batch, C continuations of a request, T context positions, U continuation positions (both padded
to a bucket), D model, V vocabulary.

The context's last position predicts the first token of every continuation, so closed sets of one-token answers need no
second pass. For the rest the continuations take turns behind the context in one KV buffer: each overwrites the slots of
the one before, and a query sees only slots up to its own position. Nothing is copied C times.
"""

import collections
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import llama
from swallow_jax.generate.steps import Prompts, cache_dtype, decode_form, power_of_two_buckets

_PIECE = 1024  # positions of a context that run together
_LOGITS_BLOCK = 1 << 24  # float32 scores that exist at once: 64 MiB, 128 positions at V = 128k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A context and its possible continuations, all as token ids. `name` is handed back with the answer.

    The first `prefix` tokens of the context are common to many questions: computed once, stored once.
    """

    name: Hashable
    context_ids: Sequence[int]
    continuations: Sequence[Sequence[int]]
    prefix: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One entry a continuation: summed log-probability, whether greedy decoding would give it, number of its tokens."""

    name: Hashable
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]


class Scorer:
    """Scores a stream of questions, several of one padded shape at a time.

    Args:
      params: the parameters, layers stacked or not; matrices are cast to `compute.dtype` once.
      max_length: context (behind its shared prefix) and continuation together may not be longer.
      tokens_per_batch: padded tokens scored together; memory against speed. A question's shapes follow from the question
        alone, so its company changes nothing but, at most, the last float32 bits.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: llama.LlamaConfig,
        compute: llama.Compute,
        *,
        max_length: int,
        tokens_per_batch: int,
    ):
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch}: at least 1 is wanted")
        self.config = config
        self.compute = dataclasses.replace(compute, remat="none", scan_layers=False)
        self.params = decode_form(params, compute.dtype)
        self.max_length, self.tokens_per_batch = max_length, tokens_per_batch
        self._prompts = Prompts(self.params, config, self.compute, power_of_two_buckets(_PIECE))

    def score(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answers in order of completion. Raises ValueError, with the numbers, for what does not fit."""
        # One batch holds questions of one padded shape and one prefix.
        waiting: dict[tuple[tuple[int, int, int], tuple[int, ...]], list[Question]] = collections.defaultdict(list)
        unread: collections.deque = collections.deque()
        for question in questions:
            key = self._shape(question), tuple(question.context_ids[: question.prefix])
            group = waiting[key]
            group.append(question)
            if len(group) == self._rows(key[0]):
                unread.append(self._dispatch(waiting.pop(key), *key))
            while len(unread) > 1:  # the next batch is being computed while this one is read
                yield from _read(*unread.popleft())
        for key, group in waiting.items():
            unread.append(self._dispatch(group, *key))
            yield from _read(*unread.popleft())
        for batch in unread:
            yield from _read(*batch)

    def _shape(self, question: Question) -> tuple[int, int, int]:
        """(T, U, C) of a question."""
        n, lengths = len(question.context_ids) - question.prefix, [len(c) for c in question.continuations]
        if not question.context_ids:
            raise ValueError(f"{question.name}: the context is empty; begin it with the BOS token")
        if question.prefix < 0 or n < 1:
            raise ValueError(
                f"{question.name}: prefix={question.prefix} of {n + question.prefix} tokens; at least one must follow"
            )
        if not lengths or min(lengths) == 0:
            raise ValueError(f"{question.name}: continuations of {lengths} tokens; at least one each is wanted")
        if n + max(lengths) > self.max_length:
            raise ValueError(
                f"{question.name}: a context of {n} and a continuation of {max(lengths)} tokens do not fit "
                f"max_length={self.max_length}; shorten one or raise max_length"
            )
        T = padded(n, 32) if n <= _PIECE else -(-n // _PIECE) * _PIECE
        return T, 0 if max(lengths) == 1 else padded(max(lengths) - 1, 8), len(lengths)

    def _rows(self, shape: tuple[int, int, int]) -> int:
        return max(1, self.tokens_per_batch // (shape[0] + shape[1]))

    def _dispatch(self, group: list[Question], shape: tuple[int, int, int], prefix_ids: tuple[int, ...]):
        T, U, C = shape
        R = self._rows(shape)
        context_RT, lengths_R = np.zeros((R, T), np.int32), np.ones(R, np.int32)
        tokens_CRU, counts_CR = np.zeros((C, R, U + 1), np.int32), np.zeros((C, R), np.int32)
        for r, question in enumerate(group):
            own = question.context_ids[question.prefix :]
            lengths_R[r] = len(own)
            context_RT[r, : len(own)] = own
            for c, continuation in enumerate(question.continuations):
                counts_CR[c, r] = len(continuation)
                tokens_CRU[c, r, : len(continuation)] = continuation
        scores = _score(
            self.params, context_RT, lengths_R, tokens_CRU, counts_CR, self._prompts.prefix(prefix_ids) if prefix_ids else None,
            config=self.config, compute=self.compute,
        )  # fmt: skip
        return group, scores, counts_CR


def padded(n: int, smallest: int) -> int:
    """The least of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...) that holds n: few shapes, a third of padding at most."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def token_scores(params, config, hidden_ND, targets_N) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, whether it is the most likely token), without ever holding [N, V]."""
    N = hidden_ND.shape[0]
    block = min(N, max(1, _LOGITS_BLOCK // config.vocab_size))
    fill = -N % block

    def one(block):
        hidden_XD, targets_X = block
        logits_XV = llama.logits(params, config, hidden_XD[None])[0]
        chosen_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=-1)[:, 0]
        return chosen_X - jax.nn.logsumexp(logits_XV, axis=-1), jnp.argmax(logits_XV, axis=-1) == targets_X

    blocks = (
        jnp.pad(hidden_ND, ((0, fill), (0, 0))).reshape(-1, block, hidden_ND.shape[1]),
        jnp.pad(targets_N, (0, fill)).reshape(-1, block),
    )
    logprobs, greedy = jax.lax.map(one, blocks)
    return logprobs.reshape(-1)[:N], greedy.reshape(-1)[:N]


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _score(params, context_RT, lengths_R, tokens_CRU, counts_CR, prefix, *, config, compute):
    """(sums of log-probabilities [C, R], whether all tokens are greedy [C, R])."""
    R, T = context_RT.shape
    U = tokens_CRU.shape[-1] - 1
    cache = llama.init_cache(config, R, T + U, cache_dtype(compute))
    before = 0 if prefix is None else prefix["length"]
    size = min(T, _PIECE)

    def piece(carry, given):
        cache, last_RD = carry
        tokens_RT, first = given
        positions_RT = jnp.broadcast_to(before + first + jnp.arange(size), (R, size))
        hidden_RTD, cache = llama.forward(params, config, compute, tokens_RT, positions_RT, cache=cache, prefix=prefix)
        at_R = lengths_R - 1 - first
        found_RD = jnp.take_along_axis(hidden_RTD, jnp.clip(at_R, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return (cache, jnp.where(((at_R >= 0) & (at_R < size))[:, None], found_RD, last_RD)), None

    pieces = context_RT.reshape(R, -1, size).swapaxes(0, 1), jnp.arange(0, T, size)
    nothing_RD = jnp.zeros((R, config.hidden_size), jnp.dtype(compute.dtype))
    (cache, last_RD), _ = jax.lax.scan(piece, (cache, nothing_RD), pieces)
    logits_RV = llama.logits(params, config, last_RD)
    logprobs_RV = logits_RV - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    first_CR = tokens_CRU[:, :, 0]
    sums_CR = jnp.take_along_axis(logprobs_RV, first_CR.T, axis=-1).T
    greedy_CR = first_CR == jnp.argmax(logits_RV, axis=-1)[None]
    if U == 0:
        return sums_CR, greedy_CR

    def continuation(cache, given):
        tokens_RU, counts_R = given
        positions_RU = before + lengths_R[:, None] + jnp.arange(U)[None]
        hidden_RUD, cache = llama.forward(params, config, compute, tokens_RU[:, :-1], positions_RU, cache=cache, prefix=prefix)
        logprobs, greedy = token_scores(params, config, hidden_RUD.reshape(R * U, -1), tokens_RU[:, 1:].reshape(R * U))
        real_RU = jnp.arange(1, U + 1)[None] < counts_R[:, None]
        sums_R = jnp.sum(jnp.where(real_RU, logprobs.reshape(R, U), 0.0), axis=-1)
        return cache, (sums_R, jnp.all(greedy.reshape(R, U) | ~real_RU, axis=-1))

    _, (more_CR, rest_CR) = jax.lax.scan(continuation, cache, (tokens_CRU, counts_CR))
    return sums_CR + more_CR, greedy_CR & rest_CR


def _read(group: list[Question], scores: tuple[jax.Array, jax.Array], counts_CR: np.ndarray) -> Iterator[Answer]:
    sums_CR, greedy_CR = (np.asarray(x) for x in scores)
    for r, question in enumerate(group):
        if not np.all(np.isfinite(sums_CR[:, r])):
            raise ValueError(f"{question.name}: the model's scores are not finite; check the weights")
        yield Answer(
            name=question.name,
            logprobs=tuple(sums_CR[:, r].tolist()),
            greedy=tuple(greedy_CR[:, r].tolist()),
            tokens=tuple(counts_CR[:, r].tolist()),
        )
