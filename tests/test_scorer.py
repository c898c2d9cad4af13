"""Scores equal those of a full forward over context + continuation, whatever is scored beside them."""

import dataclasses

import jax
import numpy as np
import pytest

from swallow_jax import llama
from swallow_jax.generate import scorer
from tests.test_engine import COMPUTE, CONFIG, full_logits, job, made_params, run


@pytest.fixture
def params():
    return made_params()


def question(name, context, *lengths):
    rng = np.random.default_rng(name)
    return scorer.Question(
        name=name,
        context_ids=rng.integers(0, 300, context).tolist(),
        continuations=[rng.integers(0, 300, n).tolist() for n in lengths],
    )


def score(params, questions, *, tokens_per_batch=128, max_length=96):
    made = scorer.Scorer(params, CONFIG, COMPUTE, max_length=max_length, tokens_per_batch=tokens_per_batch)
    answers = list(made.score(questions))
    assert len(answers) == len(questions)
    return {answer.name: answer for answer in answers}


QUESTIONS = [
    question(0, 33, 3, 1, 9, 2), question(1, 40, 2, 9), question(2, 7, 1, 1, 1), question(3, 45, 4, 1, 6, 2),
    question(4, 1, 30), question(5, 36, 5, 5, 5, 8), question(6, 46, 9, 1, 1, 1),
]  # fmt: skip


def test_sums_equal_the_full_forward(params):
    answers = score(params, QUESTIONS)
    for asked in QUESTIONS:
        answer = answers[asked.name]
        assert answer.tokens == tuple(len(c) for c in asked.continuations)
        for continuation, logprob in zip(asked.continuations, answer.logprobs, strict=True):
            logits = full_logits(params, [*asked.context_ids, *continuation])
            logprobs = np.asarray(jax.nn.log_softmax(logits))[len(asked.context_ids) - 1 : -1]
            reference = logprobs[np.arange(len(continuation)), continuation].sum()
            assert abs(logprob - reference) < 1e-5 * max(1, len(continuation)) * 3


