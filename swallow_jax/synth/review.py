"""Experts read what was synthesised, for `tools.review`: conversations to draw, their answers to take in as agreement and gold.

The table shows a text without its planned label, so that agreement means something. The expert fills `expert` (an answer of the
task, in a multi-label task several; nothing for "not read"), `quote` (words of the text that show it) and `missing_items` (what
was left unsaid, separated by semicolons); both may stay empty where the planned label is confirmed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run
from swallow_jax.synth import checks, pipeline, plan
from swallow_jax.task import INVALID, Task, conversation_problem, load_task

COLUMNS = ("conversation_id", "text", "answers", "expert", "quote", "missing_items", "comment")


def is_at(folder: Path) -> bool:
    """Whether this is the folder of a finished synthesis."""
    return (folder / "accepted.jsonl").is_file() and (folder / "plan_counts.json").is_file()


def draw(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` accepted conversations, evenly over the classes, in an order that tells nothing."""
    task = _task(folder)
    ids: dict[str, list[str]] = {}
    for row in run.iter_jsonl(folder / "accepted.jsonl"):
        ids.setdefault(task.answer(row["labels"]), []).append(row["conversation_id"])
    queues = [plan.shuffled(sorted(of), f"{seed}/review/{label}") for label, of in sorted(ids.items())]
    chosen: list[str] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    wanted = set(chosen[:count])
    found = {row["conversation_id"]: row for row in run.iter_jsonl(folder / "accepted.jsonl") if row["conversation_id"] in wanted}
    return [
        {
            "conversation_id": name,
            "text": pipeline.numbered(found[name]["turns"]),
            "answers": task.list_mark.join(task.labels),
            "decision": task.answer(found[name]["labels"]),  # counted, and not among the columns
            "expert": "",
        }
        for name in plan.shuffled(sorted(wanted), f"{seed}/review")
    ]


def judge(folder: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Write review.json (counts, agreement, Cohen's kappa) and gold.jsonl (the reviewed conversations as the experts have them).

    `rows` have COLUMNS and `where`. Raises ValueError naming the table's row and the remedy for an unknown conversation, an
    answer that is no label, a quote that isn't in the text.
    """
    task, gold, planned, given = _task(folder), [], [], []
    judged = [row for row in rows if row["expert"].strip()]
    if not judged:
        raise ValueError("no row has an answer in its column `expert`; fill in one of `answers`")
    wanted = {row["conversation_id"].strip() for row in judged}
    known = {row["conversation_id"]: row for row in run.iter_jsonl(folder / "accepted.jsonl") if row["conversation_id"] in wanted}
    for cells in judged:
        name, answer, where = cells["conversation_id"].strip(), cells["expert"].strip(), cells["where"]
        if name not in known:
            raise ValueError(
                f"{where}: conversation_id {name!r} is not among {folder / 'accepted.jsonl'}; name the folder it is from"
            )
        found = task.parse_labels(answer)
        if found == INVALID:
            raise ValueError(
                f"{where}: expert={answer!r} is no answer; write one of: {', '.join(task.labels)}, or leave it empty"
            )
        if len(found) > 1 and task.label_policy != "multi":
            raise ValueError(
                f"{where}: expert={answer!r} names {len(found)} categories, this task has one answer; choose the worst"
            )
        row = known[name]
        corrected = _corrected(task, row, list(found), cells, where)
        corrected["meta"] = {**row.get("meta", {}), "review": {"planned": list(row["labels"]), "comment": cells["comment"]}}
        if problem := conversation_problem(corrected, task):
            raise ValueError(f"{where}: {problem}")
        gold.append(corrected)
        planned.append(task.answer(row["labels"][:1] if task.label_policy != "multi" else row["labels"]))
        given.append(task.answer(found))
    table: dict[str, dict[str, int]] = {}
    for a, b in zip(planned, given, strict=True):
        table.setdefault(a, {}).setdefault(b, 0)
        table[a][b] += 1
    agreed = sum(a == b for a, b in zip(planned, given, strict=True))
    result = {
        "reviewed": len(gold),
        "agreed": agreed,
        "changed": len(gold) - agreed,
        "kappa": checks.cohen_kappa(planned, given),
        "by_class": table,
        "gold": str(folder / "gold.jsonl"),
    }
    run.write_jsonl(folder / "gold.jsonl", gold)
    run.write_json(folder / "review.json", result)
    return result


def _task(folder: Path) -> Task:
    return load_task(json.loads((folder / "config.json").read_text(encoding="utf-8"))["task"])


def _corrected(task: Task, row: Mapping[str, Any], labels: list[str], cells: Mapping[str, str], where: str) -> dict[str, Any]:
    quote = cells["quote"].strip()
    missing = [item.strip() for item in cells["missing_items"].split(";") if item.strip()]
    evidence = [dict(item) for item in row["evidence"] if item["category"] in labels]
    if quote:
        turn = next((i for i, turn in enumerate(row["turns"]) if quote in turn["text"]), None)
        if turn is None:
            raise ValueError(f"{where}: quote={quote!r} stands in no turn; copy it exactly from one turn of the text")
        if not labels:
            raise ValueError(f"{where}: quote is given for {task.answer(labels)!r}; evidence belongs to a category")
        evidence = [item for item in evidence if item["category"] != labels[0]]
        evidence.insert(0, {"category": labels[0], "turn": turn, "quote": quote})
    quoted = {item["category"] for item in evidence}
    for label in labels:
        if task.category(label).kind == "utterance" and label not in quoted:
            raise ValueError(f"{where}: {task.label_text(label)!r} is said aloud; copy the words that show it into quote")
    kept = missing or (list(row["missing_items"]) if labels else [])
    return {**row, "labels": labels, "evidence": evidence, "missing_items": kept}
