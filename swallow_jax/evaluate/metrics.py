"""Named, versioned metrics over prediction rows, and the results form (`scores.json`) built from them.

A prediction row is design.md's `{"conversation_id", "model", "test_set", "seed", "gold", "pred", "probs"?, "valid", "raw"}`;
`gold` and `pred` are label ids, `compliant` for no violation, and `invalid` (with `valid` false) where an answer named no
label. An invalid answer is wrong under every metric, and is counted beside them. Rows of one `model` name with several
seeds are one arm.

Where all labels of an item count, a row has `golds` and `preds` too, lists of category ids (empty: compliant), and its `probs`
are each label's own probability. An answer in verdict form adds `evidence` and `missing_items`, as in a conversation.

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
    """A share of items: `applies` chooses the rows by what is true of them, `right` judges a valid answer."""

    name: str
    version: int
    applies: Callable[[Row], bool]
    right: Callable[[Row], bool]
    needs: str | None = None  # a field some row of the arm must have; an arm without it has no such figure

    def score(self, row: Row) -> bool:
        return bool(row["valid"]) and self.right(row)


def gold_set(row: Row) -> set[str]:
    return set(row["golds"]) if "golds" in row else {row["gold"]} - {COMPLIANT}


def pred_set(row: Row) -> set[str]:
    return set(row["preds"]) if "preds" in row else {row["pred"]} - {COMPLIANT, INVALID}


def quote_hits(row: Row) -> list[bool]:
    """For each gold quote: does a predicted quote of the same category overlap it in the same turn?

    Both are exact parts of their turn; they overlap where one holds the other, or where they share ten characters.
    """
    said = {(item["category"], item["turn"]): item["quote"] for item in row.get("evidence", ())}

    def hit(item: Mapping[str, Any]) -> bool:
        found = said.get((item["category"], item["turn"]))
        return found is not None and (
            found in item["quote"]
            or item["quote"] in found
            or any(found[i : i + 10] in item["quote"] for i in range(len(found) - 9))
        )

    return [hit(item) for item in row["gold_evidence"]]


# `exact_category` is the primary metric where one label is the answer: the predicted label equals the first gold label, or both
# are compliant. `exact_set` is primary where all labels are.
METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="exact_category", version=1, applies=lambda row: True, right=lambda row: row["gold"] == row["pred"]),
        Metric(name="binary", version=1, applies=lambda row: True,
               right=lambda row: (row["gold"] == COMPLIANT) == (row["pred"] == COMPLIANT)),
        Metric(name="violation_found", version=1, applies=lambda row: row["gold"] != COMPLIANT,
               right=lambda row: row["pred"] != COMPLIANT),
        # One minus the false-alarm rate: an invalid answer on a compliant item needs a person too, so it counts against.
        Metric(name="compliant_passed", version=1, applies=lambda row: row["gold"] == COMPLIANT,
               right=lambda row: row["pred"] == COMPLIANT),
        Metric(name="exact_set", version=1, applies=lambda row: True, right=lambda row: gold_set(row) == pred_set(row),
               needs="golds"),
        # The first category with one of its quotes: right for the right reason.
        Metric(name="evidence_hit", version=1, applies=lambda row: bool(row.get("gold_evidence")),
               right=lambda row: any(quote_hits(row)), needs="evidence"),
        # All that was left unsaid and nothing else: naming everything is no answer.
        Metric(name="missing_items", version=1, applies=lambda row: bool(row.get("gold_missing")),
               right=lambda row: set(row.get("missing_items", ())) == set(row["gold_missing"]), needs="missing_items"),
    )
}  # fmt: skip


def metric(name: str) -> Metric:
    """The metric of this name; `recall/<category>` is the exact-category share within one gold category."""
    if name.startswith("recall/"):
        category = name.removeprefix("recall/")
        return Metric(name=name, version=1, applies=lambda row: row["gold"] == category,
                      right=lambda row: row["gold"] == row["pred"])  # fmt: skip
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
    simulations: int  # of each interval's coverage, shown beside it; 0: none


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
    for field, primary in (("golds", "gold"), ("preds", "pred")):
        if field not in row:
            continue
        labelled = row[field]
        if not isinstance(labelled, list) or not all(isinstance(label, str) for label in labelled):
            return f"{field!r} is {labelled!r}, a list of category ids is wanted"
        if unknown := [label for label in labelled if label not in labels or label == COMPLIANT]:
            return f"{field!r} holds {unknown[0]!r}, which is no category of the task; an empty list means compliant"
        if len(set(labelled)) < len(labelled):
            return f"{field!r} names a category twice: {labelled}"
        first = labelled[0] if labelled else COMPLIANT
        if row[primary] != first and (row["valid"] or primary == "gold"):
            return f"{primary!r} is {row[primary]!r}, but {field!r} begins with {first!r}; the first label is the primary one"
    if ("golds" in row) != ("preds" in row):
        return "'golds' and 'preds' go together; write both or neither"
    return _probs_problem(row, labels) or _findings_problem(row, labels)


def _probs_problem(row: Row, labels: Sequence[str]) -> str | None:
    probs = row.get("probs")
    if probs is None:
        return None
    if not isinstance(probs, dict) or set(probs) != set(labels):
        return "'probs' must give one probability to each label of the task"
    if not all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in probs.values()):
        return "'probs' must be numbers between 0 and 1"
    if "golds" not in row and abs(sum(probs.values()) - 1) > 1e-3:
        return "'probs' must sum to 1; only where all labels count does each have its own"
    return None


def _findings_problem(row: Row, labels: Sequence[str]) -> str | None:
    """What is wrong with the quotes and missing items of an answer in verdict form."""
    found = row.get("evidence", [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        return "'evidence' must be a list of {category, turn, quote}"
    for item in found:
        if item.get("category") not in labels or not isinstance(item.get("turn"), int) or not isinstance(item.get("quote"), str):
            return f"'evidence' holds {item!r}; {{category: one of the task's, turn: a number, quote: text}} is wanted"
    missing = row.get("missing_items", [])
    if not isinstance(missing, list) or not all(isinstance(item, str) for item in missing):
        return f"'missing_items' is {missing!r}, a list of texts is wanted"
    return None


def read_predictions(path: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a predictions file, each checked; ValueError names file:line, also of a row that stands twice."""
    rows, seen = [], {}
    for number, row in run.numbered_jsonl(path):
        if found := problem(row, labels):
            raise ValueError(f"{path}:{number}: {found}")
        key = (row["model"], row["seed"], row["test_set"], row["conversation_id"])
        if key in seen:
            raise ValueError(f"{path}:{number}: the same model, seed and conversation as line {seen[key]}; remove one")
        seen[key] = number
        rows.append(row)
    return rows


