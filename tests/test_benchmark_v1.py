"""The benchmark test_v1 of the reference task: its shape, its quotes, its twins, and that no shortcut gives the label away."""

import collections
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from swallow_jax import run
from swallow_jax.data import privacy
from swallow_jax.task import load_task, read_conversations

FOLDER = Path(__file__).parent.parent / "configs" / "tasks" / "insurance_sales_compliance"
TASK = load_task(FOLDER)
TEST, DEV = (read_conversations(FOLDER / name, TASK) for name in ("test_v1.jsonl", "dev_v1.jsonl"))
KINDS = ("email", "card", "my_number", "policy_number", "phone", "postal_code", "account")
EVERY = pytest.mark.parametrize("rows", [TEST, DEV], ids=["test", "dev"])


def pairs(rows):
    found = collections.defaultdict(list)
    for row in rows:
        found[row["pair_id"]].append(row)
    return found


def text(row, leave_out=()):
    return "\n".join(turn["text"] for number, turn in enumerate(row["turns"]) if number not in leave_out)


def grams(words, n):
    return {words[i : i + n] for i in range(len(words) - n + 1)}


def test_the_shape_is_that_of_the_original_study():
    primary = collections.Counter(row["labels"][0] for row in TEST if row["labels"])
    assert len(TEST) == 344 and sum(primary.values()) == 172 and len(pairs(TEST)) == 172
    assert set(primary) == {category.id for category in TASK.categories} and set(primary.values()) == {24, 25}
    assert len(DEV) == 64 and sum(bool(row["labels"]) for row in DEV) == 32
    assert any(len(row["labels"]) > 1 for row in TEST)
    assert sum(not row["evidence"] for row in TEST if row["labels"]) >= 24, "omissions without a guilty line"


@EVERY
def test_twins_are_a_violating_and_a_compliant_talk_that_differ_in_named_turns_alone(rows):
    for twins in pairs(rows).values():
        assert [bool(row["labels"]) for row in sorted(twins, key=lambda row: not row["labels"])] == [True, False]
        a, b = twins
        assert len(a["turns"]) == len(b["turns"]) and 8 <= len(a["turns"]) <= 20
        different = [i for i, (x, y) in enumerate(zip(a["turns"], b["turns"], strict=True)) if x != y]
        assert different == a["meta"]["contrast_turns"] == b["meta"]["contrast_turns"] and 1 <= len(different) <= 3
        assert all(x["speaker"] == y["speaker"] for x, y in zip(a["turns"], b["turns"], strict=True))


@EVERY
def test_evidence_is_quoted_from_the_seller_s_turn_and_every_row_has_its_reason(rows):
    for row in rows:
        for e in row["evidence"]:
            turn = row["turns"][e["turn"]]
            assert e["quote"] in turn["text"] and turn["speaker"] == "募集人" and e["turn"] in row["meta"]["contrast_turns"]
            assert e["category"] in row["labels"]
        assert bool(row["labels"]) == bool(row["evidence"] or row["missing_items"]) and row["meta"]["rationale"]
        if row["labels"]:
            basis = {b.text for b in TASK.category(row["labels"][0]).legal_basis}
            assert row["meta"]["legal_basis"] in basis


@EVERY
def test_no_personal_data_and_no_label_word_stands_in_a_talk(rows):
    for row in rows:
        assert not re.search(r"違反|虚偽|コンプライアンス", text(row)), row["conversation_id"]
        assert not privacy.mask(text(row), KINDS)[1], row["conversation_id"]


def test_scenarios_are_written_one_by_one():
    """No 20 characters in more than five scenarios; no two scenarios alike (character 5-grams)."""
    scenarios = [text(twins[0]) for twins in pairs(TEST + DEV).values()]
    spans = collections.Counter(span for words in scenarios for span in grams(words, 20))
    assert max(spans.values()) <= 5
    fives = [grams(words, 5) for words in scenarios]
    closest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(fives, 2))
    assert closest <= 0.5


def test_nothing_of_it_stands_in_the_texts_that_train_the_demo():
    training = [FOLDER / "teacher_recorded.jsonl", *sorted((FOLDER / "banks").glob("*.jsonl"))]
    seen = set()
    for file in training:
        for row in run.read_jsonl(file):
            seen |= set().union(*(grams(words, 13) for words in strings(row)))
    for row in TEST + DEV:
        assert not grams(text(row), 13) & seen, row["conversation_id"]


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def out_of_fold(features, violating, groups):
    """Scores of each talk by a logistic regression that never saw its scenario."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    model = LogisticRegression(C=1.0, max_iter=2000)
    folds = GroupKFold(n_splits=10)
    return cross_val_predict(model, features, violating, groups=groups, cv=folds, method="predict_proba")[:, 1]


def test_neither_length_nor_the_innocent_turns_give_the_label_away():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import roc_auc_score

    violating = np.asarray([bool(row["labels"]) for row in TEST])
    groups = [row["pair_id"] for row in TEST]
    length = np.asarray([[len(text(row)), len(row["turns"]), max(len(t["text"]) for t in row["turns"])] for row in TEST], float)
    by_length = out_of_fold((length - length.mean(0)) / length.std(0), violating, groups)
    assert np.mean((by_length > 0.5) == violating) <= 0.55
    innocent = [text(row, row["meta"]["contrast_turns"]) for row in TEST]
    features = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=2, sublinear_tf=True).fit_transform(innocent)
    assert roc_auc_score(violating, out_of_fold(features, violating, groups)) <= 0.60
    # What a bag of characters makes of the whole talk, for the record: far from the label.
    whole = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=2, sublinear_tf=True).fit_transform(map(text, TEST))
    assert roc_auc_score(violating, out_of_fold(whole, violating, groups)) <= 0.75
