"""Named, versioned metrics over prediction rows, and the results form (`scores.json`) built from them.

A prediction row is design.md's `{"conversation_id", "model", "test_set", "seed", "gold", "pred", "probs"?, "valid", "raw"}`;
`gold` and `pred` are label ids, `compliant` for no violation, and `invalid` (with `valid` false) where an answer named no
label. An invalid answer is wrong under every metric, and is counted beside them. Rows of one `model` name with several
seeds are one arm.

Letters: S seeds, I items, C labels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from swallow_jax import run, stats

COMPLIANT = "compliant"
INVALID = "invalid"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A share of items: `applies` chooses the items by their gold label, `right` judges a valid answer."""

    name: str
    version: int
    applies: Callable[[str], bool]
    right: Callable[[str, str], bool]  # (gold, pred)

    def score(self, row: Row) -> bool:
        return bool(row["valid"]) and self.right(row["gold"], row["pred"])


# `exact_category` is the primary metric: the predicted label equals the first gold label, or both are compliant.
METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="exact_category", version=1, applies=lambda gold: True, right=lambda gold, pred: gold == pred),
        Metric(name="binary", version=1, applies=lambda gold: True,
               right=lambda gold, pred: (gold == COMPLIANT) == (pred == COMPLIANT)),
        Metric(name="violation_found", version=1, applies=lambda gold: gold != COMPLIANT,
               right=lambda gold, pred: pred != COMPLIANT),
        # One minus the false-alarm rate: an invalid answer on a compliant item needs a person too, so it counts against.
        Metric(name="compliant_passed", version=1, applies=lambda gold: gold == COMPLIANT,
               right=lambda gold, pred: pred == COMPLIANT),
    )
}  # fmt: skip


def metric(name: str) -> Metric:
    """The metric of this name; `recall/<category>` is the exact-category share within one gold category."""
    if name.startswith("recall/"):
        category = name.removeprefix("recall/")
        return Metric(name=name, version=1, applies=lambda gold: gold == category, right=lambda gold, pred: gold == pred)
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(METRICS)} and recall/<category>")
    return METRICS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What decides about chance; every number is written in the config."""

    level: float  # of intervals, e.g. 0.95
    permutations: int  # sign patterns drawn where the exact test is out of reach
    resamples: int  # of the bootstrap
    seed: int
    bins: int  # of the calibration error


def problem(row: Any, labels: Sequence[str]) -> str | None:
    """The first thing wrong with a prediction row, as a sentence with its remedy, or None. `labels` includes compliant."""
    for field, kind in (("conversation_id", str), ("model", str), ("test_set", str), ("gold", str), ("pred", str),
                        ("raw", str), ("seed", int), ("valid", bool)):  # fmt: skip
        if not isinstance(row.get(field), kind) or (kind is int and isinstance(row[field], bool)):
            return f"{field!r} is {row.get(field)!r}, {kind.__name__} is wanted"
    if row["gold"] not in labels:
        return f"gold {row['gold']!r} is no label of the task; known: {', '.join(labels)}"
    if row["valid"] != (row["pred"] != INVALID):
        return f"valid is {row['valid']} with pred {row['pred']!r}; an answer is invalid exactly when pred is {INVALID!r}"
    if row["valid"] and row["pred"] not in labels:
        return f"pred {row['pred']!r} is no label of the task; known: {', '.join(labels)}"
    probs = row.get("probs")
    if probs is not None:
        if not isinstance(probs, dict) or set(probs) != set(labels):
            return "'probs' must give one probability to each label of the task"
        if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in probs.values()) or abs(sum(probs.values()) - 1) > 1e-3:
            return "'probs' must be numbers between 0 and 1 that sum to 1"
    return None


def read_predictions(path: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a predictions file, each checked; ValueError names file:line, also of a row that stands twice."""
    rows, seen = [], {}
    for number, row in _numbered(path):
        if found := problem(row, labels):
            raise ValueError(f"{path}:{number}: {found}")
        key = (row["model"], row["seed"], row["test_set"], row["conversation_id"])
        if key in seen:
            raise ValueError(f"{path}:{number}: the same model, seed and conversation as line {seen[key]}; remove one")
        seen[key] = number
        rows.append(row)
    return rows