def with_gold(rows: Iterable[Row], conversations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows beside what the test set says of them: `golds`, `gold_evidence`, `gold_missing` (what the file need not repeat).

    `golds` appear only where a conversation of the set has several labels. ValueError where a row's own differ.
    """
    items = {c["conversation_id"]: c for c in conversations}
    several = any(len(c["labels"]) > 1 for c in conversations)
    joined = []
    for row in rows:
        item = items.get(row["conversation_id"])
        if item is None:
            raise ValueError(f"{row['model']!r}: {row['conversation_id']!r} is not in the test set; evaluate again on this one")
        if "golds" in row and row["golds"] != item["labels"]:
            raise ValueError(
                f"{row['model']!r}: {row['conversation_id']!r} has golds {row['golds']}, the test set says {item['labels']}"
            )
        gold = {"gold_evidence": item["evidence"], "gold_missing": item["missing_items"]}
        joined.append({**row, **({"golds": item["labels"]} if several else {}), **gold})
    return joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """All rows of one model name on one test set: `rows[s][i]` for seed s and item i, items in the test set's order."""

    name: str
    test_set: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[Row, ...], ...]

    def scores(self, of: Metric) -> np.ndarray:
        """[S, I'] of 0 and 1 over the items the metric applies to."""
        return np.array([[of.score(row) for row in seed if of.applies(row)] for seed in self.rows], dtype=float)

    def has(self, of: Metric) -> bool:
        """Whether the metric says anything about this arm."""
        rows = [row for seed in self.rows for row in seed]
        return any(map(of.applies, rows)) and (of.needs is None or any(of.needs in row for row in rows))

    def pairs(self, of: Metric, pair_of: Mapping[str, str]) -> list[str]:
        return [pair_of[row["conversation_id"]] for row in self.rows[0] if of.applies(row)]


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
        sets = {row["test_set"] for answered in by_seed.values() for row in answered.values()}
        if len(sets) > 1:
            raise ValueError(f"model {model!r}: its rows name {len(sets)} test sets, {sorted(sets)}; score one set at a time")
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
        # Noise of training and noise of the choice of items, apart: few seeds allow a t-interval, not a bootstrap.
        values = correct / n
        row["sd_seeds"], row["ci95_seeds"] = float(values.std(ddof=1)), list(stats.t_interval(values, statistics.level))
        row["se_items"] = stats.pair_standard_error(scores_SI, arm.pairs(of, pair_of))
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
    for arm in (a, b):
        if not arm.has(of):
            raise ValueError(
                f"{arm.name!r} has no {of.name}: its answers hold no {of.needs or 'such item'}; compare by another metric"
            )
    a_SI, b_SI = a.scores(of), b.scores(of)
    return {"test_set": a.test_set, **paired_row(a_SI, b_SI, a.pairs(of, pair_of), statistics),
            "a": a.name, "b": b.name, "metric": of.name, "metric_version": of.version,
            "seeds_a": list(a.seeds), "seeds_b": list(b.seeds)}  # fmt: skip


