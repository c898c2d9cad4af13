"""One door to any generator: the JAX engine in this process, an OpenAI-compatible endpoint, or a recorded file.

Synthesis and evaluation know `generate` and `score` and nothing else. A result carries the key of its request, the
SHA-256 of the request's canonical JSON: `record` keeps results by it, so that a killed job goes on where it stopped.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

from swallow_jax import run

Message = Mapping[str, str]  # {"role", "content"}


class _Asked:
    """What a request for text and one for scores have in common: a prompt or messages, and a key."""

    def __post_init__(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a request needs a prompt or messages, one of the two")

    @functools.cached_property
    def key(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # 0 and 0.0 are one temperature, but two spellings in JSON.
        return run.sha256_json(fields | {n: float(fields[n]) for n in ("temperature", "top_p") if n in fields})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(_Asked):
    """One text to generate. temperature 0 is greedy; top_k 0 and top_p 1 keep everything; 0 <= seed < 2^32.

    The text ends before the first of the stop strings, and at the model's own end-of-text tokens.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """A generated text. `logprob` sums the model's own log-probabilities over all generated tokens, where it is known."""

    key: str
    text: str
    finish_reason: str  # "stop" | "length"; an endpoint's other reasons (content_filter) as it gives them
    prompt_tokens: int
    completion_tokens: int  # the end token included
    logprob: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest(_Asked):
    """Possible continuations of one context (behind messages: of the assistant's turn, its end token not counted)."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    continuations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """One entry a continuation: summed log-probability, whether greedy decoding would write it, number of its tokens."""

    key: str
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]


class Backend(Protocol):
    """Results come in order of completion, one a request; requests are taken from the iterable as there is room."""

    name: str

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]: ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]: ...

    def describe(self) -> dict[str, Any]:
        """For manifests: kind, model, revision, licence, sha256 where it is known."""


# Opening one from a config.


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxOptions:
    """Section of kind "jax". `path`: an HF folder (a run's export too) or a .gguf file; `tokenizer`: where it lies elsewhere."""

    kind: str
    path: str
    dtype: str
    slots: int
    max_length: int
    int8: bool = False  # weights of 8 bits, one scale an output channel: a quarter or half of the memory, other numbers
    # The keys and values of one system message are computed and stored once for all requests that begin with it, and read
    # once a step. For jobs with few system messages; float rounding differs.
    share_system: bool = False
    # None of these changes a token.
    name: str | None = None
    tokenizer: str | None = None
    attention: str = "xla"
    chunk: int = 16  # decode steps a dispatch
    tokens_per_batch: int = 2048  # padded tokens scored together
    revision: str | None = None
    licence: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedOptions:
    """Section of kind "recorded"."""

    kind: str
    path: str
    missing: str = "raise"  # or "skip"
    name: str | None = None


def open_backend(section: Mapping[str, Any]) -> Backend:
    """The backend a config section describes: its `kind` is "jax", "endpoint" or "recorded", its other fields are those of
    JaxOptions, endpoint.EndpointOptions or RecordedOptions. ValueError names a missing, unknown or mistyped one."""
    from swallow_jax.generate import endpoint

    kinds = {"jax": JaxOptions, "endpoint": endpoint.EndpointOptions, "recorded": RecordedOptions}
    section = dict(section)
    if section.get("kind") not in kinds:
        raise ValueError(f"backend.kind={section.get('kind')!r}; known: {', '.join(kinds)}")
    options = run.build(kinds[section["kind"]], section, "backend")
    if options.kind == "recorded":
        return RecordedBackend(options.path, missing=options.missing, name=options.name)
    from swallow_jax import text

    if options.kind == "endpoint":
        tokenizer = text.load_tokenizer(options.tokenizer) if options.tokenizer else None
        return endpoint.EndpointBackend(options, tokenizer=tokenizer)
    from swallow_jax import llama

    tokenizer = text.load_tokenizer(options.tokenizer or options.path)
    params, config = _load(options)
    return JaxBackend(
        params, config, tokenizer,
        compute=llama.Compute(dtype=options.dtype, remat="none", scan_layers=False, attention=options.attention),
        slots=options.slots, max_length=options.max_length, chunk=options.chunk, tokens_per_batch=options.tokens_per_batch,
        name=options.name or Path(options.path).name, source=options.path, revision=options.revision, licence=options.licence,
        share_system=options.share_system,
    )  # fmt: skip


