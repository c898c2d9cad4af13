"""What a generated conversation must pass before anyone trains on it; every rejection has one reason.

Pure functions over conversation dicts (design.md). What counts as overlap between texts is `data.dedup`'s business.
"""

import collections
import dataclasses
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swallow_jax.data import dedup
from swallow_jax.task import Task, conversation_problem

# Character ranges counted as text of a language; digits and punctuation belong to every language.
_SCRIPTS = {
    "ja": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "en": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
}
_UNSPEAKABLE = ("Cc", "Co", "Cn", "Cs")  # control, private use, unassigned: broken bytes and stray tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the checks; all of them come from the config.

    Lengths count characters of turn texts. `min_language_share` and `min_distinct_share` are shares of letters and of
    4-grams; a turn must end in one of the characters `sentence_ends` ("": anything goes). `ngram` and `near_test` say what
    counts as test contamination, `near_duplicate` as a copy of an accepted row. `test_turns` is 'carriers' (turns a label
    rests on, and their compliant twins) or 'all'.
    """

    min_turns: int
    max_turns: int
    min_chars: int
    max_chars: int
    min_language_share: float
    sentence_ends: str
    min_distinct_share: float
    ngram: int
    near_test: float
    near_duplicate: float
    test_turns: str

    def __post_init__(self):
        if self.test_turns not in ("carriers", "all"):
            raise ValueError(f"checks.test_turns is {self.test_turns!r}; write 'carriers' or 'all'")


def carriers(conversations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(conversation_id, text) of the turns a label rests on.

    These are the turns with evidence and, between twins, the turns in which they differ. A conversation that has neither
    gives all its turns, since nothing says which of them matters.
    """
    pairs = collections.defaultdict(list)
    for row in conversations:
        pairs[row.get("pair_id")].append(row)
    found = []
    for row in conversations:
        turns = {item["turn"] for item in row["evidence"]}
        twins = [other for other in pairs[row.get("pair_id")] if other is not row] if row.get("pair_id") else []
        for twin in twins:
            theirs = {turn["text"] for turn in twin["turns"]}
            turns |= {i for i, turn in enumerate(row["turns"]) if turn["text"] not in theirs}
        for i in sorted(turns) or range(len(row["turns"])):
            found.append((row["conversation_id"], row["turns"][i]["text"]))
    return found


def protected_texts(test_sets: Mapping[str, Sequence[Mapping[str, Any]]], limits: Limits) -> list[tuple[str, str]]:
    """(where, text) of everything in the test sets that a training text must not repeat."""
    found = []
    for name, conversations in test_sets.items():
        if limits.test_turns == "carriers":
            texts = carriers(conversations)
        else:
            texts = [(row["conversation_id"], turn["text"]) for row in conversations for turn in row["turns"]]
        found += [(f"{name}/{conversation_id}", text) for conversation_id, text in texts]
    return [(where, text) for where, text in dict.fromkeys(found) if _is_long(text, limits)]


def contaminated(rows: Sequence[Mapping[str, Any]], protected: Sequence[tuple[str, str]], limits: Limits) -> dict[int, str]:
    """Row number -> which test conversation it repeats and how, by shared n-gram or by 5-gram Jaccard, turn against turn."""
    turns = [
        (number, i, turn["text"])
        for number, row in enumerate(rows)
        for i, turn in enumerate(row["turns"])
        if _is_long(turn["text"], limits)
    ]
    texts, owned = [text for _, _, text in turns], [text for _, text in protected]
    if not texts or not owned:
        return {}
    found: dict[int, str] = {}
    for hit in [
        *dedup.ngram_hits(texts, owned, n=limits.ngram),
        *dedup.near_hits(texts, owned, threshold=limits.near_test),
    ]:
        number, i, _ = turns[hit.train]
        how = f"{limits.ngram}-gram {hit.overlap!r}" if hit.overlap else f"Jaccard {hit.jaccard:.2f}"
        found.setdefault(number, f"turn {i} repeats {protected[hit.protected][0]} ({how})")
    return found


def near_duplicates(rows: Sequence[Mapping[str, Any]], limits: Limits) -> dict[int, int]:
    """Row number -> the first earlier row it nearly equals; twins of one pair do not count."""
    texts = ["\n".join(turn["text"] for turn in row["turns"]) for row in rows]
    if len(texts) < 2:
        return {}
    # 16 bands of 6: a pair of similarity 0.8 is missed once in 130, of 0.9 once in a million, of 0.3 proposed once in 90.
    hits = dedup.near_hits(texts, texts, threshold=limits.near_duplicate, bands=16, rows=6)
    found: dict[int, int] = {}
    for hit in sorted(hits, key=lambda h: (h.train, h.protected)):
        pairs = rows[hit.train].get("pair_id"), rows[hit.protected].get("pair_id")
        is_twin = pairs[0] is not None and pairs[0] == pairs[1]
        if hit.protected < hit.train and hit.protected not in found and not is_twin:
            found.setdefault(hit.train, hit.protected)
    return found


def _is_long(text: str, limits: Limits) -> bool:
    return len(dedup.canonical(text)) >= limits.ngram  # "yes, please" is nobody's property


