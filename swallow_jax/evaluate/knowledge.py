"""What a model knows beside the task: four-choice questions, bits per byte on held-out slices, and what an adaptation cost.

Rows have the form of predictions (`conversation_id` is the id of a question or document), so that they are kept and resumed in
the same way. A verdict on forgetting needs a margin, written in the config before the run.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swallow_jax import run, stats
from swallow_jax.evaluate import metrics

ACCURACY, BITS = "choice_accuracy", "bits_per_byte"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """`prompt` has {question} and {choices}; `answers` are what is scored for the four choices, or () for their own texts."""

    files: tuple[str, ...]
    prompt: str
    choice: str  # one line of {choices}, with {answer} and {text}; "" leaves them out
    answers: tuple[str, ...]
    chat: bool  # as a user's message; otherwise as plain text that goes on, for base models
    normalise: str  # 'sum' of log-probabilities, or their 'mean' by token where the answers are texts of unequal length

    def __post_init__(self):
        if "{question}" not in self.prompt or self.normalise not in ("sum", "mean"):
            raise ValueError("config.questions: prompt needs {question}, normalise is 'sum' or 'mean'")
        if len(self.answers) not in (0, 4):
            raise ValueError(
                f"config.questions.answers has {len(self.answers)} entries; write four, or none for the choices' texts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Declared before the run: `metric` on `test_set` may get worse by at most `margin` from `before` to `after`."""

    before: str
    after: str
    test_set: str
    metric: str
    margin: float

    def __post_init__(self):
        if self.metric not in (ACCURACY, BITS) or self.margin <= 0:
            raise ValueError(f"config.kept: metric {self.metric!r} is {ACCURACY} or {BITS}, margin {self.margin} is above 0")


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Questions of a JSONL file, each checked; ValueError names file, line and remedy."""
    rows, seen = [], set()
    for number, row in run.numbered_jsonl(path):
        choices, answer = row.get("choices"), row.get("answer")
        if not all(isinstance(row.get(field), str) and row[field] for field in ("id", "question")):
            raise ValueError(f"{path}:{number}: 'id' and 'question' must be text")
        if not isinstance(choices, list) or len(choices) != 4 or len({c for c in choices if isinstance(c, str) and c}) != 4:
            raise ValueError(f"{path}:{number}: 'choices' must be four different texts")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < 4:
            raise ValueError(f"{path}:{number}: 'answer' is {answer!r}; it is the number of the right choice, 0 to 3")
        if row["id"] in seen:
            raise ValueError(f"{path}:{number}: the id {row['id']!r} stands twice; ids must be unique")
        seen.add(row["id"])
        rows.append(row | {"conversation_id": row["id"]})
    return _some(rows, path)


def read_slice(path: str | Path) -> list[dict[str, Any]]:
    """Documents of a slice, each with a text; ValueError names file and line."""
    rows = []
    for number, row in run.numbered_jsonl(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("text"), str) or not row["text"]:
            raise ValueError(f"{path}:{number}: a document needs 'id' and a non-empty 'text'")
        rows.append(row | {"conversation_id": row["id"]})
    return _some(rows, path)


def _some(rows: list, path: str | Path) -> list:
    if not rows:
        raise ValueError(f"{path} holds nothing; name a file with at least one line")
    return rows


def ask_questions(questions: Sequence[Mapping[str, Any]], backend: Any, settings: Questions) -> Iterator[dict[str, Any]]:
    """A row without names for each question: gold and pred as numbers of choices, and the probabilities of the four."""
    from swallow_jax.generate import backends

    def request(question: Mapping[str, Any]) -> Any:
        answers = settings.answers or tuple(question["choices"])
        lines = [
            settings.choice.format(answer=answer, text=text) for answer, text in zip(answers, question["choices"], strict=True)
        ]
        text = settings.prompt.format(question=question["question"], choices="\n".join(lines))
        if settings.chat:
            return backends.ScoreRequest(messages=({"role": "user", "content": text},), prompt=None, continuations=answers)
        return backends.ScoreRequest(messages=None, prompt=text, continuations=answers)

    for question, result in _each(questions, [request(q) for q in questions], backend):
        logprobs = np.array(result.logprobs) / (np.array(result.tokens) if settings.normalise == "mean" else 1.0)
        probs = np.exp(logprobs - logprobs.max())
        yield {"conversation_id": question["id"], "gold": question["answer"], "pred": int(logprobs.argmax()),
               "probs": [round(float(p), 6) for p in probs / probs.sum()], "sector": question.get("sector")}  # fmt: skip


def read_aloud(documents: Sequence[Mapping[str, Any]], backend: Any) -> Iterator[dict[str, Any]]:
    """Nats, bytes, characters and tokens of each document behind a line break, for all models alike."""
    from swallow_jax.generate import backends

    requests = [backends.ScoreRequest(messages=None, prompt="\n", continuations=(d["text"],)) for d in documents]
    for document, result in _each(documents, requests, backend):
        text = document["text"]
        yield {"conversation_id": document["id"], "nats": -float(result.logprobs[0]), "tokens": result.tokens[0],
               "bytes": len(text.encode()), "characters": len(text)}  # fmt: skip


def _each(items: Sequence, requests: Sequence, backend: Any) -> Iterator[tuple[Any, Any]]:
    by_key = {request.key: item for item, request in zip(items, requests, strict=True)}
    if len(by_key) < len(items):
        raise ValueError("two questions or documents are the same; remove one")
    for result in backend.score(requests):
        if not all(map(math.isfinite, result.logprobs)):
            raise ValueError(
                f"{backend.name} gives {list(result.logprobs)} for {by_key[result.key]['conversation_id']!r}; "
                "check the weights and that the text fits the context"
            )
        yield by_key.pop(result.key), result
    if by_key:
        raise ValueError(f"the backend left {len(by_key)} requests without an answer; run again")


Table = dict[tuple[str, str], dict[int, dict[str, Mapping[str, Any]]]]  # (model, test set) -> seed -> id -> row


def tables(rows: Sequence[Mapping[str, Any]]) -> Table:
    found: Table = {}
    for row in rows:
        by_seed = found.setdefault((row["model"], row["test_set"]), {})
        by_seed.setdefault(row["seed"], {})[row["conversation_id"]] = row
    return found


def scores(table: Table, statistics: metrics.Statistics) -> list[dict[str, Any]]:
    """One row of the results form for each model and set; several seeds are their mean."""
    found = []
    for (model, test_set), by_seed in table.items():
        common = {"model": model, "test_set": test_set, "n": len(next(iter(by_seed.values()))), "seeds": sorted(by_seed),
                  "metric_version": 1, "level": statistics.level}  # fmt: skip
        if _metric(by_seed) == ACCURACY:
            correct = float(_right(by_seed).sum(1).mean())
            low, high = stats.wilson(correct, common["n"], statistics.level)
            found.append(common | {"metric": ACCURACY, "correct": correct, "value": correct / common["n"], "ci95": [low, high],
                                   "interval": "wilson"})  # fmt: skip
            continue
        bits_I, bytes_I = _bits(by_seed)
        low, high = stats.ratio_bootstrap(
            bits_I, bytes_I, resamples=statistics.resamples, seed=statistics.seed, level=statistics.level
        )
        rows = [row for seed in by_seed.values() for row in seed.values()]
        ratio = sum(row["tokens"] for row in rows) / sum(row["characters"] for row in rows)
        found.append(common | {"metric": BITS, "correct": None, "value": float(bits_I.sum() / bytes_I.sum()), "ci95": [low, high],
                               "tokens_per_character": ratio, "interval": "bootstrap over documents"})  # fmt: skip
    return found


def kept(table: Table, declared: Sequence[Kept], statistics: metrics.Statistics) -> list[dict[str, Any]]:
    """A paired row of the results form for each declaration, with `margin`, `verdict` and the sentence that is printed.

    `diff` is after - before in the metric's own direction; the verdict looks at the interval of the worsening: 'kept' where
    all of it lies within the margin, 'lost' where all of it lies beyond, else 'open'.
    """
    found = []
    for entry in declared:
        sides = []
        for name in (entry.after, entry.before):
            if (name, entry.test_set) not in table or _metric(table[name, entry.test_set]) != entry.metric:
                known = ", ".join(f"{model} on {test_set}" for model, test_set in table)
                raise ValueError(f"config.kept: {name!r} has no {entry.metric} on {entry.test_set!r}; there are {known}")
            sides.append(table[name, entry.test_set])
        common = {"a": entry.after, "b": entry.before, "metric": entry.metric, "test_set": entry.test_set, "metric_version": 1}
        if entry.metric == ACCURACY:
            a_SI, b_SI = map(_right, sides)
            pairs = [str(number) for number in range(a_SI.shape[1])]
            row = metrics.paired_row(a_SI, b_SI, pairs, statistics)
            worse = [-end for end in reversed(row["ci95"])]
            unit, scale = "points", 100
        else:
            (a_I, bytes_I), (b_I, _) = map(_bits, sides)
            draw = {"seed": statistics.seed, "resamples": statistics.resamples, "level": statistics.level}
            p = stats.sign_flip_pairs(a_I[None], b_I[None], [str(n) for n in range(len(a_I))],
                                      permutations=statistics.permutations, seed=statistics.seed)  # fmt: skip
            row = {"n": len(a_I), "b01": None, "b10": None, "diff": float((a_I - b_I).sum() / bytes_I.sum()),
                   "ci95": list(stats.ratio_bootstrap(a_I - b_I, bytes_I, **draw)), "p_pairs": p, "p_mcnemar": None,
                   "mde": stats.mean_mde((a_I - b_I) * len(a_I) / bytes_I.sum(), level=statistics.level)}  # fmt: skip
            worse, unit, scale = row["ci95"], "bits per byte", 1
        verdict = "kept" if worse[1] <= entry.margin else "lost" if worse[0] > entry.margin else "open"
        words = {
            "kept": "ability kept within the margin",
            "lost": "ability lost beyond the margin",
            "open": "not decided: the interval crosses the margin",
        }[verdict]
        change = f"{scale * row['diff']:+.3g} {unit} [{scale * row['ci95'][0]:+.3g}, {scale * row['ci95'][1]:+.3g}]"
        sentence = f"{entry.test_set}, {entry.after} - {entry.before}: {change}, margin {scale * entry.margin:g}: {words}"
        found.append(common | row | {"margin": entry.margin, "verdict": verdict, "sentence": sentence})
    return found


def _metric(by_seed: Mapping[int, Mapping[str, Mapping]]) -> str:
    return BITS if "nats" in next(iter(next(iter(by_seed.values())).values())) else ACCURACY


def _ids(by_seed: Mapping[int, Mapping[str, Any]]) -> list[str]:
    ids = [sorted(rows) for rows in by_seed.values()]
    if any(other != ids[0] for other in ids):
        raise ValueError("the seeds of a model answered different questions; run the evaluation again, it goes on")
    return ids[0]


def _right(by_seed: Mapping[int, Mapping[str, Mapping]]) -> np.ndarray:
    ids = _ids(by_seed)
    return np.array([[by_seed[s][i]["gold"] == by_seed[s][i]["pred"] for i in ids] for s in sorted(by_seed)], dtype=float)


def _bits(by_seed: Mapping[int, Mapping[str, Mapping]]) -> tuple[np.ndarray, np.ndarray]:
    ids = _ids(by_seed)
    bits_SI = np.array([[by_seed[s][i]["nats"] / math.log(2) for i in ids] for s in sorted(by_seed)])
    return bits_SI.mean(0), np.array([by_seed[min(by_seed)][i]["bytes"] for i in ids], dtype=float)