def _numbered(path: str) -> Iterable[tuple[int, dict[str, Any]]]:
    rows = run.iter_jsonl(path)
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, next(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """All rows of one model name on one test set: `rows[s][i]` for seed s and item i, items in the test set's order."""

    name: str
    test_set: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[Row, ...], ...]

    def scores(self, of: Metric) -> np.ndarray:
        """[S, I'] of 0 and 1 over the items the metric applies to."""
        return np.array([[of.score(row) for row in seed if of.applies(row["gold"])] for seed in self.rows], dtype=float)

    def pairs(self, of: Metric, pair_of: Mapping[str, str]) -> list[str]:
        return [pair_of[row["conversation_id"]] for row in self.rows[0] if of.applies(row["gold"])]


def arms(rows: Sequence[Row], gold_of: Mapping[str, str]) -> dict[str, Arm]:
    """Group rows by model, in order of appearance; every seed of an arm must cover every item of `gold_of`, in its order.

    Raises ValueError for a missing, unknown or twice answered item, and for a gold label that is not the test set's.
    """
    grouped: dict[str, dict[int, dict[str, Row]]] = {}
    for row in rows:
        name = f"model {row['model']!r} seed {row['seed']}"
        item = row["conversation_id"]
        if item not in gold_of:
            raise ValueError(f"{name}: {item!r} is not in the test set; evaluate again on this test set")
        if row["gold"] != gold_of[item]:
            raise ValueError(f"{name}: {item!r} has gold {row['gold']!r}, the test set says {gold_of[item]!r}")
        answered = grouped.setdefault(row["model"], {}).setdefault(row["seed"], {})
        if item in answered:
            raise ValueError(f"{name}: {item!r} is answered twice")
        answered[item] = row
    for model, by_seed in grouped.items():
        for seed, answered in by_seed.items():
            if missing := [item for item in gold_of if item not in answered]:
                raise ValueError(
                    f"model {model!r} seed {seed}: {len(missing)} items have no prediction, the first is "
                    f"{missing[0]!r}; run the evaluation again, it goes on where it stopped"
                )
    return {
        model: Arm(name=model, test_set=next(iter(by_seed[min(by_seed)].values()))["test_set"], seeds=tuple(sorted(by_seed)),
                   rows=tuple(tuple(by_seed[seed][item] for item in gold_of) for seed in sorted(by_seed)))
        for model, by_seed in grouped.items()
    }  # fmt: skip


def score_row(arm: Arm, of: Metric, pair_of: Mapping[str, str], statistics: Statistics) -> dict[str, Any]:
    """One row of the results form. One seed: Wilson. Several: mean over seeds, bootstrap over pairs and seeds.

    The bootstrap interval shrinks to a point where all pairs come out alike (say, one right of two everywhere); it is
    therefore never shown narrower than the Wilson interval of a single run with the same mean.
    """
    scores_SI = arm.scores(of)
    n = scores_SI.shape[1]
    correct = scores_SI.sum(1)
    mean = float(correct.mean())
    low, high = stats.wilson(mean, n, statistics.level)
    row = {"model": arm.name, "metric": of.name, "test_set": arm.test_set, "n": n, "correct": _whole(mean), "value": mean / n}
    if len(arm.seeds) > 1:
        drawn = stats.paired_bootstrap(scores_SI, None, arm.pairs(of, pair_of), resamples=statistics.resamples,
                                       seed=statistics.seed, level=statistics.level)  # fmt: skip
        low, high = min(low, drawn[0]), max(high, drawn[1])
    row |= {"ci95": [low, high], "metric_version": of.version, "level": statistics.level, "seeds": list(arm.seeds)}
    row["interval"] = "wilson" if len(arm.seeds) == 1 else "bootstrap over pairs and seeds, not narrower than wilson"
    if len(arm.seeds) > 1:
        row["by_seed"] = [
            {"seed": seed, "n": n, "correct": int(k), "value": k / n, "ci95": list(stats.wilson(k, n, statistics.level))}
            for seed, k in zip(arm.seeds, correct.tolist(), strict=True)
        ]
    return row


