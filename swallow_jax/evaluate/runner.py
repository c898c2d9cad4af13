"""Ask a backend for the label of every conversation and keep the answers as prediction rows.

Two ways: `labels` scores the task's closed answers by their log-probability after the prompt and takes the largest;
`generate` lets the model write and reads the label out of the text. A conversation longer than the context is asked about in
windows of turns. Rows are appended whole and synced one by one, so a killed evaluation goes on where it stopped.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run
from swallow_jax.evaluate import answers, metrics, windows
from swallow_jax.evaluate.answers import label_ids
from swallow_jax.evaluate.windows import Answer
from swallow_jax.task import read_conversations

__all__ = ["Asking", "PredictionLog", "evaluate", "gold_label", "label_ids", "messages", "pair_ids", "prediction", "read_shots",
           "tokenizer_of"]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How a verdict is asked for; the same for local models and endpoints."""

    mode: str  # 'labels': score the closed answers; 'generate': write and parse
    prompt: str | None  # name of the task's prompt; None: the task's default
    normalise: str  # 'sum' of the answer's log-probabilities (P of the answer), or their 'mean' by token; labels only
    max_new_tokens: int  # generate only
    most_labels: int | None = None  # labels mode, policy 'multi': the longest answer that is scored; None: all categories
    window: windows.Window | None = None  # how long conversations are cut; None: they must fit
    shots: str | None = None  # a JSONL file of conversations, shown with their answers as earlier turns of the chat

    def __post_init__(self):
        if self.mode not in ("labels", "generate"):
            raise ValueError(f"asking.mode is {self.mode!r}; write 'labels' or 'generate'")
        if self.normalise not in ("sum", "mean"):
            raise ValueError(f"asking.normalise is {self.normalise!r}; write 'sum' or 'mean'")


def gold_label(conversation: Mapping[str, Any]) -> str:
    """The primary gold label: the first one, or `compliant` for none."""
    return conversation["labels"][0] if conversation["labels"] else metrics.COMPLIANT


