import json

import numpy as np
import pytest

from swallow_jax import stats
from swallow_jax.evaluate import metrics

LABELS = ["lie", "gift", "compliant"]
STATISTICS = metrics.Statistics(level=0.95, permutations=1000, resamples=2000, seed=0, bins=2, simulations=0)


def rows(model, seed, table, probs=None):
    """Prediction rows from {item: (gold, pred)}."""
    return [
        {"conversation_id": item, "model": model, "test_set": "t", "seed": seed, "gold": gold, "pred": pred,
         "valid": pred != "invalid", "raw": pred, **({"probs": probs[item]} if probs else {})}
        for item, (gold, pred) in table.items()
    ]  # fmt: skip


FOUR = {"p1v": ("lie", "lie"), "p1c": ("compliant", "compliant"), "p2v": ("gift", "lie"), "p2c": ("compliant", "gift")}
GOLD = {item: gold for item, (gold, _) in FOUR.items()}
PAIR = {item: item[:2] for item in FOUR}


def value(results, metric, model="m"):
    return next(r for r in results["scores"] if r["metric"] == metric and r["model"] == model)


def results_of(*tables, comparisons=(), names=("m", "n")):
    """Results where each positional table is {seed: {item: (gold, pred)}} of one model."""
    every = [
        row for name, by_seed in zip(names, tables, strict=False) for seed, t in by_seed.items() for row in rows(name, seed, t)
    ]
    return metrics.results(metrics.arms(every, GOLD), LABELS, PAIR, comparisons, STATISTICS)


def test_category_and_binary_differ_where_the_wrong_violation_is_named():
    found = results_of({0: FOUR})
    assert [value(found, m)["correct"] for m in ("exact_category", "binary")] == [2, 3]
    assert value(found, "violation_found")["correct"] == value(found, "violation_found")["n"] == 2
    assert (value(found, "compliant_passed")["correct"], value(found, "compliant_passed")["n"]) == (1, 2)
    assert value(found, "recall/lie")["value"] == 1 and value(found, "recall/gift")["value"] == 0


def test_an_invalid_answer_is_wrong_everywhere():
    """Also where 'not compliant' would have been right, and on compliant items."""
    table = {item: (gold, "invalid") for item, (gold, _) in FOUR.items()}
    found = results_of({0: table})
    assert all(row["correct"] == 0 for row in found["scores"])
    arm = metrics.arms(rows("m", 0, table), GOLD)["m"]
    details = metrics.details(arm, LABELS, STATISTICS)
    assert details["invalid"] == 4 and details["false_alarms"] == 2
    assert details["confusion"]["lie"] == {"lie": 0, "gift": 0, "compliant": 0, "invalid": 1}


def test_results_have_the_contracts_fields():
    found = results_of({0: FOUR}, {0: FOUR}, comparisons=[{"a": "m", "b": "n", "metric": "binary"}])
    assert {"model", "metric", "test_set", "n", "correct", "value", "ci95"} <= set(found["scores"][0])
    wanted = {"a", "b", "metric", "test_set", "n", "b01", "b10", "diff", "ci95", "p_pairs", "p_mcnemar", "mde"}
    assert wanted <= set(found["paired"][0])
    assert json.loads(json.dumps(found)) == found


def test_one_seed_has_the_wilson_interval():
    assert value(results_of({0: FOUR}), "exact_category")["ci95"] == list(stats.wilson(2, 4))


def test_an_arm_of_several_seeds_is_their_mean_and_lists_them():
    right = {item: (gold, gold) for item, (gold, _) in FOUR.items()}
    row = value(results_of({0: FOUR, 1: right, 2: right}), "exact_category")
    assert row["value"] == pytest.approx(10 / 12) and row["correct"] == pytest.approx(10 / 3) and row["n"] == 4
    assert [(s["seed"], s["correct"]) for s in row["by_seed"]] == [(0, 2), (1, 4), (2, 4)]
    assert row["ci95"][0] <= stats.wilson(10 / 3, 4)[0] and row["ci95"][1] >= stats.wilson(10 / 3, 4)[1]


def test_a_is_better_means_a_positive_difference():
    worse = {item: (gold, "compliant") for item, (gold, _) in FOUR.items()}  # right on both compliant items
    right = {item: (gold, gold) for item, (gold, _) in FOUR.items()}
    paired = results_of({0: right}, {0: worse}, comparisons=[{"a": "m", "b": "n", "metric": "exact_category"}])["paired"][0]
    assert (paired["b01"], paired["b10"], paired["diff"]) == (0, 2, 0.5)
    assert paired["p_mcnemar"] == stats.mcnemar_exact(0, 2) and paired["p_holm"] == paired["p_pairs"] == 0.5


