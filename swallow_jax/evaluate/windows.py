"""Conversations longer than a model's context: overlapping windows of whole turns, and one verdict from those of the windows.

Nothing is cut off in silence: every turn stands in a window, and a turn that fits into none is an error.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swallow_jax.task import INVALID

Conversation = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    limit: int  # the whole prompt of a window has at most so many
    unit: str  # 'tokens' of the model's tokenizer, or 'characters' where an endpoint keeps its tokenizer to itself
    overlap_turns: int  # turns that stand in both of two neighbours

    def __post_init__(self):
        if self.unit not in ("tokens", "characters"):
            raise ValueError(f"asking.window.unit is {self.unit!r}; write 'tokens' or 'characters'")
        if self.limit < 1 or self.overlap_turns < 0:
            raise ValueError(f"asking.window: limit={self.limit} must be >= 1, overlap_turns={self.overlap_turns} >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What was answered about a conversation or a window of it."""

    preds: tuple[str, ...] | None  # category ids, the primary one first; () is compliant, None no label
    raw: str
    probs: dict[str, float] | None = None
    evidence: tuple[dict[str, Any], ...] | None = None  # of an answer in verdict form
    missing_items: tuple[str, ...] | None = None
    false_quotes: int = 0  # quotes that stand in no such turn; they are dropped


def cut(conversation: Conversation, window: Window, measure: Callable[[Conversation], int]) -> list[tuple[int, int]]:
    """[start, stop) of each window: as many turns as fit, the next one beginning `overlap_turns` before the end of the last."""
    turns = conversation["turns"]

    def size(start: int, stop: int) -> int:
        return measure({**conversation, "turns": turns[start:stop]})

    if size(0, len(turns)) <= window.limit:
        return [(0, len(turns))]
    windows: list[tuple[int, int]] = []
    start = stop = 0
    while stop < len(turns):
        # A window must reach beyond the last one; where the overlap leaves no room for that, it shrinks.
        while size(start, stop + 1) > window.limit:
            if start == stop:
                raise ValueError(
                    f"turn {stop} of {conversation['conversation_id']!r} alone makes a prompt of {size(stop, stop + 1)} "
                    f"{window.unit}, the limit is {window.limit}; raise asking.window.limit or split the turn"
                )
            start += 1
        stop += 1
        while stop < len(turns) and size(start, stop + 1) <= window.limit:
            stop += 1
        windows.append((start, stop))
        start = max(start + 1, stop - window.overlap_turns)
    return windows


def merge(parts: Sequence[tuple[int, Answer]]) -> Answer:
    """One answer from those of windows, each with the number of its first turn.

    With probabilities: each label by its strongest window, compliant by its weakest. Written answers: every category that a
    window names, the one named most often first; one window without a label makes the whole answer invalid. A thing left
    unsaid in one window may be said in another: omissions found in windows want a second look.
    """
    if len(parts) == 1:
        return parts[0][1]
    answers = [answer for _, answer in parts]
    raw = "\n".join(f"[turns from {start}] {answer.raw}" for start, answer in parts)
    if any(answer.preds is None for answer in answers):
        return Answer(preds=None, raw=f"{INVALID}: {raw}")
    counts = collections.Counter(label for answer in answers for label in answer.preds)
    preds = tuple(label for label, _ in counts.most_common())  # equal counts stay in order of appearance
    probs = None
    if all(answer.probs is not None for answer in answers):
        *categories, compliant = answers[0].probs
        probs = {label: max(answer.probs[label] for answer in answers) for label in categories}
        probs[compliant] = min(answer.probs[compliant] for answer in answers)
    written = [(start, answer) for start, answer in parts if answer.evidence is not None]
    evidence = {
        (item["category"], item["turn"] + start, item["quote"]): {**item, "turn": item["turn"] + start}
        for start, answer in written
        for item in answer.evidence
    }
    missing = dict.fromkeys(item for _, answer in written for item in answer.missing_items)
    return Answer(
        preds=preds, raw=raw, probs=probs,
        evidence=tuple(evidence.values()) if written else None,
        missing_items=tuple(missing) if written else None,
        false_quotes=sum(answer.false_quotes for answer in answers),
    )  # fmt: skip
