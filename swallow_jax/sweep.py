"""A sweep's arms: their names, seeds and stages, what stands for each of them in a config, and which of them won.

Arms that differ in an axis `seed` alone bear one label and are one arm of an evaluation, with several seeds.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVERY = "*"  # in a config: each arm, one after the other
PARTS = ("shared", "after")  # what runs once, before and after the arms; no arm may be called so
_NAME = re.compile(r"[\w=,.+-]+")
_SEED = re.compile(r"(?:^|,)seed=(\d+)(?=,|$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """`stages` with this arm's overrides; `label` is the name without its seed."""

    name: str
    label: str
    seed: int
    overrides: Mapping[str, Any]
    folder: Path
    stages: tuple[dict[str, Any], ...]


def arms(named: Mapping[str, Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], workdir: Path) -> list[Arm]:
    """The arms of `sweep()`, {name: {"STAGE.field": value}}; "STAGE": "other/config.py" changes a stage, "STAGE": None drops it.

    "{arm}" and "{shared}" in a text stand for the arm's folder and that of the shared stages. ValueError names what is wrong.
    """
    if not named:
        raise ValueError("sweep() names no arm; return {name: {field: value}}, see configs/sweep/__init__.py")
    found = []
    for name, overrides in named.items():
        if not _NAME.fullmatch(name) or name in PARTS or name.startswith("."):
            raise ValueError(f"arm {name!r}: a name is made of letters, digits and _ = , . + - and is none of {', '.join(PARTS)}")
        folder = workdir / "arms" / name
        seed = _SEED.search(name)
        label = _SEED.sub("", name).strip(",") or "all"
        own = with_overrides(stages, overrides, f"arm {name}")
        places = {"{arm}": str(folder), "{shared}": str(workdir / "shared")}
        found.append(
            Arm(name=name, label=label, seed=int(seed[1]) if seed else 0, overrides=dict(overrides), folder=folder,
                stages=tuple(filled(own, places)))
        )  # fmt: skip
    if len({(arm.label, arm.seed) for arm in found}) < len(found):
        raise ValueError(f"two arms have one label and one seed: {', '.join(arm.name for arm in found)}")
    return found