def pair_ids(conversations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """conversation_id -> pair id; a conversation without a twin is a pair of its own."""
    return {c["conversation_id"]: c.get("pair_id") or f"alone {c['conversation_id']}" for c in conversations}


class PredictionLog:
    """The growing `predictions.jsonl`: whole synced lines; a line torn by a kill is cut away when the file is opened."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)
        self.rows = run.read_jsonl(self.path) if self.path.is_file() else []
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def append(self, *rows: Mapping[str, Any]) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += map(dict, rows)

    def missing(self, conversations: Sequence[Mapping[str, Any]], *, model: str, test_set: str, seed: int) -> list:
        """The conversations this model and seed have not answered yet."""
        wanted = (model, seed, test_set)
        done = {row["conversation_id"] for row in self.rows if (row["model"], row["seed"], row["test_set"]) == wanted}
        return [c for c in conversations if c["conversation_id"] not in done]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "PredictionLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def prediction(
    conversation: Mapping[str, Any], answer: Answer, *, model: str, test_set: str, seed: int, several: bool = False,
    parts: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """One row of the predictions contract; `several` adds the whole sets of labels, `parts` says how many windows there were."""
    preds = answer.preds
    pred = metrics.INVALID if preds is None else preds[0] if preds else metrics.COMPLIANT
    row = {
        "conversation_id": conversation["conversation_id"], "model": model, "test_set": test_set, "seed": seed,
        "gold": gold_label(conversation), "pred": pred,
    }  # fmt: skip
    # A verdict may name two categories where one is asked for; the sets are compared as sets.
    if several or len(conversation["labels"]) > 1 or len(preds or ()) > 1:
        row |= {"golds": conversation["labels"], "preds": list(preds or ())}
    if answer.probs is not None:
        scale = 1.0 if several else sum(answer.probs.values())
        row["probs"] = {label: round(float(p) / scale, 8) for label, p in answer.probs.items()}
    if answer.evidence is not None:
        row |= {"evidence": list(answer.evidence), "missing_items": list(answer.missing_items)}
        row |= {"false_quotes": answer.false_quotes} if answer.false_quotes else {}
    if parts > 1:
        row["windows"] = parts
    return row | {"valid": preds is not None, "raw": answer.raw}


def evaluate(
    task: Any,
    conversations: Sequence[Mapping[str, Any]],
    backend: Any,
    *,
    model: str,
    test_set: str,
    seed: int,
    asking: Asking,
    out: PredictionLog | str | os.PathLike,
) -> dict[str, Any]:
    """Answer the conversations not yet in `out` and append their rows.

    Returns {"asked", "kept", "seconds", "prompt_tokens", "completion_tokens"}; tokens are None where nobody counts them.
    Raises ValueError where a backend answers a request that was not asked, or with a log-probability that is no number.
    """
    if not isinstance(out, PredictionLog):
        with PredictionLog(out) as log:
            return evaluate(task, conversations, backend, model=model, test_set=test_set, seed=seed, asking=asking, out=log)
    started = time.perf_counter()
    left = out.missing(conversations, model=model, test_set=test_set, seed=seed)
    parts: dict[str, dict[int, Answer | None]] = {}
    pieces, by_id = [], {c["conversation_id"]: c for c in left}
    shots = read_shots(task, asking, conversations)
    for conversation in left:
        spans = _spans(task, conversation, backend, asking, shots)
        parts[conversation["conversation_id"]] = {start: None for start, _ in spans}
        pieces += [(start, {**conversation, "turns": conversation["turns"][start:stop]}) for start, stop in spans]
    counts: dict[str, int | None] = {"prompt_tokens": 0, "completion_tokens": 0}
    ask = _scored if asking.mode == "labels" else _generated
    names = {"model": model, "test_set": test_set, "seed": seed, "several": task.label_policy == "multi"}
    asked = [messages(task, piece, asking, shots) for _, piece in pieces]
    for (start, piece), answer in ask(task, pieces, asked, backend, seed, asking, counts):
        given = parts[piece["conversation_id"]]
        given[start] = answer
        if None not in given.values():
            whole = windows.merge(sorted(given.items()))
            if len(given) > 1 and asking.mode == "labels" and task.label_policy != "multi":
                best = max(whole.probs, key=whole.probs.get)
                whole = dataclasses.replace(whole, preds=() if best == metrics.COMPLIANT else (best,))
            out.append(prediction(by_id[piece["conversation_id"]], whole, parts=len(given), **names))
    seconds = time.perf_counter() - started
    return {"asked": len(left), "kept": len(conversations) - len(left), "seconds": seconds, **counts}


def read_shots(task: Any, asking: Asking, conversations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The examples that `asking.shots` names, none for None; ValueError where one of them is itself asked about."""
    if asking.shots is None:
        return []
    shots = read_conversations(asking.shots, task)
    for shot in shots:
        if same := [c["conversation_id"] for c in conversations if c["turns"] == shot["turns"]]:
            raise ValueError(f"{asking.shots} shows {same[0]!r} with its answer, which is asked for; take it out of the examples")
    return shots


def messages(
    task: Any, conversation: Mapping[str, Any], asking: Asking, shots: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, str], ...]:
    """The chat that asks about a conversation: the task's prompt, the examples before its question as question and answer."""
    asked = task.prompt(conversation, asking.prompt)
    earlier = (
        (task.prompt(shot, asking.prompt)[-1], {"role": "assistant", "content": task.answer(shot["labels"])}) for shot in shots
    )
    return (*asked[:-1], *(message for pair in earlier for message in pair), asked[-1])


def tokenizer_of(backend: Any) -> Any | None:
    """The tokenizer of a model in this process, also behind `record`; None of an endpoint or a file."""
    return getattr(backend, "tokenizer", None) or getattr(getattr(backend, "backend", None), "tokenizer", None)