def test_a_shared_prefix_changes_no_score_and_is_computed_once(params, monkeypatch):
    calls = []
    original = scorer.Prompts.run
    monkeypatch.setattr(scorer.Prompts, "run", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    prefix = np.random.default_rng(8).integers(0, 300, 50).tolist()
    asked = [dataclasses.replace(q, context_ids=[*prefix, *q.context_ids]) for q in QUESTIONS]
    whole = score(params, asked, max_length=160)
    assert not calls
    shared = score(params, [dataclasses.replace(q, prefix=50) for q in asked])
    assert len(calls) == 1
    for name, answer in whole.items():
        np.testing.assert_allclose(shared[name].logprobs, answer.logprobs, atol=1e-4)
        assert (shared[name].greedy, shared[name].tokens) == (answer.greedy, answer.tokens)


def test_a_long_context_in_pieces_gives_the_same_scores(params, monkeypatch):
    asked = [question(0, 70, 3, 1, 9), question(1, 64, 2, 9, 4), question(2, 33, 1, 1, 2), question(3, 65, 12, 1, 1)]
    whole = score(params, asked, max_length=200)
    monkeypatch.setattr(scorer, "_PIECE", 32)
    scorer._score.clear_cache()
    pieces = score(params, asked, max_length=200)
    scorer._score.clear_cache()
    for name, answer in whole.items():
        np.testing.assert_allclose(pieces[name].logprobs, answer.logprobs, atol=1e-4)
        assert pieces[name].greedy == answer.greedy


def test_memory_is_bounded_for_a_long_context_and_a_large_vocabulary():
    config = dataclasses.replace(CONFIG, vocab_size=131072, num_layers=1)
    params = scorer.decode_form(llama.init_params(config, jax.random.key(0), np.float32), "float32")
    C, R, T, U = 2, 1, 8192, 63
    compute = dataclasses.replace(COMPUTE, scan_layers=False)
    compiled = scorer._score.lower(
        params, np.zeros((R, T), np.int32), np.ones(R, np.int32), np.zeros((C, R, U + 1), np.int32), np.ones((C, R), np.int32),
        None, config=config, compute=compute,
    ).compile()  # fmt: skip
    # Scores of one piece against all slots are 135 MB; logits of all positions would be 4.3 GB, all scores 1.1 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 450e6


def test_greedy_is_true_exactly_for_what_greedy_decoding_writes(params):
    greedy = run(params, [job(i, new=6) for i in range(3)], stop_ids=())
    questions = []
    for i in range(3):
        right = greedy[i].tokens
        wrong = [*right[:4], (right[4] + 1) % 300, right[5]]
        questions.append(
            scorer.Question(
                name=i, context_ids=job(i).prompt_ids, continuations=[right, wrong, right[:1], [(right[0] + 1) % 300]]
            )
        )
    answers = score(params, questions)
    for i, answer in answers.items():
        assert answer.greedy == (True, False, True, False)
        assert abs(answer.logprobs[0] - sum(greedy[i].logprobs)) < 1e-4


def test_company_and_batch_size_change_nothing_but_float_noise(params):
    together = score(params, QUESTIONS)
    shuffled = score(params, QUESTIONS[::-1])
    small = score(params, QUESTIONS, tokens_per_batch=1)
    for asked in QUESTIONS:
        alone = score(params, [asked])
        for other in (shuffled, small, alone):
            np.testing.assert_allclose(other[asked.name].logprobs, together[asked.name].logprobs, atol=1e-5)
            assert other[asked.name].greedy == together[asked.name].greedy


def test_order_of_continuations_changes_nothing(params):
    # They share the slots behind the context: a longer one before a shorter one must leave no trace.
    asked = question(9, 33, 9, 2, 1, 5)
    reversed_ = scorer.Question(name=1, context_ids=asked.context_ids, continuations=asked.continuations[::-1])
    a, b = score(params, [asked])[9], score(params, [reversed_])[1]
    np.testing.assert_allclose(a.logprobs, b.logprobs[::-1], atol=1e-6)


def test_logits_never_exist_whole(params, monkeypatch):
    hidden = jax.random.normal(jax.random.key(1), (1003, 32))
    targets = jax.random.randint(jax.random.key(2), (1003,), 0, 300)

    def compiled():
        return jax.jit(lambda p, h, t: scorer.token_scores(p, CONFIG, h, t)).lower(params, hidden, targets).compile()

    whole = compiled()(params, hidden, targets)
    monkeypatch.setattr(scorer, "_LOGITS_BLOCK", 300 * 16)
    blocked = compiled()
    np.testing.assert_allclose(blocked(params, hidden, targets)[0], whole[0], atol=1e-5)
    assert np.array_equal(blocked(params, hidden, targets)[1], whole[1])
    assert blocked.memory_analysis().temp_size_in_bytes < 1003 * 300 * 4 / 3


def test_buckets_waste_at_most_a_third():
    sizes = sorted({scorer.padded(n, 32) for n in range(1, 2000)})
    assert sizes == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(n <= scorer.padded(n, 32) <= max(32, 1.5 * n) for n in range(1, 2000))


def test_what_cannot_be_scored_is_refused_with_its_numbers(params):
    with pytest.raises(ValueError, match=r"context of 90 and a continuation of 9 tokens do not fit max_length=96"):
        score(params, [question(0, 90, 9)])
    with pytest.raises(ValueError, match="prefix=7 of 7 tokens"):
        score(params, [dataclasses.replace(question(0, 7, 9), prefix=7)])
    with pytest.raises(ValueError, match="context is empty"):
        score(params, [question(0, 0, 9)])
    with pytest.raises(ValueError, match=r"continuations of \[2, 0\] tokens"):
        score(params, [question(0, 5, 2, 0)])
