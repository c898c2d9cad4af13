"""From a model's words or log-probabilities to an answer: closed labels, sets of labels, verdicts with quotes.

Letters: C labels, A possible answers.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swallow_jax.evaluate import metrics
from swallow_jax.evaluate.windows import Answer
from swallow_jax.task import INVALID

_MOST_ANSWERS = 256  # closed answers scored for one conversation


def label_ids(task: Any) -> list[str]:
    """The task's label ids in the order of `task.labels`, the compliant one by its word instead of None."""
    return [metrics.COMPLIANT if label is None else label for label in task.label_ids]


def closed(task: Any, most_labels: int | None) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The closed answers of a task: as tuples of category ids (() for compliant), and as texts.

    One for each label; under the policy 'multi' one for each set of up to `most_labels` categories, in the task's order.
    """
    for label in task.labels:
        # The end of the turn is not scored, so the beginning of another answer would always be the likelier one.
        if longer := [other for other in task.labels if other != label and other.startswith(label)]:
            raise ValueError(f"label {label!r} is the beginning of {longer[0]!r}; change one in the task to score closed labels")
    if task.label_policy != "multi":
        return tuple(() if label is None else (label,) for label in task.label_ids), task.labels
    categories = [category.id for category in task.categories]
    sizes = range(1, (most_labels or len(categories)) + 1)
    sets = [(), *itertools.chain.from_iterable(itertools.combinations(categories, size) for size in sizes)]
    if len(sets) > _MOST_ANSWERS:
        raise ValueError(
            f"task {task.id} has {len(sets)} closed answers of up to {sizes[-1]} labels, more than {_MOST_ANSWERS}; set "
            "asking.most_labels, or use asking.mode 'generate'"
        )
    return tuple(sets), tuple(task.answer(labels) for labels in sets)


def from_logprobs(
    task: Any, sets: Sequence[tuple[str, ...]], texts: Sequence[str], logprobs: Sequence[float], tokens: Sequence[int], mean: bool
) -> Answer:
    """The likeliest closed answer; `mean` divides each log-probability by its number of tokens."""
    logprobs_A = np.array(logprobs, dtype=np.float64)
    if mean:
        logprobs_A = logprobs_A / np.array(tokens)
    probs_A = np.exp(logprobs_A - logprobs_A.max())
    if task.label_policy == "multi":
        return _from_prefixes(task, sets, texts, probs_A, mean)
    probs_A /= probs_A.sum()
    best = int(probs_A.argmax())
    return Answer(preds=sets[best], raw=texts[best], probs=dict(zip(label_ids(task), probs_A.tolist(), strict=True)))


def _from_prefixes(task: Any, sets: Sequence, texts: Sequence[str], begins_A: np.ndarray, mean: bool) -> Answer:
    """Sets of labels: what is scored is that an answer *begins* with "a, b"; that it is just that, is what remains when the
    answers that go on, "a, b, c", are taken away. The probabilities of the row are each label's own."""
    if mean:
        raise ValueError("asking.normalise 'mean' compares no answers of several labels; write 'sum'")
    place = {labels: number for number, labels in enumerate(sets)}
    exact_A = begins_A.copy()
    for labels, number in place.items():
        if len(labels) > 1:
            exact_A[place[labels[:-1]]] -= begins_A[number]
    exact_A = np.maximum(exact_A, 0.0)  # where tokens of a shorter answer are not those of the longer one's beginning
    exact_A /= exact_A.sum()
    probs = {c.id: float(sum(exact_A[number] for labels, number in place.items() if c.id in labels)) for c in task.categories}
    best = int(exact_A.argmax())
    preds = tuple(sorted(sets[best], key=lambda label: -probs[label]))  # the surest first; Python's sort keeps equal ones' order
    clipped = {label: min(1.0, p) for label, p in probs.items()} | {metrics.COMPLIANT: float(exact_A[place[()]])}
    return Answer(preds=preds, raw=texts[best], probs=clipped)


def from_text(task: Any, text: str, conversation: Mapping[str, Any]) -> Answer:
    """The answer a text gives: a verdict where it is JSON, else the label or labels it names."""
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if body.startswith("{"):
        return _from_verdict(task, body, text, conversation)
    if task.label_policy == "multi":
        found = task.parse_labels(text)
        return Answer(preds=None if found == INVALID else found, raw=text)
    label = task.parse_label(text)
    return Answer(preds=None if label == INVALID else () if label is None else (label,), raw=text)


def _from_verdict(task: Any, body: str, raw: str, conversation: Mapping[str, Any]) -> Answer:
    """design.md's verdict. Quotes that are no exact part of their turn are dropped and counted."""
    invalid = Answer(preds=None, raw=raw)
    try:
        verdict, _ = json.JSONDecoder().raw_decode(body)
    except (json.JSONDecodeError, RecursionError):
        return invalid
    violations = verdict.get("violations") if isinstance(verdict, dict) else None
    if not isinstance(violations, list) or not all(isinstance(v, dict) and "category" in v for v in violations):
        return invalid
    known = {category.id for category in task.categories}
    labels = [v["category"] if v["category"] in known else task.parse_label(str(v["category"])) for v in violations]
    if None in labels or INVALID in labels or verdict.get("verdict") != ("violation" if labels else "no_violation"):
        return invalid
    evidence, missing, dropped = [], {}, 0
    for label, violation in zip(labels, violations, strict=True):
        quotes, items = violation.get("evidence", []), violation.get("missing_items", [])
        for item in quotes if isinstance(quotes, list) else ():
            if _stands(item, conversation["turns"]):
                evidence.append({"category": label, "turn": item["turn"], "quote": item["quote"]})
            else:
                dropped += 1
        missing |= dict.fromkeys(item for item in (items if isinstance(items, list) else ()) if isinstance(item, str))
    preds = tuple(dict.fromkeys(labels))
    return Answer(preds=preds, raw=raw, evidence=tuple(evidence), missing_items=tuple(missing), false_quotes=dropped)


def _stands(item: Any, turns: Sequence[Mapping[str, str]]) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("turn"), int) or not isinstance(item.get("quote"), str):
        return False
    return 0 <= item["turn"] < len(turns) and bool(item["quote"]) and item["quote"] in turns[item["turn"]]["text"]
