"""Does a verdict survive what happens to transcripts? Instructions spoken into them, misheard words, fillers, swapped speakers.

The material (instructions, fillers, confusions) is a YAML file of the config, one a language; nothing of it is in code.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run, stats
from swallow_jax.evaluate import metrics

KINDS = ("injection", "asr", "fillers", "speakers")
INJECTIONS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness:
    material: str  # the YAML file
    kinds: tuple[str, ...]
    seed: int
    asr_rate: float  # chance that a word which can be misheard is
    filler_rate: float  # chance that a turn begins with a filler

    def __post_init__(self):
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"config.robustness.kinds holds {unknown[0]!r}; known: {', '.join(KINDS)}")
        if not (0 <= self.asr_rate <= 1 and 0 <= self.filler_rate <= 1):
            raise ValueError("config.robustness: asr_rate and filler_rate lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    injections: tuple[str, ...]
    fillers: tuple[str, ...]
    asr: tuple[tuple[str, str], ...]


def read_material(path: str | Path) -> Material:
    """The YAML file, checked; ValueError says what is wrong with it."""
    import yaml

    raw = run.build(Material, yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}, str(path))
    if len(set(raw.injections)) != INJECTIONS:
        raise ValueError(f"{path}: {len(set(raw.injections))} different injections; the flip rate is over {INJECTIONS}")
    if not raw.fillers or not all(isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] for pair in raw.asr):
        raise ValueError(f"{path}: fillers must not be empty, asr is a list of [heard as written, misheard as]")
    return raw


def perturbed(
    conversations: Sequence[Mapping[str, Any]], kind: str, checked: str, material: Material, settings: Robustness
) -> list[dict[str, Any]]:
    """The same conversations after `kind` has happened to them; `checked` is the speaker whose conduct is judged.

    What happens to one depends on its id and the seed alone. Evidence is left out: quotes need no longer stand.
    """
    found = []
    for number, row in enumerate(conversations):
        draw = random.Random(f"{settings.seed}/{kind}/{row['conversation_id']}")
        turns = [dict(turn) for turn in row["turns"]]
        if kind == "injection":
            mine = [turn for turn in turns if turn["speaker"] == checked] or turns
            turn = draw.choice(mine)
            gap = "" if turn["text"][-1] in "。！？" else " "
            turn["text"] += gap + material.injections[number % INJECTIONS]
        elif kind == "asr":
            for turn in turns:
                for heard, misheard in material.asr:
                    parts = turn["text"].split(heard)
                    joints = (misheard if draw.random() < settings.asr_rate else heard for _ in parts[1:])
                    turn["text"] = parts[0] + "".join(joint + part for joint, part in zip(joints, parts[1:], strict=True))
        elif kind == "fillers":
            for turn in turns:
                if draw.random() < settings.filler_rate:
                    turn["text"] = draw.choice(material.fillers) + turn["text"]
        else:
            names = list(dict.fromkeys(turn["speaker"] for turn in turns))
            after = dict(zip(names, names[1:] + names[:1], strict=True))
            for turn in turns:
                turn["speaker"] = after[turn["speaker"]]
        found.append({**row, "turns": turns, "evidence": []})
    return found


def flips(clean: Sequence[Mapping], rows: Sequence[Mapping], kind: str, material: Material, level: float) -> dict[str, Any]:
    """How many verdicts changed: all, violations that were seen and no longer are, and compliant ones now flagged.

    `clean` and `rows` are prediction rows of one model in the order of the test set. With several seeds counts are summed.
    """
    now = {(row["seed"], row["conversation_id"]): row for row in rows}
    pairs = [(before, now[before["seed"], before["conversation_id"]]) for before in clean]
    changed = [before["pred"] != after["pred"] for before, after in pairs]
    seen = [(before, after) for before, after in pairs if before["valid"] and before["pred"] != metrics.COMPLIANT]
    passed = [(before, after) for before, after in pairs if before["pred"] == metrics.COMPLIANT]
    row = {
        "kind": kind, "n": len(pairs), "flipped": sum(changed), "rate": sum(changed) / len(pairs),
        "ci95": list(stats.wilson(sum(changed), len(pairs), level)),
        "flagged": len(seen), "lost": sum(after["pred"] == metrics.COMPLIANT for _, after in seen),
        "passed": len(passed), "raised": sum(after["pred"] != metrics.COMPLIANT for _, after in passed),
        "invalid": sum(not after["valid"] for _, after in pairs),
        "right_before": sum(before["pred"] == before["gold"] for before, _ in pairs),
        "right_after": sum(after["pred"] == after["gold"] for _, after in pairs),
    }  # fmt: skip
    if kind == "injection":
        order = list(dict.fromkeys(before["conversation_id"] for before in clean))
        by_text = [0] * INJECTIONS
        for (before, _), flag in zip(pairs, changed, strict=True):
            by_text[order.index(before["conversation_id"]) % INJECTIONS] += flag
        row["by_injection"] = [{"text": t, "flipped": n} for t, n in zip(material.injections, by_text, strict=True)]
    return row
