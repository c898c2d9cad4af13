import itertools

import numpy as np
import pytest
from scipy import stats as reference

from swallow_jax import stats


def alone(n):
    """Pair ids that put every item into a pair of its own."""
    return [str(number) for number in range(n)]


def test_wilson_equals_scipy_on_random_tables():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        n = int(generator.integers(1, 500))
        k = int(generator.integers(0, n + 1))
        expected = reference.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert np.allclose(stats.wilson(k, n), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "correct, percent, low, high",
    [(178, 51.7, 46.5, 57.0), (264, 76.7, 72.0, 80.9), (286, 83.1, 78.8, 86.7), (297, 86.3, 82.3, 89.6)],
)
def test_published_counts_of_344_give_the_published_percentages(correct, percent, low, high):
    assert round(100 * correct / 344, 1) == percent
    assert [round(100 * bound, 1) for bound in stats.wilson(correct, 344)] == [low, high]


def test_wilson_covers_95_percent_at_344():
    interval = np.array([stats.wilson(k, 344) for k in range(345)])
    k = np.arange(345)
    coverages = [
        reference.binom.pmf(k, 344, p)[(interval[:, 0] <= p) & (p <= interval[:, 1])].sum() for p in np.linspace(0.05, 0.95, 181)
    ]
    assert abs(np.mean(coverages) - 0.95) < 0.01


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match=f"n={n}"):
        stats.wilson(k, n)


def test_mcnemar_equals_scipys_binomial_test_and_is_one_without_disagreement():
    assert stats.mcnemar_exact(0, 0) == 1.0
    generator = np.random.default_rng(1)
    for b01, b10 in generator.integers(0, 40, size=(1000, 2)):
        if b01 + b10:
            expected = reference.binomtest(int(b01), int(b01 + b10), 0.5).pvalue
            assert abs(stats.mcnemar_exact(int(b01), int(b10)) - expected) < 1e-9


def test_sign_flip_over_single_items_is_the_exact_mcnemar_test():
    generator = np.random.default_rng(2)
    for _ in range(50):
        a, b = generator.integers(0, 2, size=(2, 1, 60))
        b01, b10 = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())
        p = stats.sign_flip_pairs(a, b, alone(60), permutations=10, seed=0)
        assert abs(p - stats.mcnemar_exact(b01, b10)) < 1e-9


