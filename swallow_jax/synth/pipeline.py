"""What is asked of a teacher, and what its answer means: requests by stage, parsing, blind labels. Pure but for `relabel`.

The stages of a conversation: the teacher writes it (the violating twin first, where the compliant one is made by editing it),
names label and evidence with it or when asked a second time, and an independent model labels it blind. `synth.rounds` runs them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from swallow_jax.generate import backends
from swallow_jax.synth import checks, plan
from swallow_jax.task import INVALID, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How a teacher is asked: prompts of the task by name, and the sampling. top_k 0 and top_p 1 keep everything.

    `twin`: the prompt that makes the compliant twin by editing the violating one ({{twin}}); None: each is written for itself.
    `evidence`: the prompt that asks a second time, for label and quotes of what was written; None: the answer brings them along.
    """

    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    twin: str | None
    evidence: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blind:
    """How an independent model is asked: 'labels' scores the closed answers, 'generate' lets it write `votes` times."""

    mode: str
    prompt: str
    votes: int
    temperature: float
    max_new_tokens: int
    agree: bool  # reject what it labels otherwise

    def __post_init__(self):
        if self.mode not in ("labels", "generate"):
            raise ValueError(f"verifier.mode is {self.mode!r}; write 'labels' or 'generate'")
        if self.votes < 1 or (self.votes > 1 and (self.mode == "labels" or self.temperature == 0)):
            raise ValueError(
                f"verifier.votes={self.votes} with mode {self.mode!r} and temperature {self.temperature}: several votes "
                "need mode 'generate' and a temperature above zero"
            )


def request(
    task: Task, row: Mapping[str, Any], asking: Asking, limits: checks.Limits, twin: Mapping[str, Any] | None = None
) -> backends.Request:
    """The request for a plan row. The label is known by construction: the teacher's seller follows an altered guideline."""
    given = row["given"]["turns"] if row["given"] else []
    values = _values(task, row, limits) | {
        "prefix": "\n".join(filter(None, [task.transcript(given), _cue(task, given)])),
        "twin": task.transcript(twin["turns"]) if twin else "",
    }
    return _request(task.render(asking.twin if twin else asking.prompt, values), asking, row["seed"])


def evidence_request(
    task: Task, row: Mapping[str, Any], asking: Asking, limits: checks.Limits, conversation: Mapping[str, Any]
) -> backends.Request:
    """The second question about a violating conversation: which words show it, and what was left unsaid. Asked without chance."""
    values = _values(task, row, limits) | {"conversation": numbered(conversation["turns"])}
    return _request(task.render(asking.evidence, values), dataclasses.replace(asking, temperature=0.0, stop=()), row["seed"])


def numbered(turns: Sequence[Mapping[str, str]]) -> str:
    """Turns with their numbers, one a line, for questions about turns."""
    return "\n".join(f"[{i}] {turn['speaker']}: {' '.join(turn['text'].split(chr(10)))}" for i, turn in enumerate(turns))


def _values(task: Task, row: Mapping[str, Any], limits: checks.Limits) -> dict[str, Any]:
    category = task.category(row["category"])
    violates = row["variant"] == "violation"
    values = {
        "seed": row["seed"],
        "severity": "",
        "persona": row.get("persona", ""),
        **row["attributes"],
        **_sizes(limits),
        "label_json": ", ".join(map(json.dumps, plan.labels(row))),
    }
    guidelines = []
    for one in [category, *map(task.category, row.get("also", ()))]:
        kind = one.kind if violates else "compliant"
        guidelines.append(task.render(f"guideline_{kind}", values | _about(one)))
    return values | _about(category) | {"guideline": "\n\n".join(guidelines)}


@functools.lru_cache(maxsize=4)
def _sizes(limits: checks.Limits) -> dict[str, int]:
    return {name: getattr(limits, name) for name in ("min_turns", "max_turns", "min_chars", "max_chars")}


@functools.lru_cache(maxsize=64)
def _about(category: Any) -> dict[str, str]:
    return {
        "category": category.id,
        "name": category.name_ja,
        "definition": category.definition,
        "includes": " / ".join(category.includes),
        "excludes": " / ".join(category.excludes),
        "near_miss": " / ".join(category.near_miss),
        "required_items": " / ".join(category.required_items),
    }


