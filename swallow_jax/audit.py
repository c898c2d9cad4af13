"""What people decided about verdicts: a sample of the unflagged to look at, gold data with an audit trail, recall in the field.

A checker that is only looked at where it flags never learns what it misses. So a share of the unflagged conversations, drawn by
the hash of each, goes to the reviewers too; the sample stands for all of them, and so gives recall and prevalence with intervals.
"""

import collections
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import check, run, stats
from swallow_jax.task import Task, conversation_problem, load_task

DECISIONS = ("accept", "reject", "correct")
Row = Mapping[str, Any]


def drawn(input_sha256: str, rate: float, seed: int) -> bool:
    """Whether the audit sample holds this conversation; it follows from its hash, so from nobody's choice and no order."""
    draw = int(hashlib.sha256(f"{seed}/audit/{input_sha256}".encode()).hexdigest()[:16], 16)
    return draw < rate * 2**64


# Files beside the verdicts


def beside(verdicts: Path, kind: str) -> Path:
    """verdicts.jsonl -> verdicts.gold.jsonl and the like."""
    return verdicts.with_name(f"{verdicts.name.removesuffix('.jsonl')}.{kind}")


def is_at(path: Path) -> bool:
    """Whether this is the verdict file of a finished check."""
    return path.is_file() and beside(path, "manifest.json").is_file()


def opened(verdicts: Path) -> tuple[Task, list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]:
    """(task, verdicts, conversations by id, manifest) of a check, its transcripts read again through the same door."""
    manifest = json.loads(beside(verdicts, "manifest.json").read_text(encoding="utf-8"))
    if "result" not in manifest:
        raise ValueError(f"{verdicts}: the check is not finished; run tools.check again with the same flags, it goes on")
    made = manifest["made_of"]
    source, task = Path(made["input"]["path"]), load_task(made["task"]["path"])
    if task.spec_sha256 != made["task"]["sha256"]:
        raise ValueError(f"{task.folder} has changed since {verdicts} was made; use the task it was made with, or check again")
    if not source.is_file() or run.sha256_file(source) != made["input"]["sha256"]:
        raise ValueError(f"{source} is gone or has changed since {verdicts} was made; put the same file back, or check again")
    intake = run.build(check.Intake, made["intake"], "manifest.intake")
    talks = {c["conversation_id"]: c for c in check.read_transcripts(source, task, intake).conversations}
    return task, run.read_jsonl(verdicts), talks, manifest


# Decisions in


