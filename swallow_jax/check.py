"""Transcripts in, verdicts out: what `tools.check` does between the files of a compliance department and a model.

A transcript file is JSON lines (a conversation a line, or a turn a line), CSV or Excel (a turn a row, or a whole conversation
in one cell as lines `speaker：words`). What cannot be read is named by file and line, never by its words: messages of this room
quote no transcript. A verdict is design.md's row; its legal basis comes from the task's table, never from a model.
"""

import collections
import csv
import dataclasses
import datetime
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run, stats
from swallow_jax.data import filters, privacy, readers
from swallow_jax.evaluate import metrics, runner, windows
from swallow_jax.task import Category, Task, conversation_problem

_BLOCK = 512  # conversations asked together; one that a kill cut is asked anew, so that each answer keeps its company and bits
_MAX_BYTES = 64 << 20  # of a line or a file's cell
_LINE = re.compile(r"\s*([^：:]{1,40}?)\s*[：:]\s*(.*)", re.DOTALL)
_SUFFIXES = (".jsonl", ".csv", ".tsv", ".xlsx")

Conversation = dict[str, Any]
Row = Mapping[str, Any]


# Transcripts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intake:
    """How transcripts are read: names of columns and speakers in the file, what is masked, the day of talks without one."""

    columns: dict[str, str]  # conversation_id, speaker, text, date -> what the file calls them
    speakers: dict[str, str]  # what the file calls a speaker -> the task's name
    mask: tuple[str, ...]  # kinds of swallow_jax.data.privacy
    date: str | None  # ISO; chooses the rules in force

    def __post_init__(self):
        if unknown := sorted(set(self.columns) - {"conversation_id", "speaker", "text", "date"}):
            raise ValueError(f"columns: {unknown[0]!r} is unknown; ours are conversation_id, speaker, text, date")
        if unknown := sorted(set(self.mask) - set(privacy.TOKENS)):
            raise ValueError(f"mask: {unknown[0]!r} is unknown; known: {', '.join(privacy.TOKENS)}")
        if self.date is not None and _iso(self.date) is None:
            raise ValueError(f"date is {self.date!r}; write YYYY-MM-DD")


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """`problems` are sentences "file:line: what"; the conversations they belong to are not among `conversations`."""

    conversations: list[Conversation]
    problems: list[str]
    masked: dict[str, int]


def read_transcripts(path: str | Path, task: Task, intake: Intake, *, labelled: bool = False) -> Transcripts:
    """Conversations in the order of the file. `labelled` keeps their gold labels, which calibration needs."""
    path = Path(path)
    if readers.kind_of(path.name) not in _SUFFIXES:
        raise ValueError(f"{path}: transcripts are read from {', '.join(_SUFFIXES)}; save the file as one of these")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --input names the file with the transcripts")
    found: dict[str, Conversation] = {}
    first: dict[str, str] = {}
    broken: set[str] = set()
    problems: list[str] = []
    for row in _rows(path, intake.columns):
        if isinstance(row, readers.Failure):
            problems.append(f"{row.where}: {_WITHOUT_WORDS.get(row.kind, row.words)}")
            continue
        where, name = row["where"], str(row.get("conversation_id") or "").strip()
        one_turn = "turns" not in row and "speaker" in row
        if not name and one_turn:
            problems.append(f"{where}: no conversation_id; a row of one turn must say which conversation it belongs to")
            continue
        name = name or row["default_id"]
        wrong = [f"{where}: {what}" for what in _take(row, name, one_turn, found, first, where, task, intake)]
        problems += wrong
        if wrong:
            broken.add(name)
    masked: collections.Counter = collections.Counter()
    conversations = []
    for name, talk in found.items():
        if name in broken:
            continue
        talk["turns"] = [turn | {"text": _masked(turn["text"], intake.mask, masked)} for turn in talk["turns"]]
        if not labelled:
            talk |= {"labels": [], "evidence": [], "missing_items": []}
        if what := conversation_problem(talk, task):
            problems.append(f"{first[name]}: {what}")
        else:
            conversations.append(talk)
    return Transcripts(conversations, problems, dict(masked))