def test_sign_flip_over_pairs_and_seeds_equals_scipys_exact_permutation_test():
    generator = np.random.default_rng(3)
    pairs = [str(number // 2) for number in range(18)]
    for _ in range(10):
        a, b = generator.integers(0, 2, size=(3, 18)), generator.integers(0, 2, size=(2, 18))
        ours = stats.sign_flip_pairs(a, b, pairs, permutations=10, seed=0)
        expected = reference.permutation_test(
            (stats.pair_sums(a, pairs).mean(0), stats.pair_sums(b, pairs).mean(0)),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        assert abs(ours - expected.pvalue) < 1e-9


def test_enumeration_equals_a_literal_loop_and_monte_carlo_comes_near():
    generator = np.random.default_rng(4)
    a, b = generator.normal(0.4, 1, size=(1, 12)), generator.normal(0, 1, size=(1, 12))
    difference = (a - b)[0]
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product([1, -1], repeat=12)]
    expected = np.mean(np.array(sums) >= abs(difference.sum()) - 1e-9)
    assert abs(stats.sign_flip_pairs(a, b, alone(12), permutations=4096, seed=0) - expected) < 1e-12
    drawn = stats.sign_flip_pairs(a, b, alone(12), permutations=4095, seed=0)
    assert drawn != expected and abs(drawn - expected) < 0.03
    assert drawn == stats.sign_flip_pairs(a, b, alone(12), permutations=4095, seed=0)


def test_monte_carlo_p_is_never_zero():
    a, b = np.linspace(5, 6, 40)[None], np.zeros((1, 40))
    assert stats.sign_flip_pairs(a, b, alone(40), permutations=99, seed=0) == 1 / 100


def test_equal_arms_have_p_one():
    same = np.array([[1, 0, 1, 1]])
    assert stats.sign_flip_pairs(same, same, alone(4), permutations=10, seed=0) == 1.0
    assert stats.sign_flip_pairs(same * 0.3, same * 0.3, alone(4), permutations=10, seed=0) == 1.0


def test_sign_flip_keeps_its_size_on_dependent_twins_where_mcnemar_does_not():
    """Both twins of a pair are right together: the hypothesis holds, but only half as many facts are independent."""
    generator = np.random.default_rng(5)
    pairs = [str(number // 2) for number in range(100)]
    by_pair = by_item = 0
    trials = 1500
    for _ in range(trials):
        a, b = (np.repeat(generator.integers(0, 2, size=(1, 50)), 2, axis=1) for _ in "ab")
        by_pair += stats.sign_flip_pairs(a, b, pairs, permutations=10, seed=0) < 0.05
        by_item += stats.mcnemar_exact(int((a < b).sum()), int((a > b).sum())) < 0.05
    assert by_pair / trials <= 0.055
    assert by_item / trials > 0.10


def test_bootstrap_interval_agrees_with_the_standard_error_of_pair_means():
    generator = np.random.default_rng(6)
    pairs = [str(number // 2) for number in range(400)]
    a = np.repeat(generator.random((1, 200)) < 0.8, 2, axis=1)
    b = np.repeat(generator.random((1, 200)) < 0.6, 2, axis=1)
    difference_P = stats.pair_sums(a, pairs)[0] / 2 - stats.pair_sums(b, pairs)[0] / 2
    error = difference_P.std(ddof=1) / np.sqrt(200)
    low, high = stats.paired_bootstrap(a, b, pairs, resamples=20_000, seed=0)
    assert abs((high - low) / (2 * 1.96 * error) - 1) < 0.04
    assert abs((low + high) / 2 - difference_P.mean()) < 0.2 * error


def test_bootstrap_interval_grows_when_seeds_disagree():
    steady = np.tile(np.arange(100) % 2, (3, 1))
    swinging = np.stack([np.ones(100), np.arange(100) % 2, np.zeros(100)])
    width = {}
    for name, scores in (("steady", steady), ("swinging", swinging)):
        low, high = stats.paired_bootstrap(scores, None, alone(100), resamples=4000, seed=0)
        width[name] = high - low
    assert width["swinging"] > 2 * width["steady"]


def test_holm_equals_the_published_procedure():
    assert np.allclose(stats.holm([0.01, 0.02, 0.03, 0.04]), [0.04, 0.06, 0.06, 0.06])
    assert np.allclose(stats.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


@pytest.mark.parametrize("share, points", [(0.05, 3.4), (0.08, 4.3), (0.12, 5.2), (0.20, 6.8)])
def test_smallest_detectable_difference_at_344_items(share, points):
    assert abs(100 * stats.mde(344, share) - points) < 0.06


def test_exact_mcnemar_finds_the_smallest_detectable_difference_four_times_in_five():
    difference, share = stats.mde(344, 0.12), 0.12
    generator = np.random.default_rng(7)
    shares = [(share - difference) / 2, (share + difference) / 2, 1 - share]
    tables = generator.multinomial(344, shares, size=2000)
    power = np.mean([stats.mcnemar_exact(int(b01), int(b10)) < 0.05 for b01, b10, _ in tables])
    assert 0.74 < power < 0.82  # the exact test is a little conservative


def test_smallest_detectable_difference_never_exceeds_what_the_discordance_allows():
    found = stats.mde(344, 0.0)
    assert 6 / 344 < found < 9 / 344  # six items all one way is the first p < 0.05
    assert stats.mde(4, 0.1) == 1.0


def test_discordance_of_single_items_is_the_share_that_differs():
    a, b = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    assert stats.discordance(a, b, alone(4)) == 0.5
    assert stats.discordance(a, b, ["x", "y", "y", "z"]) == 0.0


def test_brier_and_ece_on_literal_values():
    probabilities = [[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]]
    gold = [0, 1, 1, 1]
    assert np.isclose(stats.brier(probabilities, gold), np.mean([0.08, 0.72, 0.18, 0.02]))
    # Least confident half {.6 wrong, .7 right}: |.5 - .65|; most confident half {.8, .9 right}: |1 - .85|.
    assert np.isclose(stats.ece(probabilities, gold, bins=2), 0.15)


def test_calibration_refuses_rows_that_are_no_distribution():
    with pytest.raises(ValueError, match="sum to 1"):
        stats.brier([[0.5, 0.2]], [0])


def test_scores_and_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="3 items"):
        stats.sign_flip_pairs(np.ones((1, 2)), np.ones((1, 2)), alone(3), permutations=10, seed=0)


@pytest.mark.parametrize("tables", [100, pytest.param(1000, marks=pytest.mark.proof)])
def test_random_tables_equal_statsmodels(tables):
    """Wilson, exact McNemar and Holm; statsmodels' own McNemar fails without disagreement, ours is 1."""
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

    generator = np.random.default_rng(8)
    p_values = []
    for _ in range(tables):
        n = int(generator.integers(1, 600))
        both, a_only, b_only, neither = generator.multinomial(n, generator.dirichlet([2, 0.5, 0.5, 1]))
        for k in (both + a_only, both + b_only):
            expected = proportion_confint(k, n, alpha=0.05, method="wilson")
            assert np.allclose(stats.wilson(k, n), expected, rtol=0, atol=1e-9)
        if a_only + b_only:
            p_values.append(mcnemar([[both, a_only], [b_only, neither]], exact=True).pvalue)
            assert abs(stats.mcnemar_exact(int(b_only), int(a_only)) - p_values[-1]) < 1e-9
    assert len(p_values) > 0.9 * tables
    for start in range(0, tables * 9 // 10 - 8, 9):
        few = p_values[start : start + 9]
        assert np.allclose(stats.holm(few), multipletests(few, method="holm")[1], rtol=0, atol=1e-9)


def test_t_interval_equals_scipys_and_one_seed_has_none():
    values = [0.81, 0.84, 0.79]
    expected = reference.t.interval(0.95, 2, loc=np.mean(values), scale=reference.sem(values))
    assert np.allclose(stats.t_interval(values), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="two values or more, got 1"):
        stats.t_interval([0.5])


def test_t_interval_of_three_seeds_covers_95_percent():
    generator = np.random.default_rng(9)
    intervals = [stats.t_interval(seeds) for seeds in generator.normal(0.8, 0.02, size=(4000, 3))]
    assert abs(np.mean([low <= 0.8 <= high for low, high in intervals]) - 0.95) < 0.01


def test_paired_bootstrap_covers_95_percent_on_dependent_twins():
    """172 twin pairs whose answers go together, one seed: what every single comparison of test_v1 rests on."""
    generator = np.random.default_rng(10)
    pairs = [str(number // 2) for number in range(344)]
    held = 0
    for trial in range(400):
        skill = np.repeat(generator.normal(0, 1, 172), 2)
        a, b = ((skill + generator.normal(shift, 1, 344) > 0)[None] for shift in (0.9, 0.6))
        low, high = stats.paired_bootstrap(a, b, pairs, resamples=1000, seed=trial)
        true = reference.norm.cdf(0.9 / 2**0.5) - reference.norm.cdf(0.6 / 2**0.5)
        held += low <= true <= high
    assert 0.92 <= held / 400 <= 0.975


def test_coverage_is_simulated_from_the_answers_themselves():
    generator = np.random.default_rng(11)
    pairs = [str(number // 2) for number in range(200)]
    a, b = (generator.random((1, 200)) < 0.8), (generator.random((1, 200)) < 0.6)
    found = stats.simulated_coverage(a, b, pairs, simulations=200, seed=0)
    assert 0.90 <= found <= 0.99
    assert found == stats.simulated_coverage(a, b, pairs, simulations=200, seed=0)
    # One pair of a hundred differs: most studies of this world see none, and an interval of no width misses the truth.
    rare = np.zeros((1, 200))
    rare[0, 0] = 1
    assert stats.simulated_coverage(rare, np.zeros((1, 200)), pairs, simulations=200, seed=0) < 0.75


def test_ratio_bootstrap_covers_95_percent_of_documents_bits():
    """Twenty documents are few: the percentile interval is somewhat too short, and the report says so by its size."""
    generator = np.random.default_rng(12)
    held = 0
    for trial in range(500):
        size = generator.integers(300, 900, 60)
        bits = size * generator.normal(1.1, 0.2, 60)
        low, high = stats.ratio_bootstrap(bits, size, resamples=600, seed=trial)
        held += low <= 1.1 <= high
    assert 0.91 <= held / 500 <= 0.975


def test_seed_and_item_noise_are_told_apart():
    from swallow_jax.evaluate import metrics

    generator = np.random.default_rng(13)
    pairs = [str(number // 2) for number in range(400)]
    correct = generator.random((1, 400)) < 0.7
    assert stats.pair_standard_error(correct, pairs) == pytest.approx(np.sqrt(0.7 * 0.3 / 400), rel=0.15)
    twins = np.repeat(generator.random((1, 200)) < 0.7, 2, axis=1)  # both right or both wrong: half as many facts
    assert stats.pair_standard_error(twins, pairs) == pytest.approx(np.sqrt(0.7 * 0.3 / 200), rel=0.15)

    def row(scores_SI):
        rows = [
            [
                {"conversation_id": str(i), "gold": "x", "pred": "x" if right else "y", "valid": True}
                for i, right in enumerate(seed)
            ]
            for seed in scores_SI
        ]
        arm = metrics.Arm(name="m", test_set="t", seeds=tuple(range(len(rows))), rows=tuple(map(tuple, rows)))
        settings = metrics.Statistics(level=0.95, permutations=10, resamples=200, seed=0, bins=2, simulations=0)
        return metrics.score_row(arm, metrics.metric("exact_category"), {str(i): pairs[i] for i in range(400)}, settings)

    steady = row(np.repeat(correct, 3, axis=0))
    assert steady["sd_seeds"] == 0 and steady["se_items"] > 0.02
    assert "sd_seeds" not in row(correct)


def test_detectable_mean_difference_is_found_four_times_in_five():
    generator = np.random.default_rng(14)
    spread = generator.normal(0, 0.3, 400)
    smallest = stats.mean_mde(spread)
    found = [abs(reference.ttest_1samp(generator.normal(smallest, 0.3, 400), 0).pvalue) < 0.05 for _ in range(800)]
    assert 0.74 < np.mean(found) < 0.86