def read_decisions(path: Path) -> list[dict[str, Any]]:
    """The lines that the review page's download holds, each with `where`."""
    rows = [row | {"where": f"{path}:{number}"} for number, row in run.numbered_jsonl(path)]
    for row in rows:
        for field in ("conversation_id", "input_sha256", "decision", "reason", "reviewer", "decided_at"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{row['where']}: {field!r} is missing; give the file that the review page downloads, as it is")
        if row["decision"] not in DECISIONS:
            raise ValueError(f"{row['where']}: decision {row['decision']!r} is unknown; known: {', '.join(DECISIONS)}")
        if not row["reviewer"].strip():
            raise ValueError(f"{row['where']}: no reviewer; an audit trail says who decided")
        try:
            when = datetime.datetime.fromisoformat(row["decided_at"])
        except ValueError:
            when = None
        if when is None or when.tzinfo is None:
            raise ValueError(f"{row['where']}: decided_at is {row['decided_at']!r}; a time with its zone is wanted")
    return rows


def judge(verdicts: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Take decisions in: the trail grows, gold and review are made anew from all of it. Returns the review.

    verdicts.trail.jsonl    every decision ever imported, with what was predicted and the file it came in
    verdicts.gold.jsonl     conversations with the labels people gave, `meta.review` says who, when, why, what was predicted
    verdicts.review.json    agreement, precision, and recall and prevalence once flagged and audited ones are all decided

    Of several decisions on one conversation the latest counts; where two people differ, that is counted.
    """
    task, found, talks, manifest = opened(verdicts)
    by_id = {v["conversation_id"]: v for v in found}
    fresh = [_entry(task, row, by_id, talks) for row in rows]
    path = beside(verdicts, "trail.jsonl")
    trail = run.read_jsonl(path) if path.is_file() else []
    known = {_same(entry) for entry in trail}
    trail += [entry for entry in fresh if _same(entry) not in known]
    latest: dict[str, dict[str, Any]] = {}
    people: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    for entry in sorted(trail, key=lambda entry: datetime.datetime.fromisoformat(entry["decided_at"])):
        latest[entry["conversation_id"]] = entry
        people[entry["conversation_id"]][entry["reviewer"]] = entry["labels"]
    gold = [_gold(talks[v["conversation_id"]], latest[v["conversation_id"]]) for v in found if v["conversation_id"] in latest]
    twice = [list(given.values()) for given in people.values() if len(given) > 1]
    counts = collections.Counter(entry["decision"] for entry in latest.values())
    result = {
        "reviewed": len(latest), **{name: counts[name] for name in DECISIONS},
        "reviewers": sorted({entry["reviewer"] for entry in trail}),
        "read_by_several": len(twice), "of_these_agreed": sum(all(x == given[0] for x in given) for given in twice),
        "without_evidence": sum(_lacks_evidence(task, row) for row in gold),
        "field": field(found, {name: bool(entry["labels"]) for name, entry in latest.items()}, manifest["made_of"]["audit"]),
        "gold": str(beside(verdicts, "gold.jsonl")), "trail": str(path),
    }  # fmt: skip
    run.write_jsonl(path, trail)
    run.write_jsonl(beside(verdicts, "gold.jsonl"), gold)
    run.write_json(beside(verdicts, "review.json"), result)
    return result


def _same(entry: Row) -> str:
    return run.sha256_json({name: value for name, value in entry.items() if name != "imported_from"})


def _entry(task: Task, row: Row, verdicts: Mapping[str, Row], talks: Mapping[str, Row]) -> dict[str, Any]:
    """A line of the trail. What was predicted comes from the verdict file: a page can be edited."""
    name, where = row["conversation_id"], row["where"]
    if name not in verdicts or name not in talks:
        raise ValueError(f"{where}: conversation_id {name!r} is not among the verdicts; name the file its page is of")
    predicted = verdicts[name]
    if row["input_sha256"] != predicted["input_sha256"]:
        raise ValueError(f"{where}: decided on another text of {name!r}; make a new page of these verdicts and decide again")
    labels = [v["category"] for v in predicted["violations"]]
    evidence = [{k: e[k] for k in ("category", "turn", "quote")} for v in predicted["violations"] for e in v["evidence"]]
    missing = list(dict.fromkeys(item for v in predicted["violations"] for item in v["missing_items"]))
    if row["decision"] == "reject":
        if not labels:
            raise ValueError(f"{where}: there is no finding to reject in {name!r}; accept it, or correct it")
        labels, evidence, missing = [], [], []
    if row["decision"] == "correct":
        labels, evidence, missing = (row.get(field) or [] for field in ("labels", "evidence", "missing_items"))
    if len(labels) > 1 and task.label_policy != "multi" and row["decision"] == "correct":
        raise ValueError(f"{where}: labels {labels} names {len(labels)} categories, this task has one answer; choose the worst")
    entry = {"labels": labels, "evidence": evidence, "missing_items": missing}
    said = [turn["text"] for turn in talks[name]["turns"]]
    for item in evidence if isinstance(evidence, list) else ():  # told here, without the words themselves
        quote = item.get("quote") if isinstance(item, dict) else None
        if not isinstance(quote, str) or not any(quote in words for words in said):
            raise ValueError(f"{where}: a quote of {name!r} stands in no turn; give the file that the page downloads, as it is")
    if problem := conversation_problem({**talks[name], **entry}, task):
        raise ValueError(f"{where}: {problem}")
    about = {k: row[k] for k in ("conversation_id", "input_sha256", "decision", "reason", "reviewer", "decided_at")}
    predictions = {"verdict": predicted["verdict"], "score": predicted["score"], "audit": bool(predicted.get("audit"))}
    predictions["labels"] = [v["category"] for v in predicted["violations"]]
    facts = {"model": predicted["model"], "taxonomy": predicted["taxonomy"], "imported_from": Path(where.rpartition(":")[0]).name}
    return about | entry | {"predicted": predictions} | facts


def _gold(talk: Row, entry: Row) -> dict[str, Any]:
    answer = {name: entry[name] for name in ("labels", "evidence", "missing_items")}
    review = {name: value for name, value in entry.items() if name not in (*answer, "conversation_id")}
    return {**talk, **answer, "meta": {**talk.get("meta", {}), "review": review}}


def _lacks_evidence(task: Task, row: Row) -> bool:
    quoted = {item["category"] for item in row["evidence"]}
    return any(task.category(label).kind == "utterance" and label not in quoted for label in row["labels"])


# The field


def field(
    verdicts: Sequence[Row], violating: Mapping[str, bool], audit: Mapping[str, Any], level: float = 0.95
) -> dict[str, Any]:  # fmt: skip
    """What the decisions say about all conversations of this check, not only those that somebody read.

    Flagged ones count one each, audited ones as many as they were drawn from. Recall and prevalence, with exact intervals for
    the finite number of conversations, stand once every flagged and every audited one is decided: people begin with the
    highest scores, and what they have not reached is no random part.
    """
    flagged = [v["conversation_id"] for v in verdicts if v["verdict"] != "no_violation"]
    sample = [v["conversation_id"] for v in verdicts if v.get("audit")]
    unflagged = len(verdicts) - len(flagged)
    hits = sum(violating.get(name, False) for name in flagged)
    decided = sum(name in violating for name in flagged)
    result: dict[str, Any] = {
        "conversations": len(verdicts), "flagged": len(flagged), "flagged_decided": decided, "flagged_violating": hits,
        "precision": hits / decided if decided else None,
        "precision_ci95": list(stats.wilson(hits, decided, level)) if decided else None,
        "unflagged": unflagged, "audit_rate": audit["rate"], "audited": len(sample),
        "audited_decided": sum(name in violating for name in sample),
        "audited_violating": sum(violating.get(name, False) for name in sample),
        "missed": None, "missed_ci95": None, "prevalence": None, "prevalence_ci95": None, "recall": None, "recall_ci95": None,
    }  # fmt: skip
    if decided < len(flagged) or result["audited_decided"] < len(sample):
        left = len(flagged) - decided, len(sample) - result["audited_decided"]
        return result | {"note": f"not estimated yet: {left[0]} flagged and {left[1]} audited conversations are undecided"}
    if unflagged and not sample:
        return result | {"note": "not estimated: no unflagged conversation was drawn; set --audit_rate, or raise it"}
    found, total = result["audited_violating"], len(verdicts)
    missed = unflagged * found / len(sample) if sample else 0.0
    low, high = stats.hypergeometric_interval(found, len(sample), unflagged, level) if sample else (0, 0)
    result |= {"missed": missed, "missed_ci95": [low, high]}
    if total:
        result |= {"prevalence": (hits + missed) / total, "prevalence_ci95": [(hits + low) / total, (hits + high) / total]}
    if hits + missed:
        ends = [hits / (hits + high), hits / (hits + low) if hits + low else 1.0]
        result |= {"recall": hits / (hits + missed), "recall_ci95": ends}
    return result | {"note": f"of these {total} conversations; an audited one stands for {unflagged / max(1, len(sample)):.1f}"}
