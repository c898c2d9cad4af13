"""Sampling draws from exactly the distribution that transformers' processors leave, and the same token in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax.generate import sampling

SETTINGS = [  # temperature, top_k, top_p; with V = 1000 and 256 candidates these take the fast and the full path
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 50, 1.0), (1.3, 5, 0.9), (0.5, 0, 0.3), (1.0, 0, 0.95), (2.0, 300, 1.0),
    (2.0, 300, 0.97), (3.0, 999, 0.5), (1.0, 1, 1.0), (1.0, 0, 1e-6), (5.0, 0, 0.999), (1.0, 256, 1.0),
]  # fmt: skip


def kept(logits, temperature, top_k, top_p):
    """Reference in float64: the tokens that temperature -> top-k -> top-p leave, by a full sort."""
    z = logits.astype(np.float64) / temperature
    inside = np.ones(z.size, bool)
    if 0 < top_k < z.size:
        inside = z >= np.sort(z)[-top_k]
    p = np.where(inside, np.exp(z - z.max()), 0)
    p /= p.sum()
    if top_p < 1:
        inside &= np.array([p[z > value].sum() for value in z]) < top_p
    return inside


def draw(logits, settings, seeds, positions=None):
    settings = np.asarray(settings, np.float32)
    return jax.jit(sampling.sample)(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(seeds, jnp.uint32),
        jnp.asarray(np.zeros(len(seeds)) if positions is None else positions, jnp.int32),
        jnp.asarray(settings[:, 0]),
        jnp.asarray(settings[:, 1], jnp.int32),
        jnp.asarray(settings[:, 2]),
    )


def test_every_setting_draws_the_noisy_maximum_of_the_reference_set():
    rng = np.random.default_rng(0)
    settings = SETTINGS * 6  # enough draws that the full path also has to reject some
    seeds, positions = np.arange(len(settings)) + 7, np.arange(len(settings)) * 3
    ids = jnp.broadcast_to(jnp.arange(1000), (len(settings), 1000))
    noise = np.asarray(sampling.gumbel(jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions), ids))
    for scale in (0.3, 3.0):
        logits = rng.normal(size=(len(settings), 1000)).astype(np.float32) * scale
        tokens, logprobs = draw(logits, settings, seeds, positions)
        for b, setting in enumerate(settings):
            noisy = np.where(kept(logits[b], *setting), logits[b] / np.float32(setting[0]) + noise[b], -np.inf)
            assert tokens[b] == noisy.argmax(), setting
            reference = logits[b, tokens[b]] - np.log(np.exp(logits[b].astype(np.float64)).sum())
            assert abs(logprobs[b] - reference) < 1e-5


@pytest.mark.live
def test_kept_tokens_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(1)
    for temperature, top_k, top_p in SETTINGS:
        logits = rng.normal(size=1000).astype(np.float32) * 2
        scores = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None]) if temperature != 1 else (
            torch.tensor(logits)[None]
        )  # fmt: skip
        if top_k:
            scores = hf.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = hf.TopPLogitsWarper(top_p)(None, scores)
        theirs = np.isfinite(scores[0].numpy())
        # Token for token: the noisy maximum over what they leave, with their scores, is what is drawn here.
        n = 200
        noise = sampling.gumbel(jnp.arange(n, dtype=jnp.uint32), jnp.zeros(n, jnp.int32), jnp.tile(jnp.arange(1000), (n, 1)))
        tokens, _ = draw(np.tile(logits, (n, 1)), [(temperature, top_k, top_p)] * n, np.arange(n))
        assert np.mean(np.asarray(tokens) == np.argmax(scores[0].numpy() + np.asarray(noise), axis=-1)) >= 1 - 1 / n
        # The last token may differ by float32 rounding of its cumulative sum; none other may.
        assert np.sum(theirs != kept(logits, temperature, top_k, top_p)) <= (1 if top_p < 1 else 0)


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.8, 6, 1.0), (1.5, 0, 0.8), (1.2, 8, 0.9)])
@pytest.mark.parametrize("vocabulary", [12, 400])
def test_frequencies_pass_chi_square(setting, vocabulary):
    logits = np.concatenate([np.linspace(2, -1, 12), np.full(vocabulary - 12, -6.0)]).astype(np.float32)
    n = 4000
    tokens, _ = draw(np.tile(logits, (n, 1)), [setting] * n, np.arange(n), np.full(n, 5))
    p = np.where(kept(logits, *setting), np.exp(logits.astype(np.float64) / setting[0]), 0)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=vocabulary)
    assert counts[p == 0].sum() == 0
    big = p * n >= 5
    observed, expected = np.append(counts[big], counts[~big].sum()), np.append(p[big], p[~big].sum()) * n
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4  # beyond four standard deviations


def test_noise_is_standard_gumbel_and_not_shared_between_seed_position_and_token():
    ids = jnp.broadcast_to(jnp.arange(50_000), (3, 50_000))
    noise = np.asarray(sampling.gumbel(jnp.array([1, 1, 2], jnp.uint32), jnp.array([4, 5, 4]), ids))
    assert np.all(np.isfinite(noise))
    assert np.allclose(noise.mean(1), np.euler_gamma, atol=0.03)
    assert np.allclose(noise.var(1), np.pi**2 / 6, atol=0.05)
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.02


def test_noise_of_a_seed_never_changes():  # golden: a seed in a config must give the same tokens after an upgrade of JAX
    noise = sampling.gumbel(jnp.array([123], jnp.uint32), jnp.array([45]), jnp.array([[0, 1, 128_000]]))
    np.testing.assert_allclose(np.asarray(noise), GOLDEN, rtol=1e-5)


GOLDEN = [[0.24419425, 2.1187713, 0.99752939]]


def test_greedy_takes_the_lowest_id_of_a_tie_and_ignores_seed_and_truncation():
    logits = np.zeros((2, 300), np.float32)
    logits[0, [20, 7, 250]] = 3.0
    tokens, logprobs = draw(logits, [(0.0, 1, 0.1), (0.0, 0, 1.0)], [5, 6])
    assert tokens.tolist() == [7, 0]
    assert np.allclose(logprobs, [3 - np.log(3 * np.exp(3) + 297), -np.log(300)], atol=1e-5)


def test_ties_at_the_border_all_stay():
    logits = np.full(400, 1.0, np.float32)  # every token ties with the k-th: top-k keeps all of them, as transformers' does
    n = 3000
    tokens, _ = draw(np.tile(logits, (n, 1)), [(1.0, 2, 1.0)] * n, np.arange(n))
    assert len(set(tokens.tolist())) > 390
    tokens, _ = draw(np.tile(logits, (n, 1)), [(1.0, 0, 0.01)] * n, np.arange(n))
    assert len(set(tokens.tolist())) > 390


def test_a_draw_does_not_depend_on_row_company_or_token_order():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(len(SETTINGS), 1000)).astype(np.float32)
    seeds = np.arange(len(SETTINGS)) + 40
    together, _ = draw(logits, SETTINGS, seeds)
    order = rng.permutation(len(SETTINGS))
    shuffled, _ = draw(logits[order], np.array(SETTINGS)[order], seeds[order])
    assert np.array_equal(np.asarray(together)[order], shuffled)
    for b in range(len(SETTINGS)):  # two rows, the other one greedy: the fast path for some, the full path for others
        alone, _ = draw(logits[[b, 0]], [SETTINGS[b], (0.0, 0, 1.0)], [seeds[b], 0])
        assert alone[0] == together[b]


def test_parameters_never_recompile():
    compiled = jax.jit(lambda *args: sampling.sample(*args))
    logits = jnp.zeros((2, 300))
    for temperature, top_k, top_p in SETTINGS:
        settings = jnp.full(2, temperature), jnp.full(2, top_k, jnp.int32), jnp.full(2, top_p)
        compiled(logits, jnp.arange(2, dtype=jnp.uint32), jnp.arange(2), *settings)
    assert compiled._cache_size() == 1


def test_kth_largest_equals_a_sort():
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.normal(size=(5, 90)) * 10.0 ** rng.integers(-8, 8, (5, 90)), np.zeros((5, 10))], axis=1)
    values = values.astype(np.float32)
    k = np.array([1, 17, 50, 99, 100])
    ours = np.asarray(sampling._kth_largest(jnp.asarray(values), jnp.asarray(k)))
    assert np.array_equal(ours, [np.sort(row)[-n] for row, n in zip(values, k, strict=True)])


def test_the_vocabulary_is_never_sorted():
    # XLA turns a top-k whose result is sliced again into a sort of the whole row, 40 times slower.
    rows = jnp.zeros((2, 5000)), jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32)
    compiled = jax.jit(sampling.sample).lower(*rows, jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2)).compile().as_text()
    assert " sort(" not in compiled
