"""Ask a backend for the label of every conversation and keep the answers as prediction rows.

Two ways: `labels` scores the task's closed answers by their log-probability after the prompt and takes the largest;
`generate` lets the model write and reads the label out of the text. Rows are appended whole and synced one by one, so a
killed evaluation goes on where it stopped.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swallow_jax import run
from swallow_jax.evaluate import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How a verdict is asked for; the same for local models and endpoints."""

    mode: str  # 'labels': score the closed answers; 'generate': write and parse
    prompt: str | None  # name of the task's prompt; None: the task's default
    normalise: str  # 'sum' of the answer's log-probabilities (P of the answer), or their 'mean' by token; labels only
    max_new_tokens: int  # generate only

    def __post_init__(self):
        if self.mode not in ("labels", "generate"):
            raise ValueError(f"asking.mode is {self.mode!r}; write 'labels' or 'generate'")
        if self.normalise not in ("sum", "mean"):
            raise ValueError(f"asking.normalise is {self.normalise!r}; write 'sum' or 'mean'")


def label_ids(task: Any) -> list[str]:
    """The task's label ids in the order of `task.labels`, the compliant one by its word instead of None."""
    return [metrics.COMPLIANT if label is None else label for label in task.label_ids]


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

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(dict(row))

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
    conversation: Mapping[str, Any], pred: str, raw: str, *, model: str, test_set: str, seed: int,
    probs: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row of the predictions contract."""
    row = {
        "conversation_id": conversation["conversation_id"], "model": model, "test_set": test_set, "seed": seed,
        "gold": gold_label(conversation), "pred": pred,
    }  # fmt: skip
    if probs is not None:
        row["probs"] = {label: round(float(p), 8) for label, p in probs.items()}
    return row | {"valid": pred != metrics.INVALID, "raw": raw}


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
    """Answer the conversations not yet in `out` and append their rows; returns {"asked", "kept", "seconds"}.

    Raises ValueError where a backend answers a request that was not asked, or with a log-probability that is no number.
    """
    if not isinstance(out, PredictionLog):
        with PredictionLog(out) as log:
            return evaluate(task, conversations, backend, model=model, test_set=test_set, seed=seed, asking=asking, out=log)
    started = time.perf_counter()
    left = out.missing(conversations, model=model, test_set=test_set, seed=seed)
    answer = _scored if asking.mode == "labels" else _generated
    for conversation, pred, raw, probs in answer(task, left, backend, seed, asking):
        out.append(prediction(conversation, pred, raw, model=model, test_set=test_set, seed=seed, probs=probs))
    seconds = time.perf_counter() - started
    return {"asked": len(left), "kept": len(conversations) - len(left), "seconds": seconds}


Answer = tuple[Mapping[str, Any], str, str, dict[str, float] | None]


def _scored(task: Any, conversations: Sequence, backend: Any, seed: int, asking: Asking) -> Iterator[Answer]:
    from swallow_jax.generate import backends

    ids = label_ids(task)
    for label in task.labels:
        # The end of the turn is not scored, so the beginning of another answer would always be the likelier one.
        if longer := [other for other in task.labels if other != label and other.startswith(label)]:
            raise ValueError(f"label {label!r} is the beginning of {longer[0]!r}; change one in the task to score closed labels")
    requests = [
        backends.ScoreRequest(messages=tuple(task.prompt(c, asking.prompt)), prompt=None, continuations=tuple(task.labels))
        for c in conversations
    ]
    for conversation, result in _answers(conversations, requests, backend.score):
        logprobs_C = np.array(result.logprobs, dtype=np.float64)
        if asking.normalise == "mean":
            logprobs_C = logprobs_C / np.array(result.tokens)
        if np.isnan(logprobs_C).any() or not np.isfinite(logprobs_C.max()):
            raise ValueError(
                f"{backend.name} gives the log-probabilities {list(result.logprobs)} for {conversation['conversation_id']!r}; "
                "check the weights and that prompt and answer fit the context"
            )
        probs_C = np.exp(logprobs_C - logprobs_C.max())
        probs_C /= probs_C.sum()
        best = int(probs_C.argmax())
        yield conversation, ids[best], task.labels[best], dict(zip(ids, probs_C.tolist(), strict=True))


def _generated(task: Any, conversations: Sequence, backend: Any, seed: int, asking: Asking) -> Iterator[Answer]:
    from swallow_jax.generate import backends

    # Greedy: a verdict should not depend on a draw; the seed only names the run.
    requests = [
        backends.Request(messages=tuple(task.prompt(c, asking.prompt)), prompt=None, max_new_tokens=asking.max_new_tokens,
                         temperature=0.0, top_k=0, top_p=1.0, seed=seed, stop=())
        for c in conversations
    ]  # fmt: skip
    for conversation, result in _answers(conversations, requests, backend.generate):
        label = task.parse_label(result.text)
        yield conversation, metrics.COMPLIANT if label is None else label, result.text, None


def _answers(conversations: Sequence, requests: Sequence, ask: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Pair results, which come in order of completion, with their conversations; equal requests are asked once."""
    waiting: dict[str, list] = {}
    unique = []
    for conversation, request in zip(conversations, requests, strict=True):
        if request.key not in waiting:
            unique.append(request)
        waiting.setdefault(request.key, []).append(conversation)
    for result in ask(unique) if unique else ():
        if result.key not in waiting:
            raise ValueError(f"the backend answered a request that was not asked (key {result.key[:12]}…)")
        for conversation in waiting.pop(result.key):
            yield conversation, result
    if waiting:
        lost = next(iter(waiting.values()))[0]["conversation_id"]
        raise ValueError(f"the backend left {len(waiting)} requests without an answer, the first is {lost!r}; run again")
