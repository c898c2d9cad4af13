"""The in-process sampler: static slots, prefill into a slot, decoding in chunks of a fixed number of steps.

Letters: B slots, T prompt positions (a bucket's length), S cache length, V vocabulary, N steps of a chunk.

A request's tokens depend on the request alone, not on its slot, its company or the order of the queue: a prompt is
prefilled alone, in a bucket chosen by its own length; a decoded row of a matrix product does not depend on the other
rows while the shape is fixed (that is why there are at least two slots: one row takes another path in XLA); the noise of
a draw is keyed by (seed, position). The host never waits for a token before it starts the next chunk: what has stopped
in the meantime runs on as a masked row, and its slot is refilled one chunk later.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swallow_jax import llama
from swallow_jax.generate import sampling

Arrays = dict[str, Any]
_NO_TOKEN = -1  # what a row that has ended reports


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence to generate. `name` is handed back with the output."""

    name: Hashable
    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    # Called with the tokens that have newly arrived, in order; returns after how many of them the sequence is complete
    # (stop strings), or None. It must be a function of the tokens alone, however they are cut into pieces.
    until: Callable[[list[int]], int | None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Generated tokens (a stop token included, if one came) with the model's own log-probability of each."""

    name: Hashable
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": a stop token or `until`; "length": the budget was spent


class _Sequence:
    """The host's book-keeping of one running job."""

    def __init__(self, job: Job):
        self.job = job
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.dispatched = 0  # tokens that the programs dispatched so far will bring, at most
        self.done = False


class Engine:
    """Generates for a stream of jobs with one compiled decode program and one prefill program a bucket.

    Args:
      params: the parameters, layers stacked or not; matrices are cast to `compute.dtype` once.
      slots: sequences decoded together, at least 2.
      max_length: cache length; a job's prompt and budget must fit.
      chunk: decode steps a dispatch. More steps mean fewer round trips to the host, and more wasted steps at the end of a
        sequence. Neither it nor `slots` changes a token.
      stop_ids: tokens that end a sequence.
      prefill_buckets: padded prompt lengths, ascending; powers of two up to `max_length` if not given.
    """

    def __init__(
        self,
        params: Arrays,
        config: llama.LlamaConfig,
        compute: llama.Compute,
        *,
        slots: int,
        max_length: int,
        chunk: int,
        stop_ids: Sequence[int],
        prefill_buckets: Sequence[int] | None = None,
    ):
        if slots < 2:
            raise ValueError(f"slots={slots}: at least 2, or a token could depend on how many run together")
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one step")
        self.config = config
        self.compute = dataclasses.replace(compute, remat="none", scan_layers=False)
        self.params = decode_form(params, compute.dtype)
        self.slots, self.max_length, self.chunk = slots, max_length, chunk
        self.buckets = tuple(prefill_buckets or power_of_two_buckets(max_length))
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] > max_length:
            raise ValueError(f"prefill_buckets={self.buckets}: ascending and at most max_length={max_length} are wanted")
        self._stop_ids = np.asarray(sorted(set(stop_ids)) or [_NO_TOKEN - 1], np.int32)

    def check(self, job: Job) -> None:
        """Raises ValueError, with the numbers, for a job that this engine cannot run."""
        n = len(job.prompt_ids)
        if n == 0:
            raise ValueError(f"{job.name}: the prompt is empty; begin it with the BOS token")
        if job.max_new_tokens < 1:
            raise ValueError(f"{job.name}: max_new_tokens={job.max_new_tokens}, at least 1 is wanted")
        if n > self.buckets[-1] or n + job.max_new_tokens > self.max_length:
            raise ValueError(
                f"{job.name}: a prompt of {n} tokens and max_new_tokens={job.max_new_tokens} do not fit max_length="
                f"{self.max_length} (longest prefill bucket {self.buckets[-1]}); shorten one or raise the other"
            )
        if job.temperature < 0 or job.top_k < 0 or not 0 < job.top_p <= 1 or not 0 <= job.seed < 2**32:
            raise ValueError(
                f"{job.name}: temperature={job.temperature} (>= 0), top_k={job.top_k} (>= 0; 0 keeps all), top_p={job.top_p} "
                f"(0 < p <= 1), seed={job.seed} (0 <= seed < 2^32): outside the range in brackets"
            )

    def generate(self, jobs: Iterable[Job]) -> Iterator[Output]:
        """Outputs in order of completion. Jobs are taken from the iterable as slots fall free."""
        source = iter(jobs)
        cache = llama.init_cache(self.config, self.slots, self.max_length, jnp.dtype(self.compute.dtype))
        state = _empty_state(self.slots)
        rows: list[_Sequence | None] = [None] * self.slots
        # Dispatched and not yet read: (tokens [B or 1, N], log-probabilities, which sequence each row belongs to).
        unread: collections.deque[tuple[jax.Array, jax.Array, list[_Sequence | None]]] = collections.deque()
        exhausted = False
        while True:
            for slot in range(self.slots):
                if exhausted or rows[slot] is not None:
                    continue
                job = next(source, None)
                if job is None:
                    exhausted = True
                    break
                self.check(job)
                rows[slot] = sequence = _Sequence(job)
                state, cache, tokens, logprobs = self._admit(state, cache, slot, job)
                unread.append((tokens, logprobs, [sequence]))
                sequence.dispatched = 1
            if any(self._open(sequence) for sequence in rows):
                state, cache, tokens, logprobs = _decode(
                    self.params, state, cache, self._stop_ids, config=self.config, compute=self.compute, chunk=self.chunk
                )
                unread.append((tokens, logprobs, list(rows)))
                for sequence in filter(None, rows):
                    sequence.dispatched += self.chunk
            elif not unread:
                return
            # A slot whose budget is on its way needs no news from the device to be refilled.
            rows = [sequence if self._open(sequence) else None for sequence in rows]
            # Read all but the chunk just dispatched; if nothing is left to dispatch, read that too.
            waiting = 0 if exhausted and not any(rows) else 1
            while len(unread) > waiting:
                yield from self._read(*unread.popleft())
            rows = [sequence if self._open(sequence) else None for sequence in rows]

    def _open(self, sequence: _Sequence | None) -> bool:
        """Whether a sequence may still need tokens beyond those dispatched."""
        return sequence is not None and not sequence.done and sequence.dispatched < sequence.job.max_new_tokens

    def _admit(self, state: Arrays, cache: Arrays, slot: int, job: Job):
        n = len(job.prompt_ids)
        bucket = next(b for b in self.buckets if b >= n)
        tokens_1T = np.zeros((1, bucket), np.int32)
        tokens_1T[0, :n] = job.prompt_ids
        prompt, logits_1V = _prefill(self.params, tokens_1T, np.int32(n), config=self.config, compute=self.compute)
        row = {
            "position": np.int32(n), "budget": np.int32(job.max_new_tokens), "seed": np.uint32(job.seed),
            "temperature": np.float32(job.temperature), "top_k": np.int32(min(job.top_k, 2**31 - 1)),
            "top_p": np.float32(job.top_p),
        }  # fmt: skip
        cache = _insert(cache, prompt, np.int32(slot))
        state, tokens, logprobs = _start(state, logits_1V, np.int32(slot), row, self._stop_ids)
        return state, cache, tokens, logprobs

    def _read(self, tokens: jax.Array, logprobs: jax.Array, rows: list[_Sequence | None]) -> Iterator[Output]:
        """Hand a chunk's tokens (waits for them) to their sequences and yield those that are complete."""
        tokens_BN, logprobs_BN = np.asarray(tokens), np.asarray(logprobs)
        for b, sequence in enumerate(rows):
            if sequence is None or sequence.done:
                continue
            job, count = sequence.job, int(np.sum(tokens_BN[b] != _NO_TOKEN))
            new = tokens_BN[b, :count].tolist()
            if not np.all(np.isfinite(logprobs_BN[b, :count])):
                raise ValueError(f"{job.name}: the model's scores are not finite after {len(sequence.tokens)} tokens")
            end = job.until(new) if job.until else None
            sequence.tokens += new[:end]
            sequence.logprobs += logprobs_BN[b, :count].tolist()[:end]
            stopped = end is not None or (count > 0 and new[-1] in self._stop_ids)
            if stopped or len(sequence.tokens) >= job.max_new_tokens:
                sequence.done = True
                yield Output(
                    name=job.name,
                    tokens=sequence.tokens,
                    logprobs=sequence.logprobs,
                    finish_reason="stop" if stopped else "length",
                )


