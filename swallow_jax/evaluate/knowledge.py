"""What a model knows beside the task: multiple-choice questions, bits per byte on held-out slices, and what an adaptation cost.

Rows have the form of predictions (`conversation_id` is the id of a question or document), so that they are kept and resumed in
the same way. A verdict on forgetting needs a margin, written in the config before the run.
"""

import contextlib
import dataclasses
import json
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
    """`prompt` has {question} and {choices}; `answers` are what is scored for the choices, or () for their own texts."""

    files: tuple[str, ...]
    prompt: str
    choice: str  # one line of {choices}, with {answer} and {text}; "" leaves them out
    answers: tuple[str, ...]  # A to F, say, of which a question with four choices takes the first four
    chat: bool  # as a user's message; otherwise as plain text that goes on, for base models
    normalise: str  # 'sum' of log-probabilities, or their 'mean' by token where the answers are texts of unequal length

    def __post_init__(self):
        if "{question}" not in self.prompt or self.normalise not in ("sum", "mean"):
            raise ValueError("config.questions: prompt needs {question}, normalise is 'sum' or 'mean'")
        if 0 < len(self.answers) < 4:
            raise ValueError(
                f"config.questions.answers has {len(self.answers)} entries; write four or more, or none for the choices' texts"
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


def set_name(path: str | Path) -> str:
    """What a file of questions is called in the results: its stem, or its folder where that says more (pfnet's data.json)."""
    path = Path(path)
    return path.parent.name if path.name == "data.json" else path.stem


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Questions of our JSONL, four choices each, or of pfnet's files; each checked, ValueError names file, line and remedy."""
    if Path(path).suffix in (".json", ".xlsx"):
        return _some(_pfnet(Path(path)), path)
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


# The multiple-choice sets of the Japanese LM Financial Evaluation Harness (pfnet-research/japanese-lm-fin-harness), folder
# jlm_fin_eval/datasets of a local copy: cma_basics, fp2 and security_sales_1 are a data.json each, {"data": [{"id", "question",
# "context", "choices": [{"id", "text"}], "answer": the id of the right choice, "comment"}]}, of two choices or more.
# cpa/CPA_AUDIT.xlsx is a table with the columns question, ア to カ (statements), 1 to 6 (choices), a_no (number of the right one)
# and abnormal_flg (1: left out, as they do). Their licences and sources stand in that repository; nothing of them is kept here.


def _pfnet(path: Path) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for where, row in _pfnet_json(path) if path.suffix == ".json" else _pfnet_table(path):
        texts = [choice.get("text") if isinstance(choice, dict) else None for choice in row["choices"]]
        ids = [choice.get("id") if isinstance(choice, dict) else None for choice in row["choices"]]
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise ValueError(f"{path}: {where}: 'question' is {row['question']!r}; text is wanted")
        if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts) or len(set(ids)) < len(ids):
            raise ValueError(f"{path}: {where}: 'choices' must be two or more {{id, text}} with ids of their own")
        if row["answer"] not in ids:
            raise ValueError(f"{path}: {where}: the answer {row['answer']!r} is the id of no choice; there are {ids}")
        if row["id"] in seen:
            raise ValueError(f"{path}: {where}: the id {row['id']!r} stands twice; ids must be unique")
        seen.add(row["id"])
        name = f"{set_name(path)}-{row['id']}"
        question = "\n".join(filter(None, [row["question"], row.get("context")]))
        rows.append({"id": name, "conversation_id": name, "question": question, "choices": texts,
                     "answer": ids.index(row["answer"])})  # fmt: skip
    return rows


def _pfnet_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f"{path}: no list 'data'; a file of pfnet's is {{'data': [question, ...]}}, ours is JSONL")
    for number, row in enumerate(content["data"], 1):
        where = f"question {number}"
        if not isinstance(row, dict) or not isinstance(row.get("choices"), list) or not {"id", "question", "answer"} <= set(row):
            raise ValueError(f"{path}: {where} lacks one of id, question, choices, answer; copy the file again")
        yield where, row


def _pfnet_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading a workbook needs openpyxl: pip install 'swallow_jax[data]'") from None
    with contextlib.closing(openpyxl.load_workbook(path, read_only=True)) as book:
        header, *lines = ([*row] for row in book.active.iter_rows(values_only=True))
    header = [str(cell) for cell in header]
    if missing := {"question", "a_no", "abnormal_flg", "1", "2"} - set(header):
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; pfnet's table has question, ア to カ, 1 to 6, a_no")
    for number, line in enumerate(lines, 2):
        cells = dict(zip(header, line, strict=False))
        if cells["question"] is None or cells["abnormal_flg"] == 1:
            continue
        said = [f"{mark}: {cells[mark]}" for mark in "アイウエオカ" if cells.get(mark) is not None]
        choices = [{"id": n, "text": str(cells[str(n)])} for n in range(1, 7) if cells.get(str(n)) is not None]
        yield f"row {number}", {"id": number, "question": str(cells["question"]), "context": "\n".join(said), "choices": choices,
                                "answer": cells["a_no"]}  # fmt: skip


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
    """A row without names for each question: gold and pred as numbers of choices, and their probabilities."""
    from swallow_jax.generate import backends

    def request(question: Mapping[str, Any]) -> Any:
        if settings.answers and len(settings.answers) < len(question["choices"]):
            raise ValueError(f"{question['id']} has {len(question['choices'])} choices; add letters to config.questions.answers")
        answers = settings.answers[: len(question["choices"])] or tuple(question["choices"])
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
