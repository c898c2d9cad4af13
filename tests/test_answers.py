"""Words and log-probabilities become answers: sets of labels, verdicts with quotes, long conversations in windows."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from swallow_jax import run
from swallow_jax.evaluate import answers, baselines, metrics, runner, windows
from swallow_jax.generate import backends
from swallow_jax.task import load_task, read_conversations
from tests.test_evaluate import mini_task

TASKS = Path(__file__).parents[1] / "configs" / "tasks"
STATISTICS = metrics.Statistics(level=0.95, permutations=1000, resamples=500, seed=0, bins=2, simulations=0)


@pytest.fixture(scope="module")
def triage():
    return load_task(TASKS / "complaint_triage_en")


@pytest.fixture
def task(tmp_path):
    return load_task(mini_task(tmp_path / "task"))


def spoken(task, probabilities):
    """Log-probabilities that an answer begins with each closed answer, for a speaker of these whole answers."""
    sets, texts = answers.closed(task, None)
    written = {task.answer(labels): p for labels, p in probabilities.items()}
    begins = [sum(p for text, p in written.items() if text == x or text.startswith(f"{x}, ")) for x in texts]
    return sets, texts, [math.log(p) if p else -60.0 for p in begins]


def test_the_probability_of_a_set_is_what_remains_when_longer_answers_are_taken_away(triage):
    ids = [c.id for c in triage.categories]
    said = {(): 0.1, (ids[0],): 0.2, (ids[0], ids[1]): 0.4, (ids[0], ids[1], ids[2]): 0.1, (ids[2],): 0.2}
    found = answers.from_logprobs(triage, *spoken(triage, said), tokens=[1] * 64, mean=False)
    assert set(found.preds) == {ids[0], ids[1]} and found.preds[0] == ids[0]  # 0.7 beside 0.5
    assert [found.probs[i] for i in ids[:3]] == pytest.approx([0.7, 0.5, 0.3])
    assert found.probs["compliant"] == pytest.approx(0.1)


def test_a_single_label_that_begins_many_answers_does_not_win_by_that(triage):
    """exp(log p of "a") is the largest of all closed answers; "a" alone is never said."""
    ids = [c.id for c in triage.categories]
    said = {(ids[0], ids[1]): 0.5, (ids[0], ids[2]): 0.3, (): 0.2}
    sets, texts, logprobs = spoken(triage, said)
    assert sets[int(np.argmax(logprobs))] == (ids[0],)
    found = answers.from_logprobs(triage, sets, texts, logprobs, tokens=[1] * 64, mean=False)
    assert set(found.preds) == {ids[0], ids[1]} and found.probs["compliant"] == pytest.approx(0.2)


def test_closed_sets_are_limited_by_the_config_and_never_silently(triage):
    assert len(answers.closed(triage, None)[0]) == 64 and len(answers.closed(triage, 2)[0]) == 1 + 6 + 15
    with pytest.raises(ValueError, match="normalise 'mean'"):
        answers.from_logprobs(triage, *spoken(triage, {(): 1.0}), tokens=[1] * 64, mean=True)


CONVERSATION = {"conversation_id": "c", "turns": [{"speaker": "Seller", "text": "It never breaks."}]}


@pytest.mark.parametrize(
    ("text", "preds"),
    [
        ('{"verdict": "violation", "violations": [{"category": "lie", "evidence": []}]}', ("lie",)),
        ('```json\n{"verdict": "violation", "violations": [{"category": "Untrue"}, {"category": "gift"}]}\n```', ("lie", "gift")),
        ('{"verdict": "no_violation", "violations": []} I hope this helps.', ()),
        ('{"verdict": "no_violation", "violations": [{"category": "lie"}]}', None),  # contradicts itself
        ('{"verdict": "violation", "violations": []}', None),
        ('{"verdict": "violation", "violations": [{"category": "theft"}]}', None),
        ('{"verdict": "violation", "violations": [{"category": "lie", "evi', None),  # cut off
        ('{"verdict": "violation", "violations": "lie"}', None),
        ("{" * 5000, None),
        ("Untrue", ("lie",)),
        ("Fine.", ()),
        ("I cannot tell", None),
    ],
)
def test_verdicts_are_read_and_broken_ones_are_invalid(task, text, preds):
    assert answers.from_text(task, text, CONVERSATION).preds == preds


def test_a_quote_that_stands_in_no_turn_is_dropped_and_counted(task):
    quotes = [{"turn": 0, "quote": "never breaks"}, {"turn": 0, "quote": "always breaks"}, {"turn": 7, "quote": "never"}, "x"]
    text = json.dumps({"verdict": "violation", "violations": [{"category": "lie", "evidence": quotes}]})
    found = answers.from_text(task, text, CONVERSATION)
    assert found.evidence == ({"category": "lie", "turn": 0, "quote": "never breaks"},) and found.false_quotes == 3


def test_several_labels_are_scored_as_sets_by_category_and_invalid_is_wrong(triage):
    ids = [c.id for c in triage.categories]

    def row(name, golds, preds):
        labels = preds if preds is not None else []
        item = {"conversation_id": name, "labels": golds, "turns": [], "evidence": [], "missing_items": []}
        answer = windows.Answer(preds=preds if preds is None else tuple(labels), raw="")
        return item, runner.prediction(item, answer, model="m", test_set="t", seed=0, several=True)

    a, b, c = ids[:3]
    pairs = [row("1", [a, b], [b, a]), row("2", [a], [a, c]), row("3", [], []), row("4", [c], None), row("5", [b], [b])]
    items, rows = [p[0] for p in pairs], [p[1] for p in pairs]
    labels = runner.label_ids(triage)
    assert all(metrics.problem(r, labels) is None for r in rows)
    gold = {item["conversation_id"]: runner.gold_label(item) for item in items}
    arms = metrics.arms(metrics.with_gold(rows, items), gold)
    found = metrics.results(arms, labels, runner.pair_ids(items), (), STATISTICS)["scores"]
    value = {r["metric"]: (r["correct"], r["n"]) for r in found}
    assert value["exact_set"] == (3, 5)  # order does not count, a label too many does, no answer is wrong
    assert value["binary"] == (4, 5)
    details = metrics.details(arms["m"], labels, STATISTICS, several=True)
    by_label = {r["label"]: (r["hits"], r["predicted"], r["support"]) for r in details["categories"]}
    assert by_label[a] == (2, 2, 2) and by_label[b] == (2, 2, 2) and by_label[c] == (0, 1, 1)
    assert by_label["compliant"] == (1, 1, 1) and details["invalid"] == 1


def test_evidence_and_missing_items_are_hit_by_place_and_name(task):
    item = {"conversation_id": "c", "pair_id": "p", "labels": ["lie"], "missing_items": ["price"],
            "turns": [{"speaker": "Seller", "text": "It never breaks, believe me, and never rusts either."}],
            "evidence": [{"category": "lie", "turn": 0, "quote": "It never breaks, believe me"}]}  # fmt: skip

    def score(metric, **answer):
        made = windows.Answer(preds=("lie",), raw="", **answer)
        row = runner.prediction(item, made, model="m", test_set="t", seed=0)
        return metrics.metric(metric).score(metrics.with_gold([row], [item])[0])

    def quote(text, category="lie"):
        return {"evidence": ({"category": category, "turn": 0, "quote": text},), "missing_items": ()}

    assert score("evidence_hit", **quote("never breaks"))
    assert score("evidence_hit", **quote("believe me, and never"))  # ten characters in common
    assert not score("evidence_hit", **quote("never rusts either"))
    assert not score("evidence_hit", **quote("never breaks", category="gift"))
    assert score("missing_items", evidence=(), missing_items=("price",))
    assert not score("missing_items", evidence=(), missing_items=("price", "weight"))  # naming everything is no answer


def test_baselines_answer_sets_where_all_labels_count(triage):
    folder = TASKS / "complaint_triage_en"
    training = read_conversations(folder / "train_v1.jsonl", triage)
    settings = baselines.NgramSettings(shortest=2, longest=3, min_documents=1, inverse_regularisation=1000.0, max_iterations=300)
    learnt = baselines.ngrams(triage, training, settings=settings, seed=0)
    verdicts = learnt.predict(training)
    assert np.mean([set(preds) == set(c["labels"]) for (preds, _), c in zip(verdicts, training, strict=True)]) > 0.95
    assert max(len(preds) for preds, _ in baselines.keywords(triage).predict(training)) > 1
    assert baselines.constant(triage, training, metric="exact_set").predict(training[:1])[0][0] in {(), ("delay",)} | {
        tuple(c["labels"]) for c in training}  # fmt: skip


# Windows.


def long_talk(turns):
    return {"conversation_id": "long", "labels": ["lie"], "evidence": [], "missing_items": [],
            "turns": [{"speaker": "Seller" if n % 2 else "Buyer", "text": f"sentence {n}"} for n in range(turns)]}  # fmt: skip


def size(piece):
    return sum(len(turn["text"]) for turn in piece["turns"])


@pytest.mark.parametrize(("limit", "overlap"), [(40, 1), (60, 2), (33, 9), (1000, 3), (11, 0), (12, 4)])
def test_every_turn_stands_in_a_window_and_neighbours_overlap(limit, overlap):
    spans = windows.cut(long_talk(23), windows.Window(limit=limit, unit="characters", overlap_turns=overlap), size)
    assert spans[0][0] == 0 and spans[-1][1] == 23
    for (start, stop), (following, end) in itertools.pairwise(spans):
        assert start < following <= stop < end and stop - following <= overlap
        assert size({"turns": long_talk(23)["turns"][start : stop + 1]}) > limit  # no window is shorter than it must be
        assert overlap != 2 or stop - following == 2  # where there is room for it, the whole overlap
    assert all(size({"turns": long_talk(23)["turns"][a:b]}) <= limit for a, b in spans)


def test_a_turn_that_fits_no_window_is_an_error_and_not_cut():
    with pytest.raises(ValueError, match=r"turn 3 of 'long' alone makes a prompt of 300 characters, the limit is 40"):
        talk = long_talk(6)
        talk["turns"][3]["text"] = "x" * 300
        windows.cut(talk, windows.Window(limit=40, unit="characters", overlap_turns=1), size)


class Reader:
    """Answers by what stands in the prompt, and remembers what it saw."""

    name = "reader"

    def __init__(self):
        self.seen = []

    def score(self, requests):
        for request in requests:
            text = request.messages[-1]["content"]
            self.seen.append(text)
            values = (-0.1, -5.0, -3.0) if "sentence 17" in text else (-4.0, -5.0, -0.1)
            yield backends.ScoreResult(key=request.key, logprobs=values, greedy=(False,) * 3, tokens=(1, 1, 1))

    def generate(self, requests):
        for request in requests:
            text = request.messages[-1]["content"]
            at = text.splitlines().index("Seller: sentence 17") if "sentence 17" in text else None
            quote = [{"turn": at, "quote": "sentence 17"}]
            verdict = {"verdict": "violation", "violations": [{"category": "lie", "evidence": quote}]}
            said = json.dumps(verdict if at is not None else {"verdict": "no_violation", "violations": []})
            yield backends.Result(
                key=request.key, text=said, finish_reason="stop", prompt_tokens=3, completion_tokens=2, logprob=None
            )


@pytest.mark.parametrize("mode", ["labels", "generate"])
def test_a_violation_in_one_window_is_found_in_the_whole_conversation(task, tmp_path, mode):
    window = windows.Window(limit=150, unit="characters", overlap_turns=2)
    asking = runner.Asking(mode=mode, prompt=None, normalise="sum", max_new_tokens=8, window=window)
    reader = Reader()
    runner.evaluate(task, [long_talk(30)], reader, model="m", test_set="t", seed=0, asking=asking, out=tmp_path / "p.jsonl")
    row = metrics.read_predictions(str(tmp_path / "p.jsonl"), ["lie", "gift", "compliant"])[0]
    assert row["pred"] == "lie" and row["windows"] > 3
    if mode == "labels":
        assert all(any(f"sentence {n}\n" in text for text in reader.seen) for n in range(30))
        assert row["probs"]["lie"] > 0.5
    else:
        assert row["evidence"] == [{"category": "lie", "turn": 17, "quote": "sentence 17"}]


def test_one_window_without_an_answer_makes_the_conversation_invalid():
    good = windows.Answer(preds=("lie",), raw="lie")
    assert windows.merge([(0, good), (5, windows.Answer(preds=None, raw="?"))]).preds is None
    assert windows.merge([(0, windows.Answer(preds=("gift",), raw="")), (5, good), (9, good)]).preds == ("lie", "gift")


def test_windows_of_an_endpoint_are_counted_in_characters(task, tmp_path):
    window = windows.Window(limit=50, unit="tokens", overlap_turns=1)
    asking = runner.Asking(mode="labels", prompt=None, normalise="sum", max_new_tokens=8, window=window)
    with pytest.raises(ValueError, match="reader has no tokenizer here"):
        runner.evaluate(task, [long_talk(4)], Reader(), model="m", test_set="t", seed=0, asking=asking, out=tmp_path / "p.jsonl")
    assert run.read_jsonl(tmp_path / "p.jsonl") == []
