"""Answers become prediction rows, whole and once; the program turns them into the results form and goes on after a kill."""

import json
import math

import numpy as np
import pytest
import yaml

from experiments import evaluate as program
from swallow_jax import hf, run, text
from swallow_jax.evaluate import baselines, metrics, runner
from swallow_jax.generate import backends
from swallow_jax.task import load_task, read_conversations
from tests import helpers

ASKING = runner.Asking(mode="labels", prompt=None, normalise="sum", max_new_tokens=8)
LABELS = ["lie", "gift", "compliant"]


def mini_task(folder):
    """An English task of two categories: another industry is another folder."""
    basis = [{"text": "Rule 1", "source": "https://example.org", "effective_from": "2020-01-01"}]

    def category(name, label):
        return {"id": name, "label": label, "name_ja": f"{label}s", "name_en": f"a {label}", "kind": "utterance",
                "definition": name, "includes": ["x"], "excludes": ["y"], "legal_basis": basis, "required_items": []}  # fmt: skip

    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "classify.md").write_text("## system\nCheck.\n\n## user\n{{conversation}}\nVerdict?")
    raw = {
        "id": "car_sales", "version": "1", "language": "en", "speakers": ["Seller", "Buyer"], "turn_format": "{speaker}: {text}",
        "label_policy": "single_primary", "categories": [category("lie", "Untrue"), category("gift", "Bribe")],
        "compliant": {"label": "Fine", "name_ja": "clean", "name_en": "no violation", "definition": "nothing wrong"},
        "prompts": {"classify": "prompts/classify.md"}, "default_prompt": "classify",
        "keywords": {"lie": ["never breaks"], "gift": ["for your wife"]}, "metric": {"primary": "accuracy"},
        "test_sets": {"t": "test.jsonl"}, "dev_sets": {"d": "dev.jsonl", "t": "dev.jsonl"},
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(raw))
    for name, start in (("test", 0), ("dev", 100)):
        run.write_jsonl(folder / f"{name}.jsonl", conversations(start))
    return folder


def conversations(start):
    """Four pairs of twins: two lies and two gifts, one of each without its keyword."""
    said = [
        ("lie", "It never breaks."),
        ("gift", "Flowers for your wife."),
        ("lie", "No accident, ever."),
        ("gift", "Keep the change."),
    ]
    rows = []
    for number, (label, line) in enumerate(said, start):
        common = {"pair_id": f"p{number}", "missing_items": []}
        for labels, words in (([label], line), ([], f"Please read report {number}.")):
            turns = [{"speaker": "Buyer", "text": f"Is car {number} good?"}, {"speaker": "Seller", "text": words}]
            evidence = [{"category": label, "turn": 1, "quote": words}] if labels else []
            name = f"c{number}{'v' if labels else 'c'}"
            rows.append({**common, "conversation_id": name, "turns": turns, "labels": labels, "evidence": evidence})
    return rows


@pytest.fixture
def task(tmp_path):
    return load_task(mini_task(tmp_path / "task"))


@pytest.fixture
def items(task):
    return read_conversations(task.test_sets["t"], task)


class Literal:
    """A backend whose answers follow from the prompt's words; stops after `limit` answers as a killed process would."""

    name = "literal"

    def __init__(self, logprobs_of, limit=None, text_of=None):
        self.logprobs_of, self.text_of, self.limit, self.asked = logprobs_of, text_of, limit, 0

    def score(self, requests):
        for request in reversed(list(requests)):  # order of completion is not the order of asking
            self._count()
            values = self.logprobs_of(request.messages[-1]["content"])
            yield backends.ScoreResult(key=request.key, logprobs=values, greedy=(False,) * len(values), tokens=(1, 2, 4))

    def generate(self, requests):
        for request in requests:
            self._count()
            text = self.text_of(request.messages[-1]["content"])
            yield backends.Result(
                key=request.key, text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1, logprob=None
            )

    def _count(self):
        if self.asked == self.limit:
            raise KeyboardInterrupt
        self.asked += 1