def compare(a: Arm, b: Arm, of: Metric, pair_of: Mapping[str, str], statistics: Statistics) -> dict[str, Any]:
    """One paired row: `diff` = value of a - value of b; `b01` a wrong and b right, `b10` a right and b wrong.

    With several seeds the two counts are means over all combinations of the arms' seeds, and McNemar's test, which knows
    single runs only, is null.
    """
    a_SI, b_SI = a.scores(of), b.scores(of)
    pairs = a.pairs(of, pair_of)
    n = a_SI.shape[1]
    a_I, b_I = a_SI.mean(0), b_SI.mean(0)
    b01, b10 = _whole(float(((1 - a_I) * b_I).sum())), _whole(float((a_I * (1 - b_I)).sum()))
    single = len(a.seeds) == len(b.seeds) == 1
    chance = {"permutations": statistics.permutations, "seed": statistics.seed}
    interval = {"resamples": statistics.resamples, "seed": statistics.seed, "level": statistics.level}
    return {
        "a": a.name, "b": b.name, "metric": of.name, "test_set": a.test_set, "n": n, "b01": b01, "b10": b10,
        "diff": float((a_I - b_I).mean()),
        "ci95": list(stats.paired_bootstrap(a_SI, b_SI, pairs, **interval)),
        "p_pairs": stats.sign_flip_pairs(a_SI, b_SI, pairs, **chance),
        "p_mcnemar": stats.mcnemar_exact(int(b01), int(b10)) if single else None,
        "mde": stats.mde(n, stats.discordance(a_SI, b_SI, pairs), level=statistics.level),
        "pairs": len(set(pairs)), "metric_version": of.version, "seeds_a": list(a.seeds), "seeds_b": list(b.seeds),
    }  # fmt: skip


def results(
    by_name: Mapping[str, Arm],
    labels: Sequence[str],
    pair_of: Mapping[str, str],
    comparisons: Sequence[Mapping[str, str]],
    statistics: Statistics,
) -> dict[str, list[dict[str, Any]]]:
    """The results form of design.md: every metric for every arm, the declared comparisons with Holm over all of them."""
    golds = {row["gold"] for arm in by_name.values() for row in arm.rows[0]}
    named = [*METRICS.values(), *(metric(f"recall/{label}") for label in labels if label != COMPLIANT)]
    scores = [
        score_row(arm, of, pair_of, statistics)
        for arm in by_name.values()
        for of in named
        if any(of.applies(gold) for gold in golds)
    ]
    paired = []
    for entry in comparisons:
        for side in ("a", "b"):
            if entry[side] not in by_name:
                raise ValueError(f"comparison names the model {entry[side]!r}; this evaluation has: {', '.join(by_name)}")
        paired.append(compare(by_name[entry["a"]], by_name[entry["b"]], metric(entry["metric"]), pair_of, statistics))
    for row, adjusted in zip(paired, stats.holm([row["p_pairs"] for row in paired]), strict=True):
        row["p_holm"] = adjusted
    return {"scores": scores, "paired": paired}


def details(arm: Arm, labels: Sequence[str], statistics: Statistics) -> dict[str, Any]:
    """What one number hides: confusion counts, per-category precision/recall/F1, false alarms, invalid answers, calibration.

    Counts are summed over the arm's seeds; `confusion[gold][pred]` has a column for invalid answers.
    """
    rows = [row for seed in arm.rows for row in seed]
    confusion = {gold: dict.fromkeys([*labels, INVALID], 0) for gold in labels}
    for row in rows:
        confusion[row["gold"]][row["pred"]] += 1
    categories = []
    for label in labels:
        hits, support = confusion[label][label], sum(confusion[label].values())
        called = sum(confusion[gold][label] for gold in labels)
        categories.append({
            "label": label, "support": support, "predicted": called, "hits": hits,
            "precision": hits / called if called else None, "recall": hits / support if support else None,
            "f1": 2 * hits / (called + support) if called + support else None,
        })  # fmt: skip
    f1 = [c["f1"] for c in categories if c["support"]]
    compliant = sum(confusion[COMPLIANT].values()) if COMPLIANT in confusion else 0
    alarms = compliant - confusion[COMPLIANT][COMPLIANT] if compliant else 0
    found = {
        "model": arm.name, "test_set": arm.test_set, "seeds": list(arm.seeds), "answers": len(rows), "confusion": confusion,
        "categories": categories, "macro_f1": float(np.mean(f1)),
        "false_alarms": alarms, "compliant": compliant, "invalid": sum(not row["valid"] for row in rows),
    }  # fmt: skip
    if all(row.get("probs") for row in rows):
        probs_IC = np.array([[row["probs"][label] for label in labels] for row in rows])
        probs_IC /= probs_IC.sum(1, keepdims=True)
        gold_I = [labels.index(row["gold"]) for row in rows]
        found["calibration"] = {
            "brier": stats.brier(probs_IC, gold_I),
            "ece": stats.ece(probs_IC, gold_I, bins=statistics.bins),
            "reliability": stats.reliability(probs_IC, gold_I, bins=statistics.bins),
        }
    return found


def _whole(value: float) -> int | float:
    """Counts stay whole numbers where they are; a mean over seeds may not be."""
    return round(value) if math.isclose(value, round(value), abs_tol=1e-9) else value
