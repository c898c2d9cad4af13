"""Normalisation and quality rules as pure functions; annotate first, drop later.

A rule is a measure (text -> number) with limits; the limits come from a *profile*, so that laws, tables and FAQ are not
judged by thresholds made for web pages. The rules published for the Swallow Corpus v1 are the set `swallow_v1` and stand in
`swallow_rules`; our own measures are for paragraphs, and for documents that those rules were not made for.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from swallow_jax.data import privacy, swallow_rules

# Normalisation

# NFKC would turn ①保険金額 into 1保険金額, 10² into 102, 1.5%～2.0% into 1.5%~2.0%, and 3½ into 31⁄2. The punctuation of
# Japanese sentences stays full-width, as in the dialogues that the model meets later.
_PROTECTED = re.compile(
    "(["
    "\uff5e！？（）：；"  # ～
    "\u2460-\u2473\u24ea\u3251-\u325f\u32b1-\u32bf\u2776-\u277f"  # circled numbers
    "\u00bc-\u00be\u2150-\u215f\u2189"  # fractions
    "\u00b2\u00b3\u00b9\u2070-\u209c"  # superscripts and subscripts
    "]+)"
)
_JAPANESE = "\u3005-\u3007\u3041-\u30ff\u3400-\u9fff"
_COMMA = re.compile(rf"(?<=[{_JAPANESE}])，")
_PERIOD = re.compile(rf"(?<=[{_JAPANESE}])．")
_SPACE = re.compile(rf"(?<=[、。，．]) +(?=[{_JAPANESE}])")  # left by line breaks in sources; Japanese puts none there
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe]")
_BLANKS = re.compile(r"[ \t]*\n[ \t\n]*")


def normalise(text: str) -> tuple[str, Counter]:
    """NFKC with protected characters, Japanese full stops and commas, no control characters or empty lines.

    Returns the text and how many characters each kind of rewrite touched.
    """
    counts: Counter = Counter()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    rules = (("control", _CONTROL, ""), ("space", _SPACE, ""), ("comma", _COMMA, "、"), ("period", _PERIOD, "。"))
    for name, pattern, to in rules:
        text, counts[name] = pattern.subn(to, text)
    parts = _PROTECTED.split(text)  # odd ones are protected
    for i, part in enumerate(parts):
        if i % 2:
            counts["protected"] += len(part)
        elif not unicodedata.is_normalized("NFKC", part):
            counts["nfkc"] += sum(not unicodedata.is_normalized("NFKC", char) for char in part)
            parts[i] = unicodedata.normalize("NFKC", part)
    text = _BLANKS.sub("\n", "".join(parts)).strip()
    return text, +counts


# Measures

_HIRAGANA = re.compile("[\u3041-\u309f]")
_KATAKANA = re.compile("[\u30a0-\u30ff]")
_KANJI = re.compile("[\u3005-\u3007\u3400-\u9fff\uf900-\ufaff]")
_JAPANESE_LETTER = re.compile("[\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def letters(text: str) -> float:
    """Characters that are neither white space nor control characters."""
    return float(sum(not char.isspace() for char in text))


def japanese_letters(text: str) -> float:
    return float(len(_JAPANESE_LETTER.findall(text)))


def _fraction(count: float, text: str) -> float:
    total = letters(text)
    return count / total if total else 0.0


def japanese_fraction(text: str) -> float:
    return _fraction(japanese_letters(text), text)


def hiragana_fraction(text: str) -> float:
    return _fraction(len(_HIRAGANA.findall(text)), text)


def katakana_fraction(text: str) -> float:
    return _fraction(len(_KATAKANA.findall(text)), text)


def kanji_fraction(text: str) -> float:
    return _fraction(len(_KANJI.findall(text)), text)


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Share of parts that occurred before, and of the characters in them (Gopher's repetition rules)."""
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated += 1
            characters += len(part)
        seen.add(part)
    total = sum(map(len, parts))
    return (repeated / len(parts), characters / total) if total else (0.0, 0.0)