def sees_lies(text):
    return (-1.0, -9.0, -9.0) if "never breaks" in text or "accident" in text else (-9.0, -9.0, -1.0)


def ask(task, items, backend, out, asking=ASKING):
    return runner.evaluate(task, items, backend, model="m", test_set="t", seed=0, asking=asking, out=out)


def test_the_likeliest_closed_label_is_the_verdict(task, items, tmp_path):
    out = tmp_path / "predictions.jsonl"
    ask(task, items, Literal(sees_lies), out)
    rows = {row["conversation_id"]: row for row in metrics.read_predictions(str(out), LABELS)}
    assert {name: row["pred"] for name, row in rows.items() if row["pred"] != "compliant"} == {"c0v": "lie", "c2v": "lie"}
    assert [rows["c1v"][k] for k in ("gold", "pred", "raw", "valid")] == ["gift", "compliant", "Fine", True]
    assert rows["c0v"]["probs"]["lie"] == pytest.approx(1 / (1 + 2 * math.exp(-8)), abs=1e-7)


def test_the_mean_by_token_can_turn_the_verdict(task, items, tmp_path):
    asking = runner.Asking(mode="labels", prompt=None, normalise="mean", max_new_tokens=8)
    ask(task, items, Literal(lambda text: (-2.0, -3.0, -4.0)), tmp_path / "mean.jsonl", asking)  # tokens 1, 2, 4
    assert {row["pred"] for row in run.read_jsonl(tmp_path / "mean.jsonl")} == {"compliant"}
    ask(task, items, Literal(lambda text: (-2.0, -3.0, -4.0)), tmp_path / "sum.jsonl")
    assert {row["pred"] for row in run.read_jsonl(tmp_path / "sum.jsonl")} == {"lie"}


def test_generated_answers_are_parsed_and_nonsense_is_invalid(task, items, tmp_path):
    asking = runner.Asking(mode="generate", prompt=None, normalise="sum", max_new_tokens=8)
    backend = Literal(
        None, text_of=lambda text: "「untrue」." if "never breaks" in text else "Fine" if "report" in text else "Untrue or Bribe"
    )
    ask(task, items, backend, tmp_path / "p.jsonl", asking)
    rows = {row["conversation_id"]: row for row in metrics.read_predictions(str(tmp_path / "p.jsonl"), LABELS)}
    assert [rows[name]["pred"] for name in ("c0v", "c0c", "c1v")] == ["lie", "compliant", "invalid"]
    assert rows["c1v"]["valid"] is False and rows["c1v"]["raw"] == "Untrue or Bribe"


def test_a_killed_evaluation_asks_only_for_what_is_missing(task, items, tmp_path):
    out, straight = tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"
    ask(task, items, Literal(sees_lies), straight)
    with pytest.raises(KeyboardInterrupt):
        ask(task, items, Literal(sees_lies, limit=3), out)
    with open(out, "a") as f:
        f.write('{"conversation_id": "c0v", "mod')  # the line the kill tore
    second = Literal(sees_lies)
    found = ask(task, items, second, out)
    assert (found["kept"], found["asked"], second.asked) == (3, 5, 5)
    by_id = [sorted(run.read_jsonl(path), key=lambda r: r["conversation_id"]) for path in (out, straight)]
    assert by_id[0] == by_id[1]


def test_equal_conversations_are_asked_once_and_answered_twice(task, items, tmp_path):
    twice = [items[0], {**items[0], "conversation_id": "again"}]
    backend = Literal(sees_lies)
    ask(task, twice, backend, tmp_path / "p.jsonl")
    assert backend.asked == 1 and len(run.read_jsonl(tmp_path / "p.jsonl")) == 2


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_refused(task, items, tmp_path, value):
    with pytest.raises(ValueError, match=r"literal gives the log-probabilities.*'c3c'"):
        ask(task, items, Literal(lambda text: (value,) * 3), tmp_path / "p.jsonl")