# Reasons whose own sentences would quote the file.
_WITHOUT_WORDS = {
    "no_text": "no column or field of this name holds the words; name yours with "
    "--columns=conversation_id=…,speaker=…,text=…  (a table's first row holds the names)",
    "damaged": "damaged; save or fetch the file again",
}


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any] | readers.Failure]:
    """A table's rows by our names; speaker and date are taken where the table has them."""
    piece = readers.Piece(path=path, name=path.name)
    if readers.kind_of(path.name) == ".jsonl":
        yield from readers.read(piece, readers.How(columns=columns, extract="whole", max_bytes=_MAX_BYTES))
        return
    rows: list = []
    for optional in (("speaker", "date"), ("speaker",), ("date",), ()):
        wanted = {name: columns.get(name, name) for name in ("conversation_id", "text", *optional)}
        rows = list(readers.read(piece, readers.How(columns=wanted, extract="whole", max_bytes=_MAX_BYTES)))
        if not rows or not (isinstance(rows[0], readers.Failure) and rows[0].kind == "no_text"):
            break
    yield from rows


def _take(
    row: Row, name: str, one_turn: bool, found: dict[str, Conversation], first: dict[str, str], where: str, task: Task,
    intake: Intake,
) -> Iterator[str]:  # fmt: skip
    """Add a row to the conversations found; yields what is wrong with it."""
    if name in found and not one_turn:
        yield f"conversation_id was already used at {first[name]}; give each conversation its own"
        return
    talk = found.setdefault(name, {"conversation_id": name, "turns": []})
    first.setdefault(name, where)
    for field in ("labels", "evidence", "missing_items"):
        talk.setdefault(field, row.get(field) or [])
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    if meta:
        talk["meta"] = meta
    if given := row.get("date") or meta.get("date"):
        talk["date"] = _iso(given)
        if talk["date"] is None:
            yield "its date is no day; write YYYY-MM-DD"
    elif intake.date:
        talk.setdefault("date", intake.date)
    for place, (speaker, words) in enumerate(_turns(row, one_turn, task), 1):
        what = "" if one_turn else f"turn {place}: "
        ours = intake.speakers.get(speaker, speaker)
        if not isinstance(words, str) or not words.strip():
            yield f"{what}no words; remove the row, or write what was said"
        elif not speaker:
            yield f"{what}no speaker; write who speaks: {', '.join(task.speakers)}"
        elif ours not in task.speakers:
            # Who speaks may be a person's name, so it is not repeated here.
            yield f"{what}a speaker unknown to the task ({', '.join(task.speakers)}); map it with --speakers=THEIRS=OURS"
        else:
            talk["turns"].append({"speaker": ours, "text": words})


def _turns(row: Row, one_turn: bool, task: Task) -> Iterator[tuple[str, Any]]:
    """(speaker as the file writes it, "" for none; words) of a row."""
    if isinstance(row.get("turns"), list):
        for turn in row["turns"]:
            turn = turn if isinstance(turn, dict) else {}
            yield str(turn.get("speaker") or "").strip(), turn.get("text")
    elif one_turn:
        yield str(row.get("speaker") or "").strip(), row["text"]
    elif task.form == "document":
        yield task.speakers[0], row["text"]
    else:
        for line in filter(str.strip, row["text"].splitlines()):
            labelled = _LINE.fullmatch(line)
            yield (labelled[1], labelled[2]) if labelled else ("", line)


def _iso(value: Any) -> str | None:
    try:
        return datetime.date.fromisoformat(str(value).strip()[:10].replace("/", "-")).isoformat()
    except ValueError:
        return None


def _masked(words: str, kinds: Sequence[str], counts: collections.Counter) -> str:
    if not kinds:
        return words
    # Masking knows half-width digits only; quotes are taken from what stands here afterwards.
    words, found = privacy.mask(filters.normalise(words)[0], kinds)
    counts.update(found)
    return words


def fingerprint(conversation: Row) -> str:
    """`input_sha256`: of what the model saw of a conversation, and of its id, so that equal talks keep their own decisions."""
    turns = [[turn["speaker"], turn["text"]] for turn in conversation["turns"]]
    return run.sha256_json([conversation["conversation_id"], turns])


# Asking


