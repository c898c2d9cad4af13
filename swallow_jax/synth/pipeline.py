"""Plan rows to verified chat samples: ask a Backend, keep every answer durably, parse, check, sort into kept and refused.

Asking is the only slow and fallible part, so it alone has state: answers are appended to `responses.jsonl` as they come, and a
killed job asks only for what is missing. Everything after it is a pure function of plan and answers, in plan order, so the
accepted set doesn't depend on the order of completion or on interruptions.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swallow_jax.generate import backends
from swallow_jax.synth import checks
from swallow_jax.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How a teacher is asked: a prompt of the task by name, and the sampling. top_k 0 and top_p 1 keep everything."""

    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


def request(task: Task, row: Mapping[str, Any], asking: Asking, limits: checks.Limits) -> backends.Request:
    """The request for a plan row. The label is known by construction: the teacher's seller follows an altered guideline."""
    category = task.category(row["category"])
    violates = row["variant"] == "violation"
    given = row["given"]["turns"] if row["given"] else []
    values = {
        "seed": row["seed"],
        "severity": "",
        **row["attributes"],
        **dataclasses.asdict(limits),
        "category": category.id,
        "name": category.name_ja,
        "definition": category.definition,
        "includes": " / ".join(category.includes),
        "excludes": " / ".join(category.excludes),
        "required_items": " / ".join(category.required_items),
        "label_json": json.dumps(category.id) if violates else "",
        "prefix": "\n".join(filter(None, [task.transcript(given), _cue(task, given)])),
    }
    values["guideline"] = task.render(f"guideline_{category.kind if violates else 'compliant'}", values)
    rendered = task.render(asking.prompt, values)
    sampling = {name: getattr(asking, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}
    is_text = isinstance(rendered, str)
    return backends.Request(
        prompt=rendered if is_text else None, messages=None if is_text else rendered, seed=row["seed"], **sampling
    )


def collect(requests: Sequence[backends.Request], backend: backends.Backend, path: pathlib.Path) -> dict[str, backends.Result]:
    """Results by request key; those already in the file `path` are not asked for again, new ones are appended to it."""
    return {result.key: result for result in backends.record(backend, path).generate(requests)}


def parse(text: str, row: Mapping[str, Any], task: Task, finish_reason: str) -> dict[str, Any] | tuple[str, str]:
    """A conversation from a teacher's answer, or (reason, detail).

    Two forms are understood: a JSON object with "turns", wherever it stands in the answer, and one turn a line. Lines carry no
    labels: the planned one holds, with the evidence of the opening that the plan gave (if it gave any).
    """
    common = {"conversation_id": row["plan_id"], "pair_id": row["pair_id"]}
    if not text.strip():
        return "empty", "the answer is blank"
    if found := _json_object(text):
        # Strangers' fields are dropped; missing ones stay missing and fail as "schema".
        return {**common, **{k: found[k] for k in ("turns", "labels", "evidence", "missing_items") if k in found}}
    planned = {
        "turns": [],
        "labels": [row["category"]] if row["variant"] == "violation" else [],
        "evidence": [],
        "missing_items": [],
    }
    given = row["given"] or planned
    lines = (_cue(task, given["turns"]) + text).splitlines()
    if finish_reason == "length":
        lines = lines[:-1]  # cut off in mid-sentence
    turns = _turns_of_lines(lines, task)
    if not turns:
        return "truncated" if finish_reason == "length" else "unparsable", f"neither JSON nor turns in {text[:60]!r}"
    kept = {k: given[k] for k in ("labels", "evidence", "missing_items")}
    return {**common, "turns": [*given["turns"], *turns], **kept}


def verify(
    task: Task,
    plan: Sequence[Mapping[str, Any]],
    answers: Mapping[str, backends.Result],
    test_sets: Mapping[str, Sequence[Mapping[str, Any]]],
    limits: checks.Limits,
    *,
    keep_pairs: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sort the planned conversations into (accepted, rejected), both in plan order.

    `answers` by plan_id. An accepted row is a conversation with `meta` (plan row, request key); a
    rejected one is `{"plan_id", "teacher", "category", "variant", "reason", "detail", "text"}`. With `keep_pairs` a twin whose
    other half fell is rejected too (`twin_rejected`), so that violating and compliant rows stay matched.
    """
    refused: dict[str, tuple[str, str]] = {}
    candidates: list[dict[str, Any]] = []
    for row in plan:
        if row["plan_id"] not in answers:
            refused[row["plan_id"]] = ("no_answer", "the backend returned nothing for this request")
            continue
        result = answers[row["plan_id"]]
        parsed = parse(result.text, row, task, result.finish_reason)
        problem = parsed if isinstance(parsed, tuple) else checks.first_problem(parsed, row, task, limits)
        if problem:
            refused[row["plan_id"]] = problem
            continue
        known = ("teacher", "split", "scenario", "attributes", "seed")
        meta = {"topic": row["category"], **{k: row[k] for k in known}, "request": result.key}
        candidates.append({**parsed, "meta": meta})
    protected = checks.protected_texts(test_sets, limits)
    for number, detail in checks.contaminated(candidates, protected, limits).items():
        refused[candidates[number]["conversation_id"]] = ("contamination", detail)
    candidates = [row for row in candidates if row["conversation_id"] not in refused]
    for number, earlier in checks.near_duplicates(candidates, limits).items():
        detail = f"nearly equals {candidates[earlier]['conversation_id']}"
        refused[candidates[number]["conversation_id"]] = ("near_duplicate", detail)
    if keep_pairs:
        fallen = {row["pair_id"]: row["plan_id"] for row in plan if row["plan_id"] in refused}
        for row in plan:
            if row["pair_id"] in fallen and row["plan_id"] not in refused:
                refused[row["plan_id"]] = ("twin_rejected", f"its twin {fallen[row['pair_id']]} was rejected")
    accepted = [row for row in candidates if row["conversation_id"] not in refused]
    rejected = []
    for row in plan:
        if row["plan_id"] in refused:
            reason, detail = refused[row["plan_id"]]
            text = answers[row["plan_id"]].text if row["plan_id"] in answers else ""
            known = {k: row[k] for k in ("plan_id", "teacher", "category", "variant")}
            rejected.append({**known, "reason": reason, "detail": detail, "text": text})
    return accepted, rejected


def relabel(task: Task, rows: Sequence[Mapping[str, Any]], backend: backends.Backend, *, prompt: str) -> list[str | None]:
    """Labels that an independent backend gives blind: the likeliest of the closed labels for each conversation."""
    requests = [backends.ScoreRequest(prompt=None, messages=task.prompt(row, prompt), continuations=task.labels) for row in rows]
    found = {result.key: result.logprobs for result in backend.score(requests)}
    return [task.label_ids[max(range(len(task.labels)), key=lambda i, r=r: found[r.key][i])] for r in requests]


def chat_samples(task: Task, rows: Iterable[Mapping[str, Any]], *, prompt: str) -> list[dict[str, Any]]:
    """SFT samples: the classification prompt, and the label's text as the assistant's turn."""
    samples = []
    for row in rows:
        label = task.primary(row)
        messages = [*task.prompt(row, prompt), {"role": "assistant", "content": task.label_text(label)}]
        samples.append(
            {
                "id": row["conversation_id"],
                "messages": messages,
                "pair_id": row["pair_id"],
                "label": label,
                "teacher": row["meta"]["teacher"],
            }
        )
    return samples


def tally(rejected: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Rejections by reason, most frequent first."""
    return dict(collections.Counter(row["reason"] for row in rejected).most_common())


def _cue(task: Task, given: Sequence[Mapping[str, str]]) -> str:
    """The head of the next turn after `given`, which a continuing teacher starts from."""
    if not given:
        return ""
    others = [speaker for speaker in task.speakers if speaker != given[-1]["speaker"]]
    return task.turn_format.split("{text}")[0].format(speaker=others[0])


def _turns_of_lines(lines: Iterable[str], task: Task) -> list[dict[str, str]]:
    """Lines of the form 'speaker: text'; the first line that isn't one ends the conversation."""
    head = re.compile(rf"\s*({'|'.join(map(re.escape, task.speakers))})\s*[:：]\s*(\S.*)")
    turns = []
    for line in lines:
        if not line.strip():
            continue
        match = head.fullmatch(line.rstrip())
        if not match:
            break
        turns.append({"speaker": match[1], "text": match[2]})
    return turns


def _json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object with "turns" in a text that may hold fences or chatter around it."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(value, dict) and "turns" in value:
            return value
    return None