def test_a_backend_that_leaves_a_request_out_is_refused(task, items, tmp_path):
    class Forgetful(Literal):
        def score(self, requests):
            yield from super().score(list(requests)[1:])

    with pytest.raises(ValueError, match="left 1 requests without an answer, the first is 'c0v'"):
        ask(task, items, Forgetful(sees_lies), tmp_path / "p.jsonl")


def test_keywords_count_what_the_checked_speaker_says(task, items):
    assert [preds for preds, _ in baselines.keywords(task).predict(items[:6])] == [("lie",), (), ("gift",), (), (), ()]
    buyer_says_it = {**items[1], "turns": [{"speaker": "Buyer", "text": "It never breaks, they say."}, items[1]["turns"][1]]}
    assert baselines.keywords(task).predict([buyer_says_it]) == [((), None)]


def test_the_constant_is_chosen_on_the_training_conversations(task, items):
    lies = [c for c in items if c["labels"] == ["lie"]]
    assert baselines.constant(task, items, metric="exact_category").predict(items)[0][0] == ()
    chosen = baselines.constant(task, lies, metric="exact_category")
    assert chosen.predict(items)[0][0] == ("lie",) and chosen.about["training_value"] == 1.0


def test_ngrams_learn_the_wording_of_the_training_conversations(task, items):
    settings = baselines.NgramSettings(shortest=2, longest=4, min_documents=1, inverse_regularisation=100.0, max_iterations=500)
    learnt = baselines.ngrams(task, items, settings=settings, seed=0)
    verdicts = learnt.predict(items)
    assert [list(preds) for preds, _ in verdicts] == [c["labels"] for c in items]
    assert all(sum(probs.values()) == pytest.approx(1) and set(probs) == set(LABELS) for _, probs in verdicts)


def test_a_learnt_baseline_without_training_data_is_refused(task):
    with pytest.raises(ValueError, match="'training'"):
        baselines.constant(task, [], metric="exact_category")


# The program.


def config(folder, **changes):
    from configs.evaluate import tiny

    c = tiny.get_config()
    c.task, c.test_set, c.training = str(folder), "t", (str(folder / "dev.jsonl"),)
    c.statistics.update({"permutations": 1000, "resamples": 500})
    c.update(changes)
    return c