def paired_row(a_SI: np.ndarray, b_SI: np.ndarray, pairs: Sequence[str], statistics: Statistics) -> dict[str, Any]:
    """What `compare` says of two tables of right and wrong over the same items."""
    n = a_SI.shape[1]
    a_I, b_I = a_SI.mean(0), b_SI.mean(0)
    b01, b10 = _whole(float(((1 - a_I) * b_I).sum())), _whole(float((a_I * (1 - b_I)).sum()))
    single = len(a_SI) == len(b_SI) == 1
    chance = {"permutations": statistics.permutations, "seed": statistics.seed}
    interval = {"resamples": statistics.resamples, "seed": statistics.seed, "level": statistics.level}
    row = {
        "n": n, "b01": b01, "b10": b10,
        "diff": float((a_I - b_I).mean()),
        "ci95": list(stats.paired_bootstrap(a_SI, b_SI, pairs, **interval)),
        "p_pairs": stats.sign_flip_pairs(a_SI, b_SI, pairs, **chance),
        "p_mcnemar": stats.mcnemar_exact(int(b01), int(b10)) if single else None,
        "mde": stats.mde(n, stats.discordance(a_SI, b_SI, pairs), level=statistics.level),
        "pairs": len(set(pairs)),
    }  # fmt: skip
    if statistics.simulations:
        row["coverage"] = stats.simulated_coverage(
            a_SI, b_SI, pairs, simulations=statistics.simulations, seed=statistics.seed, level=statistics.level
        )
    return row


def results(
    by_name: Mapping[str, Arm],
    labels: Sequence[str],
    pair_of: Mapping[str, str],
    comparisons: Sequence[Mapping[str, str]],
    statistics: Statistics,
) -> dict[str, list[dict[str, Any]]]:
    """The results form of design.md: every metric for every arm, the declared comparisons with Holm over all of them."""
    named = [*METRICS.values(), *(metric(f"recall/{label}") for label in labels if label != COMPLIANT)]
    scores = [score_row(arm, of, pair_of, statistics) for arm in by_name.values() for of in named if arm.has(of)]
    paired = []
    for entry in comparisons:
        for side in ("a", "b"):
            if entry[side] not in by_name:
                raise ValueError(f"comparison names the model {entry[side]!r}; this evaluation has: {', '.join(by_name)}")
        paired.append(compare(by_name[entry["a"]], by_name[entry["b"]], metric(entry["metric"]), pair_of, statistics))
    return {"scores": scores, "paired": adjusted(paired)}