def _paragraphs(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def duplicate_paragraph_fraction(text: str) -> float:
    return _duplicates(_paragraphs(text))[0]


def duplicate_paragraph_chars(text: str) -> float:
    return _duplicates(_paragraphs(text))[1]


MEASURES: dict[str, Callable[[str], float]] = {
    function.__name__: function
    for function in (
        letters,
        japanese_letters,
        japanese_fraction,
        hiragana_fraction,
        katakana_fraction,
        kanji_fraction,
        duplicate_paragraph_fraction,
        duplicate_paragraph_chars,
    )
}

Rules = Mapping[str, Mapping[str, float]]  # measure -> {"min": ..., "max": ...}
SWALLOW_V1: Rules = swallow_rules.SWALLOW_V1
_NAMED = {"swallow_v1": SWALLOW_V1}


def check_rules(rules: Any, where: str) -> Rules:
    """Rules of a profile, checked: a mapping measure -> {min, max}, or the name of a published set.

    A mapping may begin with a published set and change it: {based_on: swallow_v1, swallow_letters: {min: 100},
    swallow_katakana: off}.
    """
    if isinstance(rules, str):
        rules = {"based_on": rules}
    own = dict(rules or {})
    base = own.pop("based_on", None)
    if base is not None and base not in _NAMED:
        raise ValueError(f"{where}: unknown rule set {base!r}; known are {sorted(_NAMED)}")
    for name, limits in own.items():
        if name not in MEASURES and name not in SWALLOW_V1:
            raise ValueError(f"{where}: unknown rule {name!r}; known are {sorted([*MEASURES, *SWALLOW_V1])}")
        if limits in (False, None) and base is not None:  # YAML reads `off` as False
            continue
        if not isinstance(limits, Mapping) or not limits or set(limits) - {"min", "max"}:
            raise ValueError(f"{where}.{name}: {limits!r} needs min, max or both")
    merged = {**_NAMED.get(base, {}), **own}
    return {name: limits for name, limits in merged.items() if limits}


def annotate(text: str, rules: Rules, known: Mapping[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Every rule's verdict: {rule: {"value", "passes"}}. Nothing is dropped here. `known` holds values already computed."""
    if known is None:
        known = swallow_rules.statistics(text) if any(name in SWALLOW_V1 for name in rules) else {}
    verdicts = {}
    for name, limits in rules.items():
        value = known[name] if name in known else MEASURES[name](text)
        passes = limits.get("min", value) <= value <= limits.get("max", value)
        verdicts[name] = {"value": round(value, 4), "passes": passes}
    return verdicts


def failed(verdicts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the rules that did not pass, in the profile's order."""
    return [name for name, verdict in verdicts.items() if not verdict["passes"]]


def keep_paragraphs(text: str, rules: Rules) -> tuple[str, Counter]:
    """The lines of `text` that pass `rules`, and how many lines each rule (the first that failed) removed."""
    if not rules:
        return text, Counter()
    kept, reasons = [], Counter()
    for line in text.split("\n"):
        if reason := next(iter(failed(annotate(line, rules))), None):
            reasons[reason] += 1
        else:
            kept.append(line)
    return "\n".join(kept), reasons


class Cleaned(NamedTuple):
    """A document after normalising, masking and paragraph rules, with every verdict beside it."""

    text: str
    verdicts: dict[str, dict[str, Any]]  # of the profile's rules
    statistics: dict[str, float]  # of every published rule, whatever the profile
    reasons: list[str]  # against keeping it
    rewrites: Counter  # kind -> characters
    removed: Counter  # paragraph rule -> lines
    masked: Counter  # kind of personal data -> strings


def clean(text: str, profile: Mapping[str, Rules], mask: Iterable[str] = ()) -> Cleaned:
    """All that can be said of one document alone. `profile` holds rules for 'paragraph' and 'document'."""
    text, rewrites = normalise(text)
    text, masked = privacy.mask(text, mask)
    text, removed = keep_paragraphs(text, profile["paragraph"])
    statistics = swallow_rules.statistics(text)
    verdicts = annotate(text, profile["document"], statistics)
    return Cleaned(text, verdicts, statistics, failed(verdicts) if text else ["empty"], rewrites, removed, masked)


def check_profiles(profiles: Mapping[str, Any], where: str) -> dict[str, dict[str, Rules]]:
    """Profiles of a domain, checked: {name: {"paragraph": rules, "document": rules}}."""
    for name, body in profiles.items():
        if not isinstance(body, Mapping) or set(body) != {"paragraph", "document"}:
            raise ValueError(f"{where}.{name}: a profile has rules for paragraph and for document (each may be {{}})")
    return {
        name: {part: check_rules(rules, f"{where}.{name}.{part}") for part, rules in body.items()}
        for name, body in profiles.items()
    }