def with_overrides(stages: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The stages with fields "STAGE.field" in their overrides, "STAGE" as another config, or left out."""
    own = {stage["name"]: {**stage, "overrides": dict(stage.get("overrides", {}))} for stage in stages}
    for field, value in overrides.items():
        stage, _, rest = field.partition(".")
        if stage not in own:
            raise ValueError(f"{where}: {field!r} names no stage; known: {', '.join(own)}")
        if rest:
            own[stage]["overrides"][rest] = value
        else:
            own[stage]["config"] = value
    return [stage for stage in own.values() if stage["config"] is not None]


def filled(value: Any, places: Mapping[str, str]) -> Any:
    """The value with each key of `places` replaced in all its texts."""
    if isinstance(value, str):
        for mark, text in places.items():
            value = value.replace(mark, text)
        return value
    if isinstance(value, Mapping):
        return {key: filled(entry, places) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(filled(entry, places) for entry in value)
    return value


# One entry for every arm.


def every(config: Mapping[str, Any], found: Sequence[Arm]) -> dict[str, Any]:
    """The fields of an evaluation's or a report's config in which "*" stands for every arm, written out.

    models {name "*", path}, training, data and stages {name "*", folder}: one an arm, the path below its folder. comparisons
    {a, b}, kept {before, after}: one a label; with "*" on both sides every pair of labels, the later against the earlier.
    """
    labels = list(dict.fromkeys(arm.label for arm in found))
    changed: dict[str, Any] = {}
    for field, place in (("models", "path"), ("training", "folder"), ("data", "folder"), ("stages", "folder")):
        entries = config.get(field) or ()
        # An evaluation's `training` holds files.
        if any(isinstance(entry, Mapping) and EVERY in entry["name"] for entry in entries):
            changed[field] = tuple(one for entry in entries for one in _entries(entry, field, place, found))
    for field, sides in (("comparisons", ("a", "b")), ("kept", ("before", "after"))):
        entries = config.get(field) or ()
        if any(EVERY in (entry[side] for side in sides) for entry in entries):
            changed[field] = tuple(one for entry in entries for one in _choices(entry, sides, labels))
    return changed


def _entries(entry: Mapping[str, Any], field: str, place: str, found: Sequence[Arm]) -> list[dict[str, Any]]:
    if EVERY not in entry["name"]:
        return [dict(entry)]
    made = []
    for arm in found:
        own = {**entry, "name": entry["name"].replace(EVERY, arm.label if field == "models" else arm.name)}
        made.append({**own, place: str(arm.folder / entry[place])} | ({"seed": arm.seed} if field == "models" else {}))
    return made


def _choices(entry: Mapping[str, Any], sides: tuple[str, str], labels: Sequence[str]) -> list[dict[str, Any]]:
    first, second = (entry[side] for side in sides)
    if first == second == EVERY:
        return [{**entry, sides[0]: late, sides[1]: early} for early, late in itertools.combinations(labels, 2)]
    if EVERY not in (first, second):
        return [dict(entry)]
    side, other = (sides[0], second) if first == EVERY else (sides[1], first)
    return [{**entry, side: label} for label in labels if label != other]


# Which arm won.


def verdict(scores: Mapping[str, Sequence[Mapping]], labels: Sequence[str], metric: str, test_set: str) -> dict[str, Any]:
    """The label with the largest value, those it is better than by the paired test after Holm, and those it is not told from.

    `scores` is the results form; p_holm there counts all comparisons of the evaluation. Labels never compared are `not_compared`.
    """
    rows = [r for r in scores["scores"] if r["metric"] == metric and r["test_set"] == test_set and r["model"] in labels]
    if not rows:
        raise ValueError(f"no arm has the metric {metric!r} on {test_set!r}; evaluate the arms with it")
    best = max(rows, key=lambda row: row["value"])["model"]
    pairs = [r for r in scores["paired"] if r["metric"] == metric and r["test_set"] == test_set]
    tests = {frozenset((r["a"], r["b"])): r for r in pairs}
    found: dict[str, Any] = {"metric": metric, "test_set": test_set, "best": best, "comparisons": len(scores["paired"])}
    found |= {"values": {r["model"]: r["value"] for r in rows}, "better_than": {}, "not_told_from": {}, "not_compared": []}
    for label in labels:
        if label == best:
            continue
        test = tests.get(frozenset((best, label)))
        if test is None:
            found["not_compared"].append(label)
            continue
        gain = (test["diff"] if test["a"] == best else -test["diff"]) + 0.0  # no -0.0
        kind = "better_than" if test["p_holm"] < 1 - _level(rows) else "not_told_from"
        found[kind][label] = {"gain": gain, "p_pairs": test["p_pairs"], "p_holm": test["p_holm"]}
    return found


def _level(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(rows[0]["level"])


def verdict_words(found: Mapping[str, Any]) -> str:
    """The verdict as a sentence."""

    def listed(kind: str) -> str:
        return ", ".join(f"{name} ({100 * row['gain']:+.1f} pp, Holm p {row['p_holm']:.3g})" for name, row in found[kind].items())

    value = 100 * found["values"][found["best"]]
    parts = [f"{found['best']} has the largest {found['metric']} on {found['test_set']}: {value:.1f} %"]
    if found["better_than"]:
        parts.append(f"better than {listed('better_than')}")
    if found["not_told_from"]:
        parts.append(f"not told apart from {listed('not_told_from')}")
    if found["not_compared"]:
        parts.append(f"not compared with {', '.join(found['not_compared'])}")
    return "; ".join(parts) + f" (Holm over {found['comparisons']} comparisons)"