def adjusted(paired: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with Holm's p over all of them."""
    for row, p in zip(paired, stats.holm([row["p_pairs"] for row in paired]), strict=True):
        row["p_holm"] = p
    return paired


def details(arm: Arm, labels: Sequence[str], statistics: Statistics, *, several: bool = False) -> dict[str, Any]:
    """What one number hides: confusion counts, per-category precision/recall/F1, false alarms, invalid answers, calibration.

    Counts are summed over the arm's seeds; `confusion[gold][pred]` has a column for invalid answers.
    """
    rows = [row for seed in arm.rows for row in seed]
    confusion = {gold: dict.fromkeys([*labels, INVALID], 0) for gold in labels}
    for row in rows:
        confusion[row["gold"]][row["pred"]] += 1
    # Where all labels count (`several`), a category is judged by membership; else by the primary label.
    wanted = [gold_set(row) or {COMPLIANT} if several else {row["gold"]} for row in rows]
    called = [((pred_set(row) or {COMPLIANT}) if several else {row["pred"]}) if row["valid"] else set() for row in rows]
    categories = [
        category_row(label, sum(label in w for w in wanted), sum(label in c for c in called),
                     sum(label in w and label in c for w, c in zip(wanted, called, strict=True)))
        for label in labels
    ]  # fmt: skip
    f1 = [c["f1"] for c in categories if c["support"]]
    compliant = sum(confusion[COMPLIANT].values()) if COMPLIANT in confusion else 0
    alarms = compliant - confusion[COMPLIANT][COMPLIANT] if compliant else 0
    found = {
        "model": arm.name, "test_set": arm.test_set, "seeds": list(arm.seeds), "answers": len(rows), "confusion": confusion,
        "categories": categories, "macro_f1": float(np.mean(f1)), "several_labels": several,
        "false_alarms": alarms, "compliant": compliant, "invalid": sum(not row["valid"] for row in rows),
    }  # fmt: skip
    if any("evidence" in row for row in rows):
        hits = [hit for row in rows for hit in (quote_hits(row) if row["valid"] and "gold_evidence" in row else ())]
        named = [set(row.get("missing_items", ())) for row in rows]
        unsaid = [set(row.get("gold_missing", ())) for row in rows]
        found["findings"] = {
            "gold_quotes": sum(len(row.get("gold_evidence", ())) for row in rows), "quotes_hit": sum(hits),
            "quotes": sum(len(row.get("evidence", ())) for row in rows),
            "false_quotes": sum(row.get("false_quotes", 0) for row in rows),
            "gold_missing": sum(map(len, unsaid)), "missing_named": sum(map(len, named)),
            "missing_hit": sum(len(a & b) for a, b in zip(named, unsaid, strict=True)),
        }  # fmt: skip
    if not several and all(row.get("probs") for row in rows):
        probs_IC, gold_I = probabilities(rows, labels)
        found["calibration"] = calibration(probs_IC, gold_I, statistics.bins)
    return found


def category_row(label: str, support: int, predicted: int, hits: int) -> dict[str, Any]:
    """Precision, recall and F1 of one label from three counts; null where there is nothing to divide by."""
    return {
        "label": label, "support": support, "predicted": predicted, "hits": hits,
        "precision": hits / predicted if predicted else None, "recall": hits / support if support else None,
        "f1": 2 * hits / (predicted + support) if predicted + support else None,
    }  # fmt: skip


def probabilities(rows: Sequence[Row], labels: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The label probabilities [I, C] of rows, normalised, and the index of each gold label."""
    probs_IC = np.array([[row["probs"][label] for label in labels] for row in rows])
    return probs_IC / probs_IC.sum(1, keepdims=True), [labels.index(row["gold"]) for row in rows]


def calibration(probs_IC: np.ndarray, gold_I: Sequence[int], bins: int) -> dict[str, Any]:
    return {
        "brier": stats.brier(probs_IC, gold_I),
        "ece": stats.ece(probs_IC, gold_I, bins=bins),
        "reliability": stats.reliability(probs_IC, gold_I, bins=bins),
    }


def _whole(value: float) -> int | float:
    """Counts stay whole numbers where they are; a mean over seeds may not be."""
    return round(value) if math.isclose(value, round(value), abs_tol=1e-9) else value
