"""The in-process sampler: static slots, prefill into a slot, decoding in chunks of a fixed number of steps.

Letters: B slots, T prompt positions (a bucket's length), S cache length, N steps of a chunk.

Slots stand in lanes: one for each length class of the cache and each shared prefix, opened when a job needs it. A lane's
keys and values are `slots` rows of its class's length, and its prefix's, which are computed and stored once.

A request's tokens depend on the request alone, not on its slot, its company or the order of the queue: a prompt is
prefilled alone, in pieces chosen by its own length, and its lane by its own length and prefix; a decoded row of a matrix
product does not depend on the other rows (that is why there are at least two slots: one row takes another path in XLA);
the noise of a draw is keyed by (seed, position). The host never waits for a token before it starts the next chunk: what
has stopped in the meantime runs on as a masked row, and its slot is refilled one chunk later.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from swallow_jax import llama
from swallow_jax.generate import steps
from swallow_jax.generate.steps import Arrays, decode_form

_END = object()
_LANES = 4  # open at once: what a lane holds on the device is as large as a whole cache of its class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence to generate. `name` is handed back with the output.

    Samples of one prompt are jobs that follow each other with other seeds: the prompt is prefilled once.
    """

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
    # So many first tokens of the prompt are common to many jobs (a system prompt, a few-shot block): their keys and values
    # are computed and stored once, and read once a step. It changes float rounding, so it belongs to the request.
    prefix: int = 0


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
        self.dispatched = 1  # tokens that the programs dispatched so far will bring, at most; the prefill brings one
        self.done = False

    @property
    def open(self) -> bool:
        """Whether it may still need tokens beyond those dispatched."""
        return not self.done and self.dispatched < self.job.max_new_tokens


@dataclasses.dataclass
class _Lane:
    """Slots of one length and one shared prefix."""

    length: int
    prefix: Arrays | None
    state: Arrays
    cache: Arrays
    rows: list[_Sequence | None]

    def sweep(self) -> None:
        """Free the slots of sequences that need nothing more; a budget on its way needs no news from the device."""
        self.rows = [row if row is not None and row.open else None for row in self.rows]