def _request(rendered: Any, asking: Asking, seed: int) -> backends.Request:
    sampling = {name: getattr(asking, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}
    is_text = isinstance(rendered, str)
    return backends.Request(prompt=rendered if is_text else None, messages=None if is_text else rendered, seed=seed, **sampling)


def parse(text: str, row: Mapping[str, Any], task: Task, finish_reason: str) -> dict[str, Any] | tuple[str, str]:
    """A conversation from a teacher's answer, or (reason, detail).

    Three forms are understood: a JSON object with "turns" (of documents, "text"), wherever it stands in the answer; one turn a
    line; and, for documents, the bare text. Without JSON there are no labels: the planned ones hold, with the evidence of the
    opening that the plan gave (if it gave any).
    """
    common = {"conversation_id": row["plan_id"], "pair_id": row["pair_id"]}
    if not text.strip():
        return "empty", "the answer is blank"
    if found := _json_object(text, "turns" if task.form == "dialogue" else "text"):
        if task.form == "document":
            found = {**found, "turns": [{"speaker": task.speakers[0], "text": found["text"]}]}
        # Strangers' fields are dropped; missing ones stay missing and fail as "schema".
        return {**common, **{k: found[k] for k in ("turns", "labels", "evidence", "missing_items", "rationale") if k in found}}
    if text.lstrip().startswith(("{", "```json")):
        return "truncated" if finish_reason == "length" else "unparsable", f"no whole JSON in {text[:60]!r}"
    planned = {"turns": [], "labels": plan.labels(row), "evidence": [], "missing_items": []}
    given = row["given"] or planned
    if task.form == "document":
        if finish_reason == "length":
            return "truncated", f"cut off behind {text[-40:]!r}"
        turns = [{"speaker": task.speakers[0], "text": text.strip()}]
    else:
        lines = (_cue(task, given["turns"]) + text).splitlines()
        if finish_reason == "length":
            lines = lines[:-1]  # cut off in mid-sentence
        turns = _turns_of_lines(lines, task)
    if not turns:
        return "truncated" if finish_reason == "length" else "unparsable", f"neither JSON nor turns in {text[:60]!r}"
    kept = {k: given[k] for k in ("labels", "evidence", "missing_items")}
    return {**common, "turns": [*given["turns"], *turns], **kept}


def with_evidence(conversation: Mapping[str, Any], text: str) -> dict[str, Any] | tuple[str, str]:
    """The conversation with label, quotes and missing items from the second answer, or (reason, detail)."""
    found = _json_object(text, "evidence")
    if found is None:
        return "evidence", f"no JSON with 'evidence' in {text[:60]!r}"
    return {**conversation, **{k: found[k] for k in ("labels", "evidence", "missing_items", "rationale") if k in found}}


# Blind labels


def blind_requests(task: Task, row: Mapping[str, Any], how: Blind) -> list[backends.Request] | list[backends.ScoreRequest]:
    """The questions about one conversation; nothing in them tells how it was made."""
    messages = task.prompt(row, how.prompt)
    if how.mode == "labels":
        return [backends.ScoreRequest(prompt=None, messages=messages, continuations=task.labels)]
    return [
        backends.Request(messages=messages, max_new_tokens=how.max_new_tokens, temperature=how.temperature, top_k=0, top_p=1.0,
                         seed=vote, stop=())
        for vote in range(how.votes)
    ]  # fmt: skip


def relabel(task: Task, rows: Sequence[Mapping[str, Any]], backend: backends.Backend, *, prompt: str) -> list[str | None]:
    """Labels that an independent backend gives blind: the likeliest of the closed labels for each conversation."""
    how = Blind(mode="labels", prompt=prompt, votes=1, temperature=0.0, max_new_tokens=1, agree=False)
    requests = [blind_requests(task, row, how)[0] for row in rows]
    found = {result.key: result.logprobs for result in backend.score(requests)}
    return [likeliest(task, found[r.key]) for r in requests]


def likeliest(task: Task, logprobs: Sequence[float]) -> str | None:
    return task.label_ids[max(range(len(task.labels)), key=lambda i: logprobs[i])]


def majority(votes: Iterable[str | None]) -> str | None:
    """The label with more votes than any other; 'invalid' on a tie."""
    votes = list(votes)
    counted = sorted(((votes.count(v), str(v), v) for v in set(votes)), reverse=True)
    return INVALID if len(counted) > 1 and counted[0][0] == counted[1][0] else counted[0][2]


def refuse_relatives(verifier: Mapping[str, Any], teachers: Iterable[Mapping[str, Any]]) -> None:
    """ValueError when a blind verifier is a teacher of these conversations: a model agrees with itself."""
    for teacher in teachers:
        same = verifier.get("sha256") is not None and verifier["sha256"] == teacher.get("sha256")
        if same or (verifier["model"], verifier.get("revision")) == (teacher["model"], teacher.get("revision")):
            raise ValueError(
                f"config.verifier is {verifier['model']!r}, which also wrote the conversations; name a model with other weights"
            )


# Reading answers


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


def _json_object(text: str, field: str) -> dict[str, Any] | None:
    """The first JSON object with this field in a text that may hold fences or chatter around it."""
    return next((value for value in _json_objects(text) if field in value), None)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
