"""Broken prediction and gold files: 600 ways to break one, each named by file and line, none scored in silence."""

import copy
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swallow_jax import run
from swallow_jax.evaluate import metrics, runner
from swallow_jax.task import load_task, read_conversations
from tests.test_evaluate import mini_task

LABELS = ["lie", "gift", "compliant"]
FEW = settings(max_examples=300, deadline=None, derandomize=True, database=None,
               suppress_health_check=list(HealthCheck))  # fmt: skip

junk = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(2**63, 2**70), st.floats(allow_nan=True), st.just(math.inf),
    st.text(max_size=5), st.just("\ud800"), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_task(mini_task(tmp_path_factory.mktemp("broken") / "task"))


@pytest.fixture(scope="module")
def items(task):
    return read_conversations(task.test_sets["t"], task)


@pytest.fixture(scope="module")
def predictions(items):
    rows = []
    for number, item in enumerate(items):
        pred = runner.gold_label(item)
        row = {"conversation_id": item["conversation_id"], "model": "m", "test_set": "t", "seed": 0, "gold": pred, "pred": pred,
               "probs": {label: float(label == pred) for label in LABELS}, "valid": True, "raw": pred}  # fmt: skip
        if number % 2:
            row |= {"evidence": item["evidence"], "missing_items": item["missing_items"]}
        rows.append(row)
    return rows


def places(value, path=()):
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield from places(child, (*path, key))


def put(row, path, value):
    for key in path[:-1]:
        row = row[key]
    row[path[-1]] = value


def take(row, path):
    for key in path[:-1]:
        row = row[key]
    del row[path[-1]]


@st.composite
def breakage(draw, rows):
    """(lines of a file as bytes, number of the broken line, what was done)."""
    rows = copy.deepcopy(rows)
    number = draw(st.integers(0, len(rows) - 1))
    row = rows[number]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "cut", "bytes", "repeat", "not an object"]))
    lines = [json.dumps(r).encode() for r in rows]
    if kind in ("replace", "remove"):
        path = draw(st.sampled_from(list(places(row))))
        if kind == "replace":
            put(row, path, draw(junk))
        else:
            take(row, path)
        lines[number] = json.dumps(row).encode()
    elif kind == "cut":
        lines[number] = lines[number][: draw(st.integers(1, len(lines[number]) - 1))]
    elif kind == "bytes":
        at = draw(st.integers(0, len(lines[number]) - 1))
        lines[number] = lines[number][:at] + b"\xff\xfe" + lines[number][at:]
    elif kind == "repeat":
        first = draw(st.integers(0, len(rows) - 2))
        number = draw(st.integers(first + 1, len(rows) - 1))
        lines[number] = lines[first]
    else:
        lines[number] = json.dumps(draw(junk.filter(lambda x: not isinstance(x, dict)))).encode()
    return lines, number + 1, kind


def judged(path, task, items):
    """What scoring the file gives; errors go up."""
    rows = metrics.read_predictions(str(path), LABELS)
    gold = {c["conversation_id"]: runner.gold_label(c) for c in items}
    arm = metrics.arms(metrics.with_gold(rows, items), gold)
    statistics = metrics.Statistics(level=0.95, permutations=10, resamples=10, seed=0, bins=2, simulations=0)
    found = metrics.results(arm, LABELS, runner.pair_ids(items), (), statistics)
    for one in arm.values():
        metrics.details(one, LABELS, statistics)
    return found


@FEW
@given(data=st.data())
def test_a_broken_prediction_file_is_named_and_never_scored_otherwise(tmp_path, task, items, predictions, data):
    """Either the file is refused, or what was changed does not count: the scores are those of the whole file."""
    path = tmp_path / "p.jsonl"
    run.write_jsonl(path, predictions)
    whole = judged(path, task, items)
    lines, number, kind = data.draw(breakage(predictions))
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        found = judged(path, task, items)
    except ValueError as error:
        words = str(error)
        line = re.match(rf"{re.escape(str(path))}:(\d+): ", words)
        # A line can be whole and wrong beside the others: then model and item are named.
        assert (line and int(line[1]) == number) or re.search(
            r"model .*(missing|not in the test set|no prediction|has gold)|'", words
        ), words
        return
    assert kind in ("replace", "remove"), kind
    verdicts = {"exact_category", "binary", "violation_found", "compliant_passed"}
    before, after = ([r for r in results["scores"] if r["metric"] in verdicts] for results in (whole, found))
    assert before == after


@FEW
@given(data=st.data())
def test_a_broken_gold_file_is_named_by_file_and_line(tmp_path, task, items, data):
    lines, number, kind = data.draw(breakage(items))
    path = tmp_path / "gold.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        rows = read_conversations(path, task)
    except ValueError as error:
        found = re.match(rf"{re.escape(str(path))}:(\d+): .", str(error))
        assert found and int(found[1]) == number, str(error)
        return
    assert kind in ("replace", "remove"), kind
    # What is let through is a conversation like any other: it can be asked about, paired and scored.
    for row in rows:
        task.prompt(row)
        assert runner.gold_label(row) in LABELS
    assert len(runner.pair_ids(rows)) == len(items)


def test_a_label_that_is_no_text_is_refused(tmp_path, predictions):
    for field, value in (
        ("gold", ["lie"]),
        ("pred", None),
        ("seed", 1.5),
        ("probs", {"lie": math.nan, "gift": 0, "compliant": 1}),
    ):
        rows = copy.deepcopy(predictions)
        rows[3][field] = value
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=r"p\.jsonl:4: "):
            metrics.read_predictions(str(tmp_path / "p.jsonl"), LABELS)