def first_problem(row: Mapping[str, Any], planned: Mapping[str, Any], task: Task, limits: Limits) -> tuple[str, str] | None:
    """(reason, detail) of the first check a conversation fails on its own, or None.

    `planned` is its plan row: the label must be the planned one.
    """
    problem = conversation_problem(row, task)
    if problem:
        return ("evidence" if problem.startswith("evidence[") else "schema"), problem
    wanted = [planned["category"]] if planned["variant"] == "violation" else []
    if row["labels"] != wanted:
        return "label_mismatch", f"labels are {row['labels']}, the plan asked for {wanted}"
    if problem := _evidence_problem(row, task):
        return "evidence", problem
    turns = row["turns"]
    if not limits.min_turns <= len(turns) <= limits.max_turns:
        return "turns", f"{len(turns)} turns; {limits.min_turns} to {limits.max_turns} are wanted"
    for i, (a, b) in enumerate(itertools.pairwise(turns)):
        if a["speaker"] == b["speaker"]:
            return "turn_order", f"turns {i} and {i + 1} are both {a['speaker']}'s"
    if missing := set(task.speakers) - {turn["speaker"] for turn in turns}:
        return "turn_order", f"{', '.join(sorted(missing))} never speaks"
    text = "".join(turn["text"] for turn in turns)
    if not limits.min_chars <= len(text) <= limits.max_chars:
        return "length", f"{len(text)} characters; {limits.min_chars} to {limits.max_chars} are wanted"
    if (share := language_share(text, task.language)) < limits.min_language_share:
        return "language", f"{share:.2f} of the characters are {task.language}"
    for i, turn in enumerate(turns):
        if odd := next((c for c in turn["text"] if c == "\ufffd" or unicodedata.category(c) in _UNSPEAKABLE), None):
            return "characters", f"turn {i} holds U+{ord(odd):04X}"
        if limits.sentence_ends and turn["text"].rstrip()[-1] not in limits.sentence_ends:
            return "unfinished", f"turn {i} ends in {turn['text'].rstrip()[-8:]!r}"
    if phrase := next((p for p in task.meta_talk if p in text), None):
        return "meta_talk", f"contains {phrase!r}"
    if word := label_word(text, task):
        return "label_word", f"contains the label word {word!r}"
    return _repetition(turns, limits)


def _evidence_problem(row: Mapping[str, Any], task: Task) -> str | None:
    if not row["labels"]:
        return "a compliant conversation has evidence or missing items" if row["evidence"] or row["missing_items"] else None
    kind = task.category(row["labels"][0]).kind
    if kind == "utterance" and not row["evidence"]:
        return f"{row['labels'][0]} is said aloud, so it needs a quote"
    if kind == "omission" and not row["missing_items"]:
        return f"{row['labels'][0]} is an omission, so it needs missing_items"
    for item in row["evidence"]:
        if (speaker := row["turns"][item["turn"]]["speaker"]) != task.speakers[0]:
            return f"the quote in turn {item['turn']} is {speaker}'s, not {task.speakers[0]}'s"
    return None


def label_word(text: str, task: Task) -> str | None:
    """A label of the task that the text spells out, or None."""
    canonical = dedup.canonical(text)
    return next((word for word in task.label_words if dedup.canonical(word) in canonical), None)


def _repetition(turns: Sequence[Mapping[str, str]], limits: Limits) -> tuple[str, str] | None:
    seen = collections.Counter(dedup.canonical(turn["text"]) for turn in turns)
    text, count = seen.most_common(1)[0]
    if count > 1 and len(text) > 8:  # short replies ("yes, please") do come twice
        return "repetition", f"{text!r} is said {count} times"
    for i, turn in enumerate(turns):
        total = len(dedup.canonical(turn["text"])) - 3
        if total > 8 and len(dedup.shingles(turn["text"], 4)) / total < limits.min_distinct_share:
            return "repetition", f"turn {i} goes round in circles"
    return None


def language_share(text: str, language: str) -> float:
    """Share of letters that belong to the language's scripts; punctuation, digits and space do not count."""
    if language not in _SCRIPTS:
        raise ValueError(f"language {language!r} has no script table; known: {', '.join(_SCRIPTS)}")
    letters = [ord(c) for c in text if unicodedata.category(c).startswith("L")]
    inside = sum(any(low <= c <= high for low, high in _SCRIPTS[language]) for c in letters)
    return inside / len(letters) if letters else 0.0


def length_probe(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Can length alone tell the violating twin? `accuracy` of "the longer one violates" over pairs, ties counting half.

    Near 0.5 is what an honest set gives; far from it, a model may learn length instead of conduct.
    """
    pairs = collections.defaultdict(dict)
    for row in rows:
        if row.get("pair_id"):
            size = sum(len(turn["text"]) for turn in row["turns"])
            pairs[row["pair_id"]]["violation" if row["labels"] else "compliant"] = size
    whole = [p for p in pairs.values() if len(p) == 2]
    right = sum(1.0 if p["violation"] > p["compliant"] else 0.5 if p["violation"] == p["compliant"] else 0.0 for p in whole)
    return {"pairs": len(whole), "accuracy": right / len(whole) if whole else None}


def cohen_kappa(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Agreement of two labellings beyond chance (Cohen 1960); 1.0 where both use one and the same label throughout."""
    if not a or len(a) != len(b):
        raise ValueError(f"kappa needs two labellings of one length, got {len(a)} and {len(b)}")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    left, right = collections.Counter(a), collections.Counter(b)
    chance = sum(left[label] * right[label] for label in left) / len(a) ** 2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)