class _Log(runner.PredictionLog):
    """Answers kept line by line, with a bar for people at a terminal, or a line now and then for a log file."""

    def __init__(self, path: Path, total: int, what: str):
        from tqdm import tqdm

        super().__init__(path)
        self._bar = tqdm(total=total, initial=len(self.rows), desc=what, unit=" talks", disable=None, leave=False, smoothing=0)
        self._what, self._total = what, total

    def append(self, *rows: Row) -> None:
        super().append(*rows)
        self._bar.update(len(rows))
        if self._bar.disable and len(self.rows) % _BLOCK == 0:
            print(f"{self._what}: {len(self.rows):,} of {self._total:,}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
        super().close()


def ask(
    task: Task, conversations: Sequence[Row], backend: Any, *, asking: runner.Asking, log: Path, what: str
) -> dict[str, Row]:  # fmt: skip
    """The prediction row of every conversation, by id. `log` keeps them: a killed call goes on and gives the same rows."""
    blocks = [conversations[start : start + _BLOCK] for start in range(0, len(conversations), _BLOCK)]
    with runner.PredictionLog(log) as kept:
        have = {row["conversation_id"]: row for row in kept.rows}
    ids = [[c["conversation_id"] for c in block] for block in blocks]
    whole = [have[name] for block in ids if all(name in have for name in block) for name in block]
    if len(whole) < len(have):
        run.write_jsonl(log, whole)
    with _Log(log, len(conversations), what) as out:
        for block in blocks:
            runner.evaluate(task, block, backend, model=backend.name, test_set=what, seed=0, asking=asking, out=out)
        return {row["conversation_id"]: row for row in out.rows}


def grounds(
    task: Task, talks: Sequence[tuple[Row, Row]], backend: Any, *, asking: runner.Asking, most: int, log: Path
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """What a score rests on, where a model gives labels alone: the turns without which the category is less likely.

    `talks` are (conversation, its row); of each, up to `most` turns of the party whose conduct is checked, the weightiest
    first, as evidence with `drop`, the probability that goes with the turn.
    """
    variants, of = [], {}
    for conversation, _ in talks if most else ():
        turns = conversation["turns"]
        for place, turn in enumerate(turns):
            if turn["speaker"] == task.speakers[0] and len(turns) > 1:
                name = f"{conversation['conversation_id']}/without {place}"
                of[name] = place
                variants.append({**conversation, "conversation_id": name, "turns": turns[:place] + turns[place + 1 :]})
    rows = ask(task, variants, backend, asking=asking, log=log, what="evidence") if variants else {}
    found = {}
    for conversation, row in talks:
        name, category = conversation["conversation_id"], named(task, row)[0]
        without = [(rows[key]["probs"][category], of[key]) for key in _keys(conversation) if key in of]
        told = sorted((p, place) for p, place in without if p < row["probs"][category])[:most]
        found[name] = [
            {"category": category, "turn": place, "quote": conversation["turns"][place]["text"],
             "drop": round(row["probs"][category] - p, 4)}
            for p, place in told
        ]  # fmt: skip
    return found


def _keys(conversation: Row) -> list[str]:
    return [f"{conversation['conversation_id']}/without {place}" for place in range(len(conversation["turns"]))]


def named(task: Task, row: Row) -> list[str]:
    """The categories an answer names; for a compliant one the likeliest, if it has probabilities."""
    given = row.get("preds") or ([] if row["pred"] in (metrics.COMPLIANT, metrics.INVALID) else [row["pred"]])
    if given or not row.get("probs"):
        return list(given)
    return [max((c.id for c in task.categories), key=row["probs"].get)]


# Where a score becomes a verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """threshold None: as the model answers. Probabilities are tempered first, then moved from the share of violations
    that they were calibrated at (`fitted`) to the one in the field (`prevalence`)."""

    threshold: float | None
    temperature: float
    fitted: float | None
    prevalence: float | None

    def __post_init__(self):
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            raise ValueError(f"prevalence is {self.prevalence}; write the share of talks that violate, 0.001 for 0.1 %")

    def shown(self, score: float) -> float:
        """The probability at the field's prevalence (Bayes' rule; Saerens et al. 2002)."""
        if self.prevalence is None or self.fitted is None:
            return score
        up, down = self.prevalence / self.fitted, (1 - self.prevalence) / (1 - self.fitted)
        return score * up / (score * up + (1 - score) * down)


def chance_point(prevalence: float | None) -> Point:
    """Without a calibrated file: as the model answers; at a prevalence, what is likelier than not to violate, its
    probabilities taken for those of an even mixture, as twins are."""
    threshold = None if prevalence is None else 1 - prevalence
    return Point(threshold=threshold, temperature=1.0, fitted=None if prevalence is None else 0.5, prevalence=prevalence)


def calibrate(task: Task, conversations: Sequence[Row], rows: Mapping[str, Row], recall: float) -> dict[str, Any]:
    """An operating point from labelled conversations: temperature, and the threshold that finds this share of violations."""
    violating = [bool(c["labels"]) for c in conversations]
    mine = [rows[c["conversation_id"]] for c in conversations]
    if not any(violating) or all(violating):
        raise ValueError(
            f"{sum(violating)} of {len(violating)} conversations violate; an operating point needs both, in field 'labels'"
        )
    if not all(row.get("probs") for row in mine):
        raise ValueError("the model gives no probabilities in this mode; an operating point needs --asking=labels")
    temperature = 1.0
    if task.label_policy != "multi":
        labels = runner.label_ids(task)
        gold = [labels.index(runner.gold_label(c)) for c in conversations]
        temperature = stats.temperature([[row["probs"][label] for label in labels] for row in _normalised(mine)], gold)
    scores = [_score(row, temperature) for row in mine]
    threshold = stats.threshold_for_recall(scores, violating, recall)
    hits = sum(v and s >= threshold for v, s in zip(violating, scores, strict=True))
    alarms = sum(not v and s >= threshold for v, s in zip(violating, scores, strict=True))
    positives, negatives = sum(violating), len(violating) - sum(violating)
    return {
        "n": len(mine), "violations": positives, "wanted_recall": recall, "threshold": threshold, "temperature": temperature,
        "recall": hits / positives, "recall_ci95": list(stats.wilson(hits, positives)),
        "alarm": alarms / negatives, "alarm_ci95": list(stats.wilson(alarms, negatives)),
    }  # fmt: skip


def _normalised(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:  # probabilities are kept with eight digits
        total = math.fsum(row["probs"].values())
        yield {"probs": {label: p / total for label, p in row["probs"].items()}}


def _tempered(row: Row, temperature: float) -> dict[str, float]:
    if temperature == 1.0:
        return dict(row["probs"])
    return dict(zip(row["probs"], stats.tempered([list(row["probs"].values())], temperature)[0].tolist(), strict=True))


def _score(row: Row, temperature: float) -> float:
    return 1.0 - _tempered(row, temperature)[metrics.COMPLIANT]


def flagged(row: Row, point: Point) -> bool:
    """Whether a person should look: at the threshold or above it, or without a valid answer."""
    if not row["valid"]:
        return True
    if point.threshold is None or not row.get("probs"):
        return row["pred"] != metrics.COMPLIANT
    return _score(row, point.temperature) >= point.threshold


# Verdicts


def verdict(
    task: Task, conversation: Row, row: Row, *, point: Point, told: Sequence[Mapping[str, Any]], model: str
) -> dict[str, Any]:  # fmt: skip
    """design.md's verdict. 'needs_review' where the score asks for a person and the answer itself does not say violation: no
    valid answer, compliant but above the threshold, or omissions alone in windows of a long talk (another may say it)."""
    look, probs = flagged(row, point), _tempered(row, point.temperature) if row.get("probs") and row["valid"] else None
    categories = [task.category(name) for name in named(task, row)] if look and row["valid"] else []
    sure = row["pred"] != metrics.COMPLIANT and row["valid"]
    if row.get("windows", 1) > 1 and all(category.kind == "omission" for category in categories):
        sure = False
    written = _written(row)
    evidence = [*row.get("evidence", ()), *told]
    missing = list(row.get("missing_items") or ())
    violations = [
        {
            "category": category.id,
            "score": None if probs is None else round(point.shown(probs[category.id]), 6),
            "evidence": [dict(item) for item in evidence if item["category"] == category.id],
            "missing_items": missing if category.kind == "omission" else [],
            "rationale": written["rationales"].get(category.id, ""),
            "legal_basis": in_force(category, conversation.get("date")),
        }
        for category in categories
    ]
    said = {item["item"]: item for item in written["required_items"]}
    said |= {item: {"item": item, "status": "missing", "turn": None} for v in violations for item in v["missing_items"]}
    score = None if probs is None else round(point.shown(1.0 - probs[metrics.COMPLIANT]), 6)
    found = {
        "conversation_id": conversation["conversation_id"],
        "verdict": "no_violation" if not look else "violation" if sure else "needs_review",
        "score": score, "violations": violations, "required_items": list(said.values()),
        "model": model, "taxonomy": task.version, "input_sha256": fingerprint(conversation),
    }  # fmt: skip
    return found | ({"date": conversation["date"]} if "date" in conversation else {})


def in_force(category: Category, date: str | None) -> list[dict[str, Any]]:
    """The rules of a category on that day, each with its dates; all of them where the day is not known."""
    return [
        {name: value for name, value in dataclasses.asdict(basis).items() if value}
        for basis in category.legal_basis
        if date is None or basis.effective_from <= date <= (basis.effective_to or "9999-12-31")
    ]


def _written(row: Row) -> dict[str, Any]:
    """Rationales and required items of an answer in verdict form; of windows none, for one cannot speak for another."""
    body = row["raw"].strip().removeprefix("```json").removeprefix("```").strip()
    nothing = {"rationales": {}, "required_items": []}
    if not row["valid"] or not body.startswith("{"):
        return nothing
    try:
        answer, _ = json.JSONDecoder().raw_decode(body)
    except (json.JSONDecodeError, RecursionError):
        return nothing
    items = answer.get("required_items")
    return {
        "rationales": {
            v["category"]: v["rationale"] for v in answer.get("violations", ()) if isinstance(v.get("rationale"), str)
        },
        "required_items": [
            {"item": item["item"], "status": item["status"], "turn": item["turn"] if type(item.get("turn")) is int else None}
            for item in (items if isinstance(items, list) else ())
            if isinstance(item, dict) and isinstance(item.get("item"), str)
            and item.get("status") in ("explained", "missing", "not_applicable")
        ],
    }  # fmt: skip


def window_of(asking_tokens: int, max_length: int, overlap_turns: int) -> windows.Window:
    """Windows of whole turns that leave room for an answer of `asking_tokens`."""
    if max_length <= asking_tokens:
        raise ValueError(f"max_length={max_length} leaves no room beside an answer of {asking_tokens} tokens; raise it")
    return windows.Window(limit=max_length - asking_tokens, unit="tokens", overlap_turns=overlap_turns)


# The table beside it


def spreadsheet_cell(value: Any) -> str:
    """Text that a spreadsheet shows and does not run: what begins like a formula gets an apostrophe."""
    text = "".join(char for char in str(value) if char >= " " or char in "\n\t")
    return f"'{text}" if text[:1] in tuple("=+-@\t") else text


def table(task: Task, verdicts: Sequence[Row]) -> bytes:
    """The verdicts as CSV in UTF-8 with a mark, as Excel reads it; the surest violations first, the others in their order."""
    names = {c.id: c.name_ja if task.language == "ja" else c.name_en for c in task.categories}
    header = ["conversation_id", "verdict", "score", "categories", "evidence", "missing_items", "legal_basis", "audit"]
    lines = [
        [
            v["conversation_id"], v["verdict"], "" if v["score"] is None else v["score"],
            "; ".join(names[x["category"]] for x in v["violations"]),
            "\n".join(f"{e['turn'] + 1}: {e['quote']}" for x in v["violations"] for e in x["evidence"]),
            "; ".join(i for x in v["violations"] for i in x["missing_items"]),
            "; ".join(b["text"] for x in v["violations"] for b in x["legal_basis"]), "yes" if v.get("audit") else "",
        ]
        for v in sorted(verdicts, key=urgency)
    ]  # fmt: skip
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows([header, *([spreadsheet_cell(x) for x in line] for line in lines)])
    return out.getvalue().encode("utf-8-sig")


def urgency(found: Row) -> tuple:
    """The order of the queue: what has a finding first, the highest score first (an answer without one stands as sure)."""
    return found["verdict"] == "no_violation", -(1.0 if found["score"] is None else found["score"])