def power_of_two_buckets(max_length: int, smallest: int = 32) -> tuple[int, ...]:
    """smallest, 2 smallest, ... and `max_length` itself."""
    buckets = []
    while smallest < max_length:
        buckets.append(smallest)
        smallest *= 2
    return (*buckets, max_length)


def decode_form(params: Arrays, dtype: str) -> Arrays:
    """Layers unstacked and matrices in the compute dtype, so that no step converts them again (norms stay: they are 1-D)."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 2 else leaf, llama.unstack_layers(params))


def _empty_state(slots: int) -> Arrays:
    """What the device knows of each slot; `tokens` is the last token drawn, `positions` the slot it will be written to."""
    kinds = {
        "tokens": jnp.int32, "positions": jnp.int32, "budgets": jnp.int32, "alive": jnp.bool_, "seeds": jnp.uint32,
        "temperatures": jnp.float32, "top_ks": jnp.int32, "top_ps": jnp.float32,
    }  # fmt: skip
    return {name: jnp.zeros(slots, kind) for name, kind in kinds.items()}


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _prefill(params, tokens_1T, length, *, config, compute):
    """The KV rows of one prompt, [1, T, K, H] a layer, and the scores after its last token, [1, V]."""
    T = tokens_1T.shape[1]
    cache = llama.init_cache(config, 1, T, jnp.dtype(compute.dtype))
    hidden_1TD, cache = llama.forward(params, config, compute, tokens_1T, jnp.arange(T)[None], cache=cache)
    last_1D = jax.lax.dynamic_slice_in_dim(hidden_1TD, length - 1, 1, axis=1)[:, 0]
    return cache, llama.logits(params, config, last_1D)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _insert(cache, prompt, slot):
    """Copy a prompt's KV into a slot. What the slot held beyond the prompt stays: the new sequence overwrites a position
    before it can attend to it."""
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (slot, 0, 0, 0)), cache, prompt)


@functools.partial(jax.jit, donate_argnames=("state",))
def _start(state, logits_1V, slot, row, stop_ids):
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


@functools.partial(jax.jit, static_argnames=("config", "compute", "chunk"), donate_argnames=("state", "cache"))
def _decode(params, state, cache, stop_ids, *, config, compute, chunk):
    """`chunk` steps for all slots: (state, cache, tokens_BN, logprobs_BN); a row that has ended reports _NO_TOKEN."""

    def step(carry, _):
        state, cache = carry
        alive_B = state["alive"]
        hidden_B1D, cache = llama.forward(
            params, config, compute, state["tokens"][:, None], state["positions"][:, None], cache=cache
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
        return (state, cache), (jnp.where(alive_B, drawn_B, _NO_TOKEN), jnp.where(alive_B, logprobs_B, 0.0))

    # A static trip count: XLA:GPU then loops without asking the host whether to go on.
    (state, cache), (tokens_NB, logprobs_NB) = jax.lax.scan(step, (state, cache), length=chunk)
    return state, cache, tokens_NB.T, logprobs_NB.T