class Engine:
    """Generates for a stream of jobs with one compiled decode program a length class and one prefill program a bucket.

    Args:
      params: the parameters, layers stacked or not, or in `decode_form`.
      slots: sequences decoded together in a lane, at least 2.
      max_length: of a prompt (behind its shared prefix) and its budget together.
      chunk: decode steps a dispatch. More steps mean fewer round trips to the host, and more wasted steps at the end of a
        sequence. Neither it nor `slots` changes a token.
      stop_ids: tokens that end a sequence.
      prefill_buckets: padded lengths of a prompt's last piece, ascending; whole pieces have the largest. Powers of two up to
        512 if not given.
      length_classes: cache lengths, ascending, the last one max_length; a job takes the first that holds it. max_length, its
        half and its quarter (none below 256) if not given.
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
        length_classes: Sequence[int] | None = None,
    ):
        if slots < 2:
            raise ValueError(f"slots={slots}: at least 2, or a token could depend on how many run together")
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one step")
        self.config = config
        self.compute = dataclasses.replace(compute, remat="none", scan_layers=False)
        self.params = decode_form(params, compute.dtype)
        self.slots, self.max_length, self.chunk = slots, max_length, chunk
        self.buckets = tuple(prefill_buckets or steps.power_of_two_buckets(min(512, max_length)))
        self.classes = tuple(length_classes or sorted({max_length, *(c for c in (max_length // 2, max_length // 4) if c >= 256)}))
        for name, lengths in (("prefill_buckets", self.buckets), ("length_classes", self.classes)):
            if list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or lengths[-1] > max_length:
                raise ValueError(f"{name}={lengths}: ascending and at most max_length={max_length} are wanted")
        if self.classes[-1] != max_length:
            raise ValueError(f"length_classes={self.classes}: the last one must be max_length={max_length}")
        self._prompts = steps.Prompts(self.params, config, self.compute, self.buckets)
        self._stop_ids = np.asarray(sorted(set(stop_ids)) or [steps.NO_TOKEN - 1], np.int32)

    def check(self, job: Job) -> None:
        """Raises ValueError, with the numbers, for a job that this engine cannot run."""
        n = len(job.prompt_ids)
        if n == 0:
            raise ValueError(f"{job.name}: the prompt is empty; begin it with the BOS token")
        if not 0 <= job.prefix < n:
            raise ValueError(f"{job.name}: prefix={job.prefix} of {n} prompt tokens; at least one must follow it")
        if job.max_new_tokens < 1:
            raise ValueError(f"{job.name}: max_new_tokens={job.max_new_tokens}, at least 1 is wanted")
        if n - job.prefix + job.max_new_tokens > self.max_length:
            raise ValueError(
                f"{job.name}: a prompt of {n - job.prefix} tokens and max_new_tokens={job.max_new_tokens} do not fit max_length="
                f"{self.max_length}; shorten one or raise the other"
            )
        if job.temperature < 0 or job.top_k < 0 or not 0 < job.top_p <= 1 or not 0 <= job.seed < 2**32:
            raise ValueError(
                f"{job.name}: temperature={job.temperature} (>= 0), top_k={job.top_k} (>= 0; 0 keeps all), top_p={job.top_p} "
                f"(0 < p <= 1), seed={job.seed} (0 <= seed < 2^32): outside the range in brackets"
            )

    def generate(self, jobs: Iterable[Job | None]) -> Iterator[Output]:
        """Outputs in order of completion.

        Jobs are taken from the iterable as slots fall free, and as many beyond as there are slots while only another lane has
        a free one. It may yield None for "none just now": what runs goes on, and it is asked again a chunk later.
        """
        source = iter(jobs)
        lanes: dict[Hashable, _Lane] = {}
        waiting: list[Job] = []
        # Dispatched and not yet read: (tokens [B or 1, N], log-probabilities, which sequence each row belongs to).
        unread: collections.deque[tuple[jax.Array, jax.Array, list[_Sequence | None]]] = collections.deque()
        last_prompt: tuple[Hashable, Any] = (None, None)
        exhausted = False
        while True:
            while True:
                found = next(((job, lane) for job in waiting if (lane := self._lane(job, lanes, waiting))), None)
                if found:
                    job, lane = found
                    waiting.remove(job)
                    last_prompt = self._prompt(job, lane, last_prompt)
                    unread.append(self._admit(job, lane, last_prompt[1]))
                    continue
                free = not lanes or any(None in lane.rows for lane in lanes.values())
                if exhausted or not free or len(waiting) >= self.slots:
                    break
                job = next(source, _END)
                exhausted = job is _END
                if job is None or exhausted:
                    break
                self.check(job)
                waiting.append(job)
            decoded = 0
            for lane in lanes.values():
                lane.sweep()
                if any(lane.rows):
                    lane.state, lane.cache, tokens, logprobs = steps.decode_program()(
                        self.params, lane.state, lane.cache, lane.prefix, self._stop_ids,
                        config=self.config, compute=self.compute, chunk=self.chunk,
                    )  # fmt: skip
                    unread.append((tokens, logprobs, list(lane.rows)))
                    decoded += 1
                    for sequence in filter(None, lane.rows):
                        sequence.dispatched += self.chunk
            if not decoded and not unread and exhausted and not waiting:
                return
            # Read all but the chunks just dispatched; if nothing was, read what there is.
            while len(unread) > decoded:
                yield from self._read(*unread.popleft())
            for lane in lanes.values():
                lane.sweep()

    def _lane(self, job: Job, lanes: dict[Hashable, _Lane], waiting: list[Job]) -> _Lane | None:
        """The lane of a job if it has a free slot, opened if need be and possible."""
        key = self._lane_key(job)
        if key not in lanes:
            if len(lanes) >= _LANES:
                wanted = {self._lane_key(other) for other in waiting}
                idle = [k for k, lane in lanes.items() if not any(lane.rows) and k not in wanted]
                if not idle:
                    return None
                del lanes[idle[0]]
            length, prefix_ids = key
            lanes[key] = _Lane(
                length=length,
                prefix=self._prompts.prefix(prefix_ids) if prefix_ids else None,
                state=steps.empty_state(self.slots),
                cache=llama.init_cache(self.config, self.slots, length, steps.cache_dtype(self.compute)),
                rows=[None] * self.slots,
            )
        return lanes[key] if None in lanes[key].rows else None

    def _lane_key(self, job: Job) -> tuple[int, tuple[int, ...]]:
        own = len(job.prompt_ids) - job.prefix + job.max_new_tokens
        return next(c for c in self.classes if c >= own), tuple(job.prompt_ids[: job.prefix])

    def _prompt(self, job: Job, lane: _Lane, last: tuple[Hashable, Any]) -> tuple[Hashable, Any]:
        """What the last prompt left, or a job's own prompt prefilled: (what it is, (cache, scores))."""
        ids = tuple(job.prompt_ids)
        if last[0] == (lane.length, job.prefix, ids):
            return last
        prompt = self._prompts.run(ids[job.prefix :], lane.prefix, slots=lane.length)
        return (lane.length, job.prefix, ids), prompt

    def _admit(self, job: Job, lane: _Lane, prompt: tuple[Arrays, jax.Array]):
        cache, logits_1V = prompt
        slot = lane.rows.index(None)
        lane.rows[slot] = sequence = _Sequence(job)
        row = {
            "position": np.int32(len(job.prompt_ids)), "budget": np.int32(job.max_new_tokens), "seed": np.uint32(job.seed),
            "temperature": np.float32(job.temperature), "top_k": np.int32(min(job.top_k, 2**31 - 1)),
            "top_p": np.float32(job.top_p),
        }  # fmt: skip
        lane.cache = steps.insert(lane.cache, cache, np.int32(slot))
        lane.state, tokens, logprobs = steps.start(lane.state, logits_1V, np.int32(slot), row, self._stop_ids)
        return tokens, logprobs, [sequence]

    def _read(self, tokens: jax.Array, logprobs: jax.Array, rows: list[_Sequence | None]) -> Iterator[Output]:
        """Hand a chunk's tokens (waits for them) to their sequences and yield those that are complete."""
        tokens_BN, logprobs_BN = np.asarray(tokens), np.asarray(logprobs)
        for b, sequence in enumerate(rows):
            if sequence is None or sequence.done:
                continue
            job, count = sequence.job, int(np.sum(tokens_BN[b] != steps.NO_TOKEN))
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