def _load(options: JaxOptions) -> tuple[Any, Any]:
    """Weights and config. Of int8 ones the originals stay in the host's memory: 70B in bfloat16 does not fit one GPU."""
    from swallow_jax import hf

    if not options.int8:
        return hf.load(options.path)
    import jax

    from swallow_jax.generate import engine

    with jax.default_device(jax.devices("cpu")[0]):
        params, config = hf.load(options.path)
        return engine.decode_form(params, options.dtype, int8=True, device=jax.local_devices()[0]), config


# The JAX engine.

# Bytes a second that one device's memory gives, by what JAX calls it; from the makers' data sheets.
_BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.04e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12,
    "TPU v4": 1.23e12, "TPU v5 lite": 0.82e12, "TPU v5": 2.77e12, "TPU v5p": 2.77e12, "TPU v6 lite": 1.64e12,
}  # fmt: skip


class JaxBackend:
    """A model in this process. `source` is the file or folder it came from, hashed for `describe`."""

    def __init__(
        self,
        params: Any,
        config: Any,
        tokenizer: Any,
        *,
        compute: Any,
        slots: int,
        max_length: int,
        chunk: int,
        tokens_per_batch: int,
        name: str,
        source: str | os.PathLike | None = None,
        revision: str | None = None,
        licence: str | None = None,
        share_system: bool = False,
    ):
        from swallow_jax.generate import engine, scorer

        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}; "
                "they do not belong together"
            )
        self.name, self.tokenizer, self.share_system = name, tokenizer, share_system
        self._running: dict[str, tuple[Request, int, StopText]] = {}
        self._job, self._question = engine.Job, scorer.Question
        self._facts = {"revision": revision, "licence": licence, "path": None if source is None else str(source)}
        params = engine.decode_form(params, compute.dtype)  # once for both
        self.engine = engine.Engine(
            params, config, compute, slots=slots, max_length=max_length, chunk=chunk, stop_ids=tokenizer.eos_ids
        )
        self.scorer = scorer.Scorer(params, config, compute, max_length=max_length, tokens_per_batch=tokens_per_batch)

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        running = self._running = {}

        def jobs():
            for number, request in enumerate(requests):
                name, prompt_ids = f"request {number} ({request.key[:12]})", context_ids(self.tokenizer, request)
                text = StopText(self.tokenizer.decode, request.stop)
                running[name] = request, len(prompt_ids), text
                yield self._job(
                    name=name, prompt_ids=prompt_ids, max_new_tokens=request.max_new_tokens, until=text.push,
                    temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=request.seed,
                    prefix=self._prefix(request, prompt_ids),
                )  # fmt: skip

        for output in self.engine.generate(jobs()):
            request, prompt_tokens, text = running.pop(output.name)
            yield Result(request.key, text.text, output.finish_reason, prompt_tokens, len(output.tokens), sum(output.logprobs))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        running: dict[str, ScoreRequest] = {}

        def questions():
            for number, request in enumerate(requests):
                name, context = f"request {number} ({request.key[:12]})", context_ids(self.tokenizer, request)
                running[name] = request
                continuations = [continuation_ids(self.tokenizer, request, context, c) for c in request.continuations]
                prefix = self._prefix(request, context)
                yield self._question(name=name, context_ids=context, continuations=continuations, prefix=prefix)

        for answer in self.scorer.score(questions()):
            yield ScoreResult(running.pop(answer.name).key, answer.logprobs, answer.greedy, answer.tokens)

    def activity(self, pace: float) -> str:
        """Slots in use and, at `pace` generated tokens a second, the memory traffic of the weights alone."""
        busy = min(len(self._running), self.engine.slots)
        if not busy:
            return ""
        traffic = self._bytes_a_step * pace / busy  # a step reads the weights once for all rows
        most = _BANDWIDTH.get(self._device)
        return f"{busy}/{self.engine.slots} slots, {traffic / 1e9:.1f} GB/s" + (f" ({traffic / most:.0%})" if most else "")

    @functools.cached_property
    def _bytes_a_step(self) -> int:
        import jax

        params = self.engine.params  # of the embedding a step reads a few rows
        return sum(leaf.nbytes for leaf in jax.tree.leaves({name: params[name] for name in params if name != "embed"}))

    @functools.cached_property
    def _device(self) -> str:
        import jax

        return jax.devices()[0].device_kind

    def _prefix(self, request: Request | ScoreRequest, ids: Sequence[int]) -> int:
        """How many first tokens of a request are those of its system message."""
        if not self.share_system or not request.messages or request.messages[0]["role"] != "system" or len(request.messages) < 2:
            return 0
        system = self.tokenizer.render_chat([request.messages[0]], add_generation_prompt=False)
        return len(system) if list(ids[: len(system)]) == list(system) and len(system) < len(ids) else 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "jax", "model": self.name, "sha256": self._sha256, **self._facts}

    @functools.cached_property
    def _sha256(self) -> str | None:
        return None if self._facts["path"] is None else run.sha256_path(self._facts["path"])