def test_the_program_writes_the_results_form_and_a_second_run_asks_nothing(tmp_path, capsys):
    c = config(mini_task(tmp_path / "task"))
    result = program.main(c, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert set(scores) == {"scores", "paired"}
    exact = {r["model"]: r["correct"] for r in scores["scores"] if r["metric"] == "exact_category"}
    assert exact == {"constant": 4, "keywords": 6} and result["exact_category"] == {"constant": 0.5, "keywords": 0.75}
    assert scores["paired"][0]["diff"] == 0.25 and scores["paired"][0]["p_pairs"] == 0.5
    printed = capsys.readouterr().out
    assert "keywords - constant" in printed and "6/8" in printed
    before = (tmp_path / "run" / "predictions.jsonl").stat().st_mtime_ns
    assert program.main(c, tmp_path / "run") == result
    assert (tmp_path / "run" / "predictions.jsonl").stat().st_mtime_ns == before


def test_rows_stand_in_the_configs_and_the_test_sets_order_and_carry_the_contract(tmp_path):
    folder = mini_task(tmp_path / "task")
    program.main(config(folder), tmp_path / "run")
    rows = run.read_jsonl(tmp_path / "run" / "predictions.jsonl")
    names = [c["conversation_id"] for c in conversations(0)]
    assert [(r["model"], r["conversation_id"]) for r in rows] == [(m, n) for m in ("constant", "keywords") for n in names]
    assert set(rows[0]) == {"conversation_id", "model", "test_set", "seed", "gold", "pred", "valid", "raw"}


@pytest.mark.parametrize(("name", "first"), [("t", "c0v"), ("dev:t", "c100v"), ("dev:d", "c100v")])
def test_a_test_and_a_dev_set_of_one_name_are_told_apart(tmp_path, name, first):
    program.main(config(mini_task(tmp_path / "task"), test_set=name), tmp_path / "run")
    row = run.read_jsonl(tmp_path / "run" / "predictions.jsonl")[0]
    assert (row["conversation_id"], row["test_set"]) == (first, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_set": "u"}, "no set 'u'; it has: t, dev:d, dev:t"),
        ({"asking": {"mode": "vibes"}}, "asking.mode is 'vibes'"),
        ({"models": ()}, "config.models is empty"),
        ({"models": ({"name": "a", "kind": "oracle", "seed": 0},)}, "kind 'oracle' is unknown"),
        ({"models": ({"name": "a", "kind": "hf", "seed": 0},)}, "needs the field path"),
        ({"models": ({"name": "a", "kind": "keywords", "seed": 0},) * 2}, "'a seed 0' stands twice"),
        ({"comparisons": ({"a": "keywords", "b": "magic", "metric": "binary"},)}, "'magic' is no model of this config"),
        ({"comparisons": ({"a": "keywords", "b": "constant", "metric": "f2"},)}, "unknown metric 'f2'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        program.main(config(mini_task(tmp_path / "task"), **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Llama with a tokenizer trained on the miniature conversations, as an HF folder."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [turn["text"] for row in conversations(0) for turn in row["turns"]]
    special = {"chat_template": text.LLAMA3_CHAT_TEMPLATE, "special_tokens": text.SPECIAL_TOKENS}
    text.train_bpe(texts * 4, vocab_size=320, folder=folder / "tokenizer", **special)
    hf.save(folder / "model", helpers.random_params(helpers.LLAMA31), helpers.LLAMA31, dtype="float32")
    text.copy_tokenizer(folder / "tokenizer", folder / "model")
    return folder / "model"


def test_a_local_models_verdict_is_the_argmax_of_the_whole_sequences_log_probabilities(tmp_path, tiny_model):
    """The program, through engine and scorer, equals a plain forward pass over prompt and answer."""
    folder = mini_task(tmp_path / "task")
    models = ({"name": "tiny", "kind": "hf", "seed": 0, "path": str(tiny_model)},)
    program.main(config(folder, models=models, comparisons=()), tmp_path / "run")
    row = run.read_jsonl(tmp_path / "run" / "predictions.jsonl")[0]
    task, tokenizer = load_task(folder), text.load_tokenizer(tiny_model)
    params, shape = hf.load(tiny_model)
    context = tokenizer.render_chat(list(task.prompt(conversations(0)[0])), add_generation_prompt=True)
    sums = []
    for label in task.labels:
        ids = tokenizer.encode(label)
        logits = helpers.model_logits(params, shape, [[*context, *ids]])[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sums.append(sum(logprobs[len(context) - 1 + n, token] for n, token in enumerate(ids)))
    expected = np.exp(sums) / np.exp(sums).sum()
    assert [row["probs"][label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-4)
    assert row["pred"] == LABELS[int(np.argmax(sums))]


def test_recorded_answers_replay_to_the_same_predictions(tmp_path, tiny_model):
    folder = mini_task(tmp_path / "task")
    task = load_task(folder)
    items = read_conversations(task.test_sets["t"], task)
    entry = {"name": "tiny", "kind": "hf", "seed": 0, "path": str(tiny_model)}
    settings = run.build(program.Settings, config(folder).to_dict(), "config")
    live = backends.record(program.open_model(entry, settings.engine, tmp_path), tmp_path / "answers.jsonl")
    ask(task, items, live, tmp_path / "live.jsonl")
    replay = program.open_model({"name": "tiny", "kind": "recorded", "seed": 0, "path": str(tmp_path / "answers.jsonl"),
                                 "missing": "raise"}, settings.engine, tmp_path)  # fmt: skip
    ask(task, items, replay, tmp_path / "replayed.jsonl")
    by_id = [sorted(run.read_jsonl(tmp_path / name), key=str) for name in ("live.jsonl", "replayed.jsonl")]
    assert by_id[0] == by_id[1] and len(by_id[0]) == 8


def test_every_evaluate_config_loads_and_declares_only_what_it_has():
    from configs.evaluate import base_models, demo, gpt4o, knowledge, test_v1, tiny

    more = (base_models.get_config("a=x,b=y", "2.5"), gpt4o.get_config(), gpt4o.get_config("f.jsonl"), knowledge.get_config(),
            test_v1.get_config(), test_v1.get_config("baselines"))  # fmt: skip
    for c in (tiny.get_config(), demo.get_config(), demo.get_config("http://localhost:8000/v1,gpt"), *more):
        program.check(run.build(program.Settings, c.to_dict(), "config"))


# Endpoints: what was paid for is kept, and replays without network.


def verdict_of(content):
    return "Untrue" if "never breaks" in content else "Bribe" if "for your wife" in content else "Fine"


def endpoint_config(folder, url, **changes):
    entry = {"name": "gpt", "kind": "endpoint", "seed": 0, "base_url": url, "model": "gpt-x", "api_key_env": None,
             "concurrency": 2,
             "attempts": 1, "backoff_s": 0.01, "timeout_s": 20.0, "cache": None,
             "asking": {"mode": "generate", "prompt": None, "normalise": "sum", "max_new_tokens": 8},
             "price": {"currency": "USD", "source": "a list", "input_per_million": 1e6, "output_per_million": 0.0}}  # fmt: skip
    return config(folder, models=(entry | changes,), comparisons=())


def test_an_endpoint_that_fails_half_way_keeps_what_was_paid_for_and_the_numbers_are_identical(tmp_path):
    pytest.importorskip("openai")
    from tests import teacher_server

    folder = mini_task(tmp_path / "task")

    def healthy(content, attempt):
        return teacher_server.Answer(text=verdict_of(content))

    with teacher_server.serving(healthy) as server:
        program.main(endpoint_config(folder, server.url), tmp_path / "straight")
    paid = []

    def failing(content, attempt):
        if len(paid) >= 3:
            return teacher_server.Answer(status=500)
        paid.append(content)
        return teacher_server.Answer(text=verdict_of(content))

    with teacher_server.serving(failing) as server:
        c = endpoint_config(folder, server.url)
        with pytest.raises(ValueError):
            program.main(c, tmp_path / "broken")
        kept = len(run.read_jsonl(tmp_path / "broken" / "responses_gpt_0.jsonl"))
        assert kept >= 1
        server.behave = healthy
        before = len(server.asked)
        program.main(c, tmp_path / "broken")
        assert len(server.asked) - before == 8 - kept  # nothing is paid for twice
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()

    # The recorded file replays without network, to the same scores; its seconds would be those of a file, so none are shown.
    recorded = {"kind": "recorded", "path": str(tmp_path / "broken" / "responses_gpt_0.jsonl")}
    c = endpoint_config(folder, "http://nowhere")
    c.models = ({k: v for k, v in c.models[0].items() if k in ("name", "seed", "asking", "price")} | recorded,)
    program.main(c, tmp_path / "replayed")
    assert (tmp_path / "replayed" / "scores.json").read_bytes() == (tmp_path / "straight" / "scores.json").read_bytes()
    cost = json.loads((tmp_path / "replayed" / "details.json").read_text())["costs"]["gpt"]
    assert cost["seconds_per_1000"] is None and 0 < cost["price_per_1000"] < cost["tokens_per_1000"]  # a dollar a token read


def test_the_gpt4o_baseline_asks_the_same_whether_live_or_recorded():
    """The keys of the requests decide what a recorded file answers: model name and key of the API must not enter them."""
    from configs.evaluate import gpt4o

    live, replayed = (c.models[-1] for c in (gpt4o.get_config(), gpt4o.get_config("file.jsonl")))
    assert live["model"] == "gpt-4o-2024-11-20" and live["api_key_env"] == "OPENAI_API_KEY"
    assert replayed["kind"] == "recorded" and replayed["path"] == "file.jsonl"
    assert live["asking"] == replayed["asking"] and live["seed"] == replayed["seed"]
