"""Accepted conversations to chat samples: prompt variants, label or structured verdict, with or without rationale, and replay.

The loss falls on the assistant's turn alone (`data.train_on` of experiments.sft). Twins lie in one split, since the plan put them
there. What a sample gets (prompt, rationale) depends on its pair's name, so that the choice tells nothing about the label.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run
from swallow_jax.synth import plan
from swallow_jax.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """`prompts` of the task, used in equal shares; `target` is 'label' or 'verdict' (None: the task's `output`);
    `rationale_share` of the pairs get the reason before a label or inside a verdict; `replay` names a JSONL file of chat samples
    on general instructions, `replay_share` their share of the training samples."""

    prompts: tuple[str, ...]
    target: str | None
    rationale_share: float
    replay: str | None
    replay_share: float
    seed: int

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("sft.prompts is empty; name at least one prompt of the task")
        if self.target not in (None, "label", "verdict"):
            raise ValueError(f"sft.target is {self.target!r}; write 'label', 'verdict' or None")
        if not 0 <= self.rationale_share <= 1 or not 0 <= self.replay_share < 1:
            raise ValueError(
                f"sft.rationale_share={self.rationale_share}, sft.replay_share={self.replay_share}: shares lie between 0 and 1, "
                "and replay cannot be everything"
            )
        if (self.replay is None) != (self.replay_share == 0):
            raise ValueError(f"sft.replay={self.replay!r} with replay_share={self.replay_share}; give both or neither")


def chat_samples(task: Task, rows: Iterable[Mapping[str, Any]], form: Form) -> Iterator[dict[str, Any]]:
    """A sample for each conversation: the task's prompt, and the answer as the assistant's turn."""
    missing: dict[str, tuple[str, ...]] = {}
    for row in rows:
        pair = row.get("pair_id") or row["conversation_id"]
        where = f"{form.seed}/{pair}"
        prompt = form.prompts[plan.draw(f"{where}/prompt") % len(form.prompts)]
        explains = plan.draw(f"{where}/rationale") / 2**64 < form.rationale_share
        if row["labels"] and row["missing_items"]:
            missing = {pair: tuple(row["missing_items"])}
        answer = (
            json.dumps(verdict(task, row, explains=explains, said=missing.get(pair, ())), ensure_ascii=False)
            if (form.target or task.output) == "verdict"
            else "\n".join(filter(None, [rationale(task, row) if explains else "", task.answer(row["labels"])]))
        )
        yield {
            "id": row["conversation_id"],
            "messages": [*task.prompt(row, prompt), {"role": "assistant", "content": answer}],
            "pair_id": row.get("pair_id"),
            "label": task.primary(row),
            "prompt": prompt,
            "teacher": row.get("meta", {}).get("teacher"),
        }


def rationale(task: Task, row: Mapping[str, Any]) -> str:
    """The teacher's reason where it gave one; else the definition and what shows it, by the task's prompt `rationale`."""
    if isinstance(given := row.get("rationale"), str) and given.strip():
        return " ".join(given.split())
    category = task.category(row["labels"][0]) if row["labels"] else None
    text = task.render(
        "rationale" if category else "rationale_compliant",
        {
            "definition": category.definition if category else task.compliant_definition,
            "quote": task.list_mark.join(item["quote"] for item in row["evidence"]),
            "missing_items": task.list_mark.join(row["missing_items"]),
            "name": category.name_ja if category and task.language == "ja" else category.name_en if category else "",
        },
    )
    if not isinstance(text, str):
        raise ValueError(f"the prompts 'rationale' and 'rationale_compliant' of task {task.id} are '## text' templates")
    return text


def verdict(task: Task, row: Mapping[str, Any], *, explains: bool, said: Sequence[str] = ()) -> dict[str, Any]:
    """design.md's verdict, as far as a model writes it: what the task's table gives (legal basis) is left to the table.

    `said`: what the violating twin leaves unsaid; twins differ in nothing else, so the compliant one says it.
    """
    violations = []
    for label in row["labels"]:
        found = {
            "category": label,
            "evidence": [{k: item[k] for k in ("turn", "quote")} for item in row["evidence"] if item["category"] == label],
            "missing_items": list(row["missing_items"]) if task.category(label).kind == "omission" else [],
        }
        violations.append(({"rationale": rationale(task, row)} if explains else {}) | found)
    status = "missing" if row["labels"] else "explained"
    items = row["missing_items"] if row["labels"] else said
    return {
        "verdict": "violation" if violations else "no_violation",
        "violations": violations,
        "required_items": [{"item": item, "status": status} for item in items],
    }


def with_replay(samples: Iterable[Mapping[str, Any]], count: int, form: Form) -> Iterator[Mapping[str, Any]]:
    """`count` samples with general ones spread among them, so that these are `replay_share` of all; ValueError for too few."""
    if form.replay is None:
        yield from samples
        return
    path = Path(form.replay)
    if not path.is_file():
        raise FileNotFoundError(f"config.sft.replay: {path} does not exist; it is a JSONL file of chat samples")
    wanted = round(count * form.replay_share / (1 - form.replay_share))
    places = []
    for number, row in run.numbered_jsonl(path):
        if not isinstance(row.get("messages"), list):
            raise ValueError(f"{path}:{number}: no `messages`; a chat sample is {{'id', 'messages': [{{'role', 'content'}}]}}")
        places.append(number)
    if len(places) < wanted:
        raise ValueError(f"{path} holds {len(places)} samples, {wanted} are wanted for sft.replay_share={form.replay_share}")
    chosen = set(plan.shuffled(places, f"{form.seed}/replay")[:wanted])
    general = (
        {"id": f"replay-{number}", "messages": row["messages"], "replay": True}
        for number, row in run.numbered_jsonl(path)
        if number in chosen
    )
    due = 0.0
    for sample in samples:
        yield sample
        due += wanted / count
        while due >= 0.5 and (row := next(general, None)) is not None:
            yield row
            due -= 1
    yield from general