def _spans(
    task: Any, conversation: Mapping[str, Any], backend: Any, asking: Asking, shots: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    if asking.window is None:
        return [(0, len(conversation["turns"]))]
    return windows.cut(conversation, asking.window, _measure(task, backend, asking, shots))


def _measure(task: Any, backend: Any, asking: Asking, shots: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], int]:
    if asking.window.unit == "characters":
        return lambda piece: sum(len(m["content"]) for m in messages(task, piece, asking, shots))
    tokenizer = tokenizer_of(backend)
    if tokenizer is None:
        raise ValueError(f"{backend.name} has no tokenizer here; count asking.window in 'characters'")
    return lambda piece: len(tokenizer.render_chat(list(messages(task, piece, asking, shots)), add_generation_prompt=True))


Piece = tuple[int, Mapping[str, Any]]  # a window: the number of its first turn, and the conversation of its turns


def _scored(
    task: Any, pieces: Sequence[Piece], asked: Sequence[tuple], backend: Any, seed: int, asking: Asking, counts: dict
) -> Iterator[tuple[Piece, Answer]]:
    from swallow_jax.generate import backends

    sets, texts = answers.closed(task, asking.most_labels)
    requests = [backends.ScoreRequest(messages=chat, prompt=None, continuations=texts) for chat in asked]
    tokenizer = tokenizer_of(backend)
    for place, result in _answers(pieces, requests, backend.score):
        if any(map(math.isnan, result.logprobs)) or not math.isfinite(max(result.logprobs)):
            raise ValueError(
                f"{backend.name} gives the log-probabilities {list(result.logprobs)} for "
                f"{pieces[place][1]['conversation_id']!r}; check the weights and that prompt and answer fit the context"
            )
        answer = answers.from_logprobs(task, sets, texts, result.logprobs, result.tokens, asking.normalise == "mean")
        if tokenizer is None:
            counts["prompt_tokens"] = None
        else:
            prompt = tokenizer.render_chat(list(requests[place].messages), add_generation_prompt=True)
            counts["prompt_tokens"] += len(prompt)
        counts["completion_tokens"] += sum(result.tokens)
        yield pieces[place], answer


def _generated(
    task: Any, pieces: Sequence[Piece], asked: Sequence[tuple], backend: Any, seed: int, asking: Asking, counts: dict
) -> Iterator[tuple[Piece, Answer]]:
    from swallow_jax.generate import backends

    # Greedy: a verdict should not depend on a draw; the seed only names the run.
    requests = [
        backends.Request(messages=chat, prompt=None, max_new_tokens=asking.max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
                         seed=seed, stop=())
        for chat in asked
    ]  # fmt: skip
    for place, result in _answers(pieces, requests, backend.generate):
        counts["prompt_tokens"] += result.prompt_tokens
        counts["completion_tokens"] += result.completion_tokens
        yield pieces[place], answers.from_text(task, result.text, pieces[place][1])


def _answers(pieces: Sequence[Piece], requests: Sequence, ask: Any) -> Iterator[tuple[int, Any]]:
    """(number of the piece, its result); results come in order of completion, equal requests are asked once."""
    waiting: dict[str, list[int]] = {}
    unique = []
    for place, request in enumerate(requests):
        if request.key not in waiting:
            unique.append(request)
        waiting.setdefault(request.key, []).append(place)
    for result in ask(unique) if unique else ():
        if result.key not in waiting:
            raise ValueError(f"the backend answered a request that was not asked (key {result.key[:12]}…)")
        for place in waiting.pop(result.key):
            yield place, result
    if waiting:
        lost = pieces[next(iter(waiting.values()))[0]][1]["conversation_id"]
        raise ValueError(f"the backend left {len(waiting)} requests without an answer, the first is {lost!r}; run again")