def context_ids(tokenizer: Any, request: Request | ScoreRequest) -> list[int]:
    """A prompt behind BOS, or messages in the checkpoint's chat format up to the assistant's header."""
    if request.messages is None:
        return tokenizer.encode(request.prompt, add_bos=True)
    return tokenizer.render_chat(list(request.messages), add_generation_prompt=True)


def continuation_ids(tokenizer: Any, request: ScoreRequest, context: Sequence[int], continuation: str) -> list[int]:
    """The tokens of a continuation as they stand behind the context (SentencePiece would put a space before a text that
    stands alone). Where the border's characters merge into one token, the continuation is encoded alone."""
    if request.messages is None:
        whole = tokenizer.encode(request.prompt + continuation, add_bos=True)
    else:
        turn = {"role": "assistant", "content": continuation}
        whole = tokenizer.render_chat([*request.messages, turn], add_generation_prompt=False)
    if whole[: len(context)] != list(context):
        return tokenizer.encode(continuation)
    return list(itertools.takewhile(lambda i: i not in tokenizer.special_ids, whole[len(context) :]))


class StopText:
    """The text of tokens that arrive in pieces: characters whose bytes are incomplete are held back, and the text ends before
    the first stop string."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]):
        self.text = ""
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids: list[int] = []
        # Tokens [start, read) have been written out and are decoded again with the new ones, because the spelling of a
        # token depends on its neighbour (a leading space, the bytes of one character).
        self._start = self._read = 0

    def push(self, tokens: Sequence[int]) -> int | None:
        """Take new tokens; returns how many of them were needed when a stop string is complete, else None."""
        for i, token in enumerate(tokens):
            self._ids.append(token)
            whole = self._decode(self._ids[self._start :])
            if whole.endswith("\ufffd"):
                continue
            old = len(self.text)
            self.text += whole[len(self._decode(self._ids[self._start : self._read])) :]
            self._start, self._read = self._read, len(self._ids)
            found = [self.text.find(s, max(0, old - len(s) + 1)) for s in self._stop]
            if any(at >= 0 for at in found):
                self.text = self.text[: min(at for at in found if at >= 0)]
                return i + 1
        return None


# Recorded files.


class RecordedBackend:
    """Answers from a JSON-lines file: {"key", "text", ...} for texts, {"key", "logprobs", "greedy", "tokens", ...} for scores;
    what `record` writes, or what a person wrote with the key of the request and the provenance of the text.

    missing: "raise", or "skip" to yield nothing for an unknown key; `missed` counts them.
    """

    def __init__(self, path: str | os.PathLike, *, missing: str = "raise", name: str | None = None):
        if missing not in ("raise", "skip"):
            raise ValueError(f"missing={missing!r}; known: raise, skip")
        self.path, self.missing, self.missed = Path(path), missing, 0
        self.name = name or self.path.stem
        self._rows = {}
        for row in run.iter_jsonl(self.path):
            if not isinstance(row.get("key"), str) or not ("text" in row or "logprobs" in row):
                raise ValueError(f"{path}: the row {str(row)[:80]} has no `key`, or neither `text` nor `logprobs`")
            if self._rows.setdefault(row["key"], row) != row:
                raise ValueError(f"{path}: two different answers for the key {row['key']}; remove one")

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        yield from self._answers(requests, "text", _result)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        yield from self._answers(requests, "logprobs", _score_result)

    def describe(self) -> dict[str, Any]:
        models = sorted({str(row["model"]) for row in self._rows.values() if "model" in row})
        facts = {"path": str(self.path), "sha256": run.sha256_file(self.path), "revision": None, "licence": None}
        return {"kind": "recorded", "model": ", ".join(models) or self.name, **facts}

    def _answers(self, requests: Iterable, field: str, make: Callable[[dict], Any]) -> Iterator:
        for request in requests:
            row = self._rows.get(request.key)
            if row is not None and field in row:
                yield make(row)
                continue
            self.missed += 1
            if self.missing == "raise":
                asked = request.prompt if request.messages is None else request.messages[-1]["content"]
                raise ValueError(f"{self.path} holds no answer to {asked[-60:]!r} (key {request.key}); record it first")


class record:  # noqa: N801  (reads as a verb: record(backend, path).generate(requests))
    """A backend that keeps each result of another one in a JSON-lines file before handing it on.

    A job that was killed and starts again gets the kept results first and asks only for the rest; each line is whole and
    every distinct request is asked and yielded once. `provenance` is written into every line, beside the model's name; a
    file that was begun with another model is refused. The file is what `RecordedBackend` reads.
    """

    def __init__(self, backend: Backend, path: str | os.PathLike, **provenance: Any):
        self.backend, self.name, self.path = backend, backend.name, Path(path)
        self._provenance = {"model": backend.name, **provenance}
        self._lines = KeyedLines(path)
        for row in self._lines.rows.values():
            if row.get("model") != backend.name:
                raise ValueError(
                    f"{path} was begun with the model {row.get('model')!r}, not {backend.name!r}; choose another file"
                )

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        yield from self._answers(requests, self.backend.generate, _result)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        yield from self._answers(requests, self.backend.score, _score_result)

    def describe(self) -> dict[str, Any]:
        return self.backend.describe()

    def _answers(self, requests: Iterable, ask: Callable[[Iterable], Iterator], make: Callable[[dict], Any]) -> Iterator:
        kept: collections.deque[dict] = collections.deque()
        seen: set[str] = set()

        def missing():
            for request in requests:
                if request.key in seen:
                    continue
                seen.add(request.key)
                if request.key in self._lines.rows:
                    kept.append(self._lines.rows[request.key])
                else:
                    yield request

        with _progress(self.backend, requests) as advance:
            for result in ask(missing()):
                while kept:
                    advance(None)
                    yield make(kept.popleft())
                self._lines.append(dataclasses.asdict(result) | self._provenance)
                advance(result)
                yield result
            while kept:
                advance(None)
                yield make(kept.popleft())


@contextlib.contextmanager
def _progress(backend: Any, requests: Iterable) -> Iterator[Callable[[Result | ScoreResult | None], None]]:
    """A bar for people at a terminal: done of all, time left, tokens a second and what the backend says of itself."""
    from tqdm import tqdm

    tokens = 0
    total = len(requests) if isinstance(requests, Sized) else None
    # smoothing=0: requests end in bursts, and only the mean foretells the end.
    with tqdm(total=total, desc=backend.name, unit=" requests", disable=None, leave=False, smoothing=0) as bar:

        def advance(result: Result | ScoreResult | None) -> None:
            nonlocal tokens
            if bar.disable:
                return
            if result is None:  # kept by an earlier run: done, but no measure of the pace
                bar.initial += 1
                bar.update()
                return
            tokens += result.completion_tokens if isinstance(result, Result) else sum(result.tokens)
            pace = tokens / max(bar.format_dict["elapsed"], 1e-3)
            activity = getattr(backend, "activity", lambda pace: "")(pace)
            bar.set_postfix_str(f"{pace:.0f} tok/s{activity and ', '}{activity}", refresh=False)
            bar.update()

        yield advance


class KeyedLines:
    """An append-only JSON-lines file of rows with a key: what a kill cut off at its end is removed when it is opened again."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = self.path.read_bytes()
            if not whole.endswith(b"\n"):
                os.truncate(self.path, whole.rfind(b"\n") + 1)
        rows = run.read_jsonl(self.path) if self.path.exists() else []
        if bad := [row for row in rows if "key" not in row]:
            raise ValueError(
                f"{path} holds a row without a key ({str(bad[0])[:80]}); it is another kind of file, choose a new one"
            )
        self.rows = {row["key"]: row for row in rows}

    def append(self, row: dict) -> None:
        """One line, on disk when this returns."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as f:
            at = f.tell()
            if f.write(line) != len(line):  # a full disk may take a part of it
                f.truncate(at)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(f.fileno())
        self.rows[row["key"]] = row


def _result(row: dict) -> Result:
    return Result(
        row["key"], row["text"], row.get("finish_reason", "stop"), row.get("prompt_tokens", 0),
        row.get("completion_tokens", 0), row.get("logprob"),
    )  # fmt: skip


def _score_result(row: dict) -> ScoreResult:
    return ScoreResult(row["key"], *(tuple(row[name]) for name in ("logprobs", "greedy", "tokens")))
