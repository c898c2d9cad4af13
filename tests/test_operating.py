"""Thresholds and calibration from dev alone, review load, costs, knowledge and forgetting, flip rates, two versions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate as program
from swallow_jax import report, run, stats, versions
from swallow_jax.evaluate import knowledge, metrics, operating, robustness
from swallow_jax.generate import backends
from tests.test_evaluate import config, conversations, mini_task
from tests.test_metrics import LABELS

CONFIGS = Path(__file__).parents[1] / "configs" / "evaluate"
STATISTICS = metrics.Statistics(level=0.95, permutations=1000, resamples=500, seed=0, bins=2, simulations=0)
SETTINGS = operating.Operating(dev_set="dev:d", recalls=(0.5, 1.0), prevalences=(0.001, 0.5), talks=1000)


def arm(name, table, test_set="t"):
    """One seed from {item: (gold, score)}: the model answers 'lie' where the score is above a half."""
    rows = [
        {"conversation_id": item, "model": name, "test_set": test_set, "seed": 0, "gold": gold, "raw": "", "valid": True,
         "pred": "lie" if p > 0.5 else "compliant", "probs": {"lie": p, "gift": 0.0, "compliant": 1 - p}}
        for item, (gold, p) in table.items()
    ]  # fmt: skip
    return metrics.arms(rows, {item: gold for item, (gold, _) in table.items()})[name]


DEV = arm("m", {"a": ("lie", 0.9), "b": ("lie", 0.3), "c": ("compliant", 0.2), "d": ("compliant", 0.1)}, "dev:d")
TEST = {"1": ("lie", 0.95), "2": ("lie", 0.4), "3": ("compliant", 0.35), "4": ("compliant", 0.05)}


def test_a_threshold_finds_on_dev_what_it_must_and_is_then_fixed():
    found = operating.points(DEV, arm("m", TEST), LABELS, False, SETTINGS, STATISTICS)
    assert [p["threshold"] for p in found["thresholds"]] == [[pytest.approx(0.9)], [pytest.approx(0.3)]]
    assert [(p["found"], p["alarms"]) for p in found["thresholds"]] == [(1, 0), (2, 1)]
    assert (found["as_answered"]["found"], found["as_answered"]["alarms"]) == (1, 0)
    assert found["thresholds"][1]["load"][0] == {"prevalence": 0.001, **stats.review_load(1.0, 0.5, 0.001, 1000)}


def test_no_test_answer_moves_a_threshold_or_the_temperature():
    other = {item: (gold, 0.5) for item, (gold, _) in TEST.items()}
    a, b = (operating.points(DEV, arm("m", table), LABELS, False, SETTINGS, STATISTICS) for table in (TEST, other))
    assert [p["threshold"] for p in a["thresholds"]] == [p["threshold"] for p in b["thresholds"]]
    assert a["temperature"] == b["temperature"]


def test_an_invalid_answer_finds_nothing_and_costs_a_review():
    table = arm("m", TEST)
    rows = [[{**row, "pred": "invalid", "valid": False} for row in table.rows[0]]]
    invalid = metrics.Arm(name="m", test_set="t", seeds=(0,), rows=tuple(map(tuple, rows)))
    point = operating.points(DEV, invalid, LABELS, False, SETTINGS, STATISTICS)["as_answered"]
    assert (point["found"], point["alarms"]) == (0, 2)


def test_review_load_at_a_rare_violation_is_mostly_false_alarms():
    """86 % found and 86 % passed: at a prevalence of 0.13 % one flagged talk in 125 violates, at 50 % 86 of 100."""
    assert stats.review_load(0.86, 0.14, 0.0013, 10_000)["precision"] == pytest.approx(0.008, abs=0.0005)
    half = stats.review_load(0.86, 0.14, 0.5, 10_000)
    assert half["precision"] == pytest.approx(0.86) and half["flagged"] == pytest.approx(5000)
    assert half["missed"] == pytest.approx(700)
    assert stats.review_load(0.0, 0.0, 0.5, 10)["precision"] is None


def test_the_temperature_undoes_a_known_one():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (4000, 3))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gold = [int(generator.choice(3, p=p)) for p in true]
    sharp = stats.tempered(true, 0.5)
    assert stats.temperature(sharp, gold) == pytest.approx(2.0, rel=0.08)
    assert stats.ece(stats.tempered(sharp, stats.temperature(sharp, gold)), gold, bins=10) < stats.ece(sharp, gold, bins=10) / 2


def test_costs_are_per_thousand_checks_and_null_where_nobody_knows():
    timings = [{"asked": 100, "seconds": 50.0, "prompt_tokens": 200_000, "completion_tokens": 1000},
               {"asked": 300, "seconds": 150.0, "prompt_tokens": 600_000, "completion_tokens": 3000}]  # fmt: skip
    price = operating.Price(currency="USD", source="list", input_per_million=2.5, output_per_million=10.0)
    found = operating.cost(timings, price)
    assert (found["seconds_per_1000"], found["tokens_per_1000"]) == (500, 2_010_000)
    assert found["price_per_1000"] == pytest.approx(2.5 * 2 + 10 * 0.01)
    by_hour = operating.Price(currency="USD", source="bill", per_hour=36.0)
    assert operating.cost(timings, by_hour)["price_per_1000"] == pytest.approx(5.0)
    replayed = [t | {"replayed": True, "prompt_tokens": None} for t in timings]
    assert operating.cost(replayed, by_hour)["seconds_per_1000"] is operating.cost(replayed, price)["price_per_1000"] is None


def test_a_price_is_by_token_or_by_hour():
    with pytest.raises(ValueError, match="one of the two"):
        operating.Price(currency="USD", source="?")


# The program with everything on.


class Bookish:
    """Knows the answers to some questions, reads slices at a set cost a byte, and tells a lie by its keyword."""

    name = "bookish"

    def __init__(self, knows, bits):
        self.knows, self.bits = knows, bits

    def describe(self):
        return {"kind": "test", "model": self.name}

    def score(self, requests):
        for request in requests:
            if request.messages:
                values = (-1.0, -2.0, -3.0) if "never breaks" in request.messages[-1]["content"] else (-3.0, -3.0, -1.0)
            elif len(request.continuations) == 4:
                values = tuple(
                    -0.1 if n == int(request.prompt[1]) * (int(request.prompt[1]) < self.knows) else -2.0 for n in range(4)
                )
            else:
                jitter = 1 + 0.01 * (len(request.continuations[0]) % 5 - 2)
                values = (-self.bits * jitter * math.log(2) * len(request.continuations[0].encode()),)
            tokens = (1,) * len(values)
            yield backends.ScoreResult(key=request.key, logprobs=values, greedy=(False,) * len(values), tokens=tokens)


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """An evaluation of two models with operating points, questions, slices, margins, robustness and a ranking."""
    folder = mini_task(tmp_path / "task")
    run.write_jsonl(tmp_path / "q.jsonl", [
        {"id": str(n), "question": f"q{n % 4} of {n}", "choices": list("abcd"), "answer": n % 4} for n in range(80)])  # fmt: skip
    run.write_jsonl(tmp_path / "prose.jsonl", [{"id": str(n), "text": f"document {n} " * (n + 3)} for n in range(20)])
    subjects = {"old": Bookish(4, 1.0), "new": Bookish(3, 1.001)}
    monkeypatch.setattr(program, "open_model", lambda entry, engine, place: subjects[entry["name"]])
    models = tuple({"name": n, "kind": "hf", "seed": 0, "path": str(folder)} for n in subjects)
    declared = {"before": "old", "after": "new"}
    c = config(
        folder, models=(*models, {"name": "keywords", "kind": "keywords", "seed": 0}),
        comparisons=({"a": "new", "b": "keywords", "metric": "exact_category"},),
        operating={"dev_set": "dev:d", "recalls": (0.5,), "prevalences": (0.01,), "talks": 100},
        questions={"files": (str(tmp_path / "q.jsonl"),), "prompt": "{question}\n{choices}\n", "choice": "{answer} {text}",
                   "answers": ("A", "B", "C", "D"), "chat": False, "normalise": "sum"},
        slices=(str(tmp_path / "prose.jsonl"),),
        kept=({**declared, "test_set": "prose", "metric": "bits_per_byte", "margin": 0.01},
              {**declared, "test_set": "q", "metric": "choice_accuracy", "margin": 0.05}),
        robustness={"material": str(CONFIGS / "robustness" / "en.yaml"), "kinds": robustness.KINDS, "seed": 0, "asr_rate": 0.5,
                    "filler_rate": 0.5},
        ranking=({"metric": "choice_accuracy", "test_set": "q", "better": "higher"},
                 {"metric": "bits_per_byte", "test_set": "prose", "better": "lower"}),
    )  # fmt: skip
    result = program.main(c, tmp_path / "scores")
    return tmp_path / "scores", c, result


def test_questions_and_slices_give_rows_of_the_results_form_and_a_printed_verdict(everything, capsys):
    folder, c, result = everything
    evaluation = report.read_evaluation(folder)
    assert [evaluation.value(m, "choice_accuracy", "q")["correct"] for m in ("old", "new")] == [80, 60]
    assert [evaluation.value(m, "bits_per_byte", "prose")["value"] for m in ("old", "new")] == pytest.approx(
        [1.0, 1.001], abs=0.02
    )
    assert result["kept"] == {"prose bits_per_byte": "kept", "q choice_accuracy": "lost"}
    bits = next(row for row in evaluation.paired if row["metric"] == "bits_per_byte")
    assert bits["diff"] == pytest.approx(0.001, abs=1e-4) and bits["ci95"][0] <= bits["diff"] <= bits["ci95"][1] < 0.01
    assert len(evaluation.paired) == 3  # and Holm's p over all of them
    assert [r["p_holm"] for r in evaluation.paired] == stats.holm([r["p_pairs"] for r in evaluation.paired])
    program.main(c, folder)
    printed = capsys.readouterr().out
    assert "margin 0.01: ability kept within the margin" in printed and "margin 5: ability lost beyond the margin" in printed
    assert report.ranking_rows(evaluation)[1][0][:2] == ["old", "1.00"]


def test_flip_rates_are_counted_by_kind(everything):
    rows = {(r["model"], r["kind"]): r for r in report.read_evaluation(everything[0]).details["robustness"]}
    assert rows["keywords", "speakers"]["lost"] == 2  # it reads what the seller says, and the names are swapped
    assert rows["old", "speakers"]["flipped"] == 0
    assert sum(x["flipped"] for x in rows["old", "injection"]["by_injection"]) == rows["old", "injection"]["flipped"] == 0
    assert len(rows["old", "injection"]["by_injection"]) == 20


def test_what_happens_to_a_transcript_is_the_same_each_time_and_only_that():
    items = conversations(0)
    material = robustness.read_material(CONFIGS / "robustness" / "en.yaml")
    settings = robustness.Robustness(material="", kinds=robustness.KINDS, seed=3, asr_rate=1.0, filler_rate=1.0)
    said = {}
    for kind in robustness.KINDS:
        rows = robustness.perturbed(items, kind, "Seller", material, settings)
        assert rows == robustness.perturbed(items, kind, "Seller", material, settings)
        assert [r["conversation_id"] for r in rows] == [r["conversation_id"] for r in items]
        said[kind] = [turn for row in rows for turn in row["turns"]]
    clean = [turn for row in items for turn in row["turns"]]
    changed = [a["text"] for a, b in zip(said["injection"], clean, strict=True) if a["text"] != b["text"]]
    assert len(changed) == 8 and all(any(text.endswith(i) for i in material.injections) for text in changed)
    assert all(a["text"].endswith(b["text"]) and a["text"] != b["text"] for a, b in zip(said["fillers"], clean, strict=True))
    assert all(a["speaker"] != b["speaker"] and a["text"] == b["text"] for a, b in zip(said["speakers"], clean, strict=True))


@pytest.mark.parametrize("language", ["ja", "en"])
def test_the_material_holds_twenty_instructions(language):
    assert len(robustness.read_material(CONFIGS / "robustness" / f"{language}.yaml").injections) == 20


def test_two_versions_show_their_flips_and_both_thresholds(everything):
    folder, _, _ = everything
    rows = run.read_jsonl(folder / "predictions.jsonl")
    for row in rows:
        if row["model"] == "new" and row["conversation_id"] in ("c0v", "c1v"):
            row["pred"] = "gift"
    run.write_jsonl(folder / "predictions.jsonl", rows)
    found = versions.version_flips({"evaluation": folder, "model": "old"}, {"evaluation": folder, "model": "new"})
    assert [[r["conversation_id"] for r, _ in found[kind]] for kind in ("broken", "mended", "moved")] == [["c0v"], ["c1v"], []]
    assert found["p"] == 1.0 and found["thresholds"][0][0] == "50 %"
    assert "1 became right, 1 became wrong" in versions.version_words("new for old", found)


def test_versions_of_different_test_sets_are_not_compared(everything, tmp_path):
    folder, _, _ = everything
    other = tmp_path / "other"
    other.mkdir()
    for name in ("scores.json", "details.json", "predictions.jsonl"):
        (other / name).write_bytes((folder / name).read_bytes())
    details = json.loads((other / "details.json").read_text())
    details["test_set"]["sha256"] = "0"
    run.write_json(other / "details.json", details)
    with pytest.raises(ValueError, match="different test sets"):
        versions.version_flips({"evaluation": folder, "model": "old"}, {"evaluation": other, "model": "new"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"operating": {"dev_set": "t", "recalls": (0.5,), "prevalences": (0.01,), "talks": 1}},
            "dev_set is the test set itself",
        ),
        ({"operating": {"dev_set": "dev:d", "recalls": (50,), "prevalences": (), "talks": 1}}, "recalls holds 50"),
        (
            {"kept": ({"before": "x", "after": "keywords", "test_set": "q", "metric": "bits_per_byte", "margin": 1.0},)},
            "'x' is no model",
        ),
        ({"kept": ({"before": "x", "after": "y", "test_set": "q", "metric": "bits_per_byte", "margin": 0.0},)}, "above 0"),
        ({"robustness": {"material": "m", "kinds": ("rain",), "seed": 0, "asr_rate": 0.1, "filler_rate": 0.1}}, "'rain'"),
        ({"slices": ("nowhere.jsonl",)}, r"config.slices\[0\]: nowhere.jsonl does not exist"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_anything_is_asked(tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        program.main(config(mini_task(tmp_path / "task"), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "a", "question": "q", "choices": ["a", "b", "c", "c"], "answer": 0}, "four different"),
        ({"id": "a", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 4}, "0 to 3"),
        ({"id": "", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}, "must be text"),
    ],
)
def test_a_broken_question_is_named_by_file_and_line(tmp_path, row, words):
    good = {"id": "g", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}
    run.write_jsonl(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"q.jsonl:2: .*{words}"):
        knowledge.read_questions(tmp_path / "q.jsonl")


def test_the_projects_questions_and_slices_can_be_read():
    assert len(knowledge.read_questions(CONFIGS / "questions" / "finance_ja.jsonl")) >= 150
    assert all(len(knowledge.read_slice(path)) > 20 for path in (CONFIGS / "slices").glob("*.jsonl"))