def test_discordant_counts_of_several_seeds_are_means_and_mcnemar_is_null():
    right = {item: (gold, gold) for item, (gold, _) in FOUR.items()}
    paired = results_of({0: right, 1: FOUR}, {0: FOUR}, comparisons=[{"a": "m", "b": "n", "metric": "exact_category"}])["paired"][
        0
    ]
    assert paired["p_mcnemar"] is None and paired["seeds_a"] == [0, 1]
    assert (paired["b01"], paired["b10"]) == (0, 1)
    assert paired["diff"] == pytest.approx((paired["b10"] - paired["b01"]) / paired["n"])


def test_holm_covers_all_declared_comparisons():
    right = {item: (gold, gold) for item, (gold, _) in FOUR.items()}
    declared = [{"a": "m", "b": "n", "metric": name} for name in ("exact_category", "binary", "compliant_passed")]
    paired = results_of({0: right}, {0: FOUR}, comparisons=declared)["paired"]
    assert [row["p_holm"] for row in paired] == stats.holm([row["p_pairs"] for row in paired])


def test_category_figures_on_a_literal_confusion():
    table = {
        "1": ("lie", "lie"),
        "2": ("lie", "gift"),
        "3": ("gift", "gift"),
        "4": ("compliant", "gift"),
        "5": ("compliant", "compliant"),
    }
    arm = metrics.arms(rows("m", 0, table), {item: gold for item, (gold, _) in table.items()})["m"]
    details = metrics.details(arm, LABELS, STATISTICS)
    by_label = {c["label"]: c for c in details["categories"]}
    assert (by_label["gift"]["precision"], by_label["gift"]["recall"]) == (1 / 3, 1.0)
    assert by_label["gift"]["f1"] == pytest.approx(0.5) and by_label["lie"]["f1"] == pytest.approx(2 / 3)
    assert details["macro_f1"] == pytest.approx(np.mean([2 / 3, 0.5, 2 / 3]))
    assert details["false_alarms"] == 1 and details["compliant"] == 2


def test_calibration_comes_from_the_label_probabilities():
    probs = {item: {"lie": 0.2, "gift": 0.2, "compliant": 0.6} for item in FOUR}
    table = {item: (gold, "compliant") for item, (gold, _) in FOUR.items()}
    arm = metrics.arms(rows("m", 0, table, probs), GOLD)["m"]
    found = metrics.details(arm, LABELS, STATISTICS)["calibration"]
    assert found["brier"] == pytest.approx((2 * (0.04 + 0.04 + 0.16) + 2 * (0.64 + 0.04 + 0.36)) / 4)
    assert "calibration" not in metrics.details(metrics.arms(rows("m", 0, table), GOLD)["m"], LABELS, STATISTICS)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("p2c"), "1 items have no prediction"),
        (lambda t: t.update(p2c=("gift", "gift")), "the test set says 'compliant'"),
        (lambda t: t.update(new=("gift", "gift")), "not in the test set"),
    ],
)
def test_rows_that_do_not_cover_the_test_set_are_refused(change, words):
    table = dict(FOUR)
    change(table)
    with pytest.raises(ValueError, match=words):
        metrics.arms(rows("m", 0, table), GOLD)


def test_unknown_metric_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'acuracy'.*exact_category"):
        metrics.metric("acuracy")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pred": "lies"}, "pred 'lies' is no label"),
        ({"gold": "theft"}, "gold 'theft' is no label"),
        ({"valid": False}, "invalid exactly when"),
        ({"seed": "0"}, "'seed' is '0', int is wanted"),
        ({"seed": True}, "'seed' is True"),
        ({"probs": {"lie": 1.0}}, "one probability to each label"),
        ({"probs": {"lie": 0.9, "gift": 0.9, "compliant": 0.0}}, "sum to 1"),
        ({"conversation_id": "p1v"}, "the same model, seed and conversation as line 1"),
    ],
)
def test_a_broken_prediction_line_is_named_by_file_and_line(tmp_path, change, words):
    lines = rows("m", 0, FOUR)
    lines[2] = lines[2] | change
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")  # blank lines count
    with pytest.raises(ValueError, match=rf"predictions.jsonl:5: .*{words}"):
        metrics.read_predictions(str(path), LABELS)


def test_whole_prediction_files_are_read_as_they_are(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("m", 0, FOUR)))
    assert metrics.read_predictions(str(path), LABELS) == rows("m", 0, FOUR)


def test_rows_of_two_test_sets_are_not_scored_together():
    table = rows("m", 0, FOUR)
    table[2]["test_set"] = "another"
    with pytest.raises(ValueError, match=r"name 2 test sets, \['another', 't'\]"):
        metrics.arms(table, GOLD)
