"""Intervals, paired tests and calibration for scored test items.

Twins (a violating conversation and its compliant twin) are not independent, so everything that compares two arms works on pairs:
an item belongs to a pair, a pair is flipped or resampled as a whole. Scores come as `[S, I]`: S seeds (training or sampling
runs) of one arm, I items; the two arms of a comparison may have different numbers of seeds.

Letters: S seeds, I items, P pairs, R resamples, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

# Above this many units of the grid the exact distribution costs more than the Monte Carlo one is worth.
_MAX_EXACT_SUPPORT = 200_000


def wilson(k: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion k/n (Wilson 1927); holds its level at small n and at k = 0 or n.

    `k` may be a mean over seeds, hence not whole. Raises ValueError for n < 1 or k outside 0..n.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; write 0.95 for 95 %")
    z = float(special.ndtri(0.5 + level / 2))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At k = 0 and k = n the bound is exactly 0 or 1; rounding must not move it inside.
    return (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def hypergeometric_interval(k: int, n: int, population: int, level: float = 0.95) -> tuple[int, int]:
    """Exact interval of how many of a finite population have a property, when k of n drawn without replacement have it.

    Both tails inverted (Buonaccorsi 1987), so the coverage is at least `level`; at n = population it is k alone.
    """
    if not 0 <= k <= n <= population or n < 1:
        raise ValueError(f"hypergeometric_interval needs 0 <= k <= n <= population and n >= 1, got {k}, {n}, {population}")

    def tail(low: int, high: int, total: int) -> float:
        """P(low <= K <= high) when `total` of the population have it."""
        x = np.arange(max(low, n - (population - total)), min(high, total) + 1)

        def log_choose(a, b):
            return special.gammaln(a + 1) - special.gammaln(b + 1) - special.gammaln(a - b + 1)

        logs = log_choose(total, x) + log_choose(population - total, n - x) - log_choose(population, n)
        return float(np.exp(logs).sum())

    def first(fits, start: int, stop: int) -> int:
        while start < stop:
            middle = (start + stop) // 2
            start, stop = (start, middle) if fits(middle) else (middle + 1, stop)
        return start

    # A hair of room for rounding: a bound must not be lost to the last bit of a sum of a thousand terms.
    alpha, most = (1 - level) / 2 * (1 - 1e-9), population - (n - k)
    low = first(lambda total: tail(k, n, total) > alpha, k, most)
    high = first(lambda total: tail(0, k, total) <= alpha, low, most + 1) - 1
    return low, high


def pair_sums(values_SI: np.ndarray, pairs: Sequence[str]) -> np.ndarray:
    """Sum the items of each pair: `[S, I]` -> `[S, P]`, pairs in order of first appearance."""
    values_SI = np.asarray(values_SI, dtype=np.float64)
    if values_SI.ndim != 2 or values_SI.shape[1] != len(pairs) or values_SI.size == 0:
        raise ValueError(f"scores must be [seeds, items] with {len(pairs)} items, one pair id each, got {values_SI.shape}")
    number_of = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    sums_SP = np.zeros((values_SI.shape[0], len(number_of)))
    np.add.at(sums_SP, (slice(None), [number_of[pair] for pair in pairs]), values_SI)
    return sums_SP


def _pair_differences(a_SI: np.ndarray, b_SI: np.ndarray, pairs: Sequence[str]) -> np.ndarray:
    return pair_sums(a_SI, pairs).mean(0) - pair_sums(b_SI, pairs).mean(0)


def sign_flip_pairs(a_SI: np.ndarray, b_SI: np.ndarray, pairs: Sequence[str], *, permutations: int, seed: int) -> float:
    """Two-sided p of "swapping the two arms within a pair changes nothing".

    The statistic is the mean over pairs of the pair-summed difference of the arms' means over their seeds; under the
    hypothesis every pair's difference may change its sign. Exact where possible: for right-or-wrong scores the distribution is
    a convolution over a grid of counts, for other scores all sign patterns are enumerated when there are at most
    `permutations` of them. Otherwise `permutations` seeded draws with the observed one added to both counts (Phipson & Smyth
    2010), so p is never 0. The p speaks about these seeds; `paired_bootstrap` is the place where seeds vary.
    """
    difference_P = _pair_differences(a_SI, b_SI, pairs)
    # Means over S_a and S_b seeds of whole counts lie on a grid of 1 / lcm(S_a, S_b).
    units_P = difference_P * math.lcm(len(a_SI), len(b_SI))
    whole_P = np.rint(units_P).astype(np.int64)
    on_grid = np.allclose(units_P, whole_P, rtol=0, atol=1e-6)
    if on_grid and np.abs(whole_P).sum() <= _MAX_EXACT_SUPPORT:
        return _exact_on_grid(whole_P)
    difference_P = difference_P[difference_P != 0]
    if not difference_P.size:
        return 1.0
    # Sums that differ only by rounding count as ties with the observed one.
    observed = abs(difference_P.sum()) - 1e-9 * np.abs(difference_P).sum()
    if difference_P.size < 31 and 2**difference_P.size <= permutations:
        patterns = np.arange(2**difference_P.size)[:, None] >> np.arange(difference_P.size)
        sums = (1.0 - 2.0 * (patterns & 1)) @ difference_P
        return float(np.mean(np.abs(sums) >= observed))
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, permutations, 1000):
        rows = min(1000, permutations - start)
        signs = generator.integers(0, 2, size=(rows, difference_P.size)) * 2.0 - 1.0
        hits += int(np.sum(np.abs(signs @ difference_P) >= observed))
    return (hits + 1) / (permutations + 1)


def _exact_on_grid(whole_P: np.ndarray) -> float:
    """Exact sign-flip p for whole differences: the distribution of sum(+-d) is a product of two-point distributions."""
    reach = int(np.abs(whole_P).sum())
    distribution = np.zeros(2 * reach + 1)  # index i holds P(sum = i - reach)
    distribution[reach] = 1.0
    for step in np.abs(whole_P[whole_P != 0]):
        distribution = 0.5 * (np.roll(distribution, step) + np.roll(distribution, -step))
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, distribution[np.abs(sums) >= abs(int(whole_P.sum()))].sum()))


def mcnemar_exact(b01: int, b10: int) -> float:
    """Exact two-sided McNemar p from the discordant counts (a wrong and b right, a right and b wrong); 1 if there are none."""
    if b01 < 0 or b10 < 0 or b01 != int(b01) or b10 != int(b10):
        raise ValueError(f"discordant counts must be whole and not negative, got {b01} and {b10}")
    # Twice the smaller tail exceeds 1 at the centre; with no disagreement at all it is 2.
    return float(min(1.0, 2 * special.bdtr(min(b01, b10), b01 + b10, 0.5)))


def paired_bootstrap(
    a_SI: np.ndarray,
    b_SI: np.ndarray | None,
    pairs: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of mean(a) - mean(b) over items, resampling whole pairs and, within each arm, seeds.

    With `b_SI=None` the interval of mean(a) alone. Resampling both ways counts what is noise of a single answer twice, so
    several seeds give an interval that errs on the wide side (Owen 2007, the pigeonhole bootstrap). It has no width where no
    pair differs: show it beside the exact test.
    """
    a_SP = pair_sums(a_SI, pairs)
    items_P = pair_sums(np.ones((1, len(pairs))), pairs)[0]
    generator = np.random.default_rng(seed)
    weights_RP = generator.multinomial(len(items_P), np.full(len(items_P), 1 / len(items_P)), size=resamples)
    items_R = weights_RP @ items_P

    def resampled_mean(sums_SP: np.ndarray) -> np.ndarray:
        count = len(sums_SP)
        totals_RS = weights_RP @ sums_SP.T
        chosen_RS = generator.integers(0, count, size=(resamples, count))
        return np.take_along_axis(totals_RS, chosen_RS, axis=1).mean(1) / items_R

    means_R = resampled_mean(a_SP)
    if b_SI is not None:
        means_R = means_R - resampled_mean(pair_sums(b_SI, pairs))
    low, high = np.quantile(means_R, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def simulated_coverage(
    a_SI: np.ndarray, b_SI: np.ndarray, pairs: Sequence[str], *, simulations: int, seed: int, level: float = 0.95
) -> float:
    """How often `paired_bootstrap`'s interval holds the true difference when the world is the one observed.

    The observed pairs and seeds are taken for the population; each simulated study draws as many of both, with replacement,
    and asks whether its interval (400 resamples) holds the observed difference. 1.0 where no pair differs.
    """
    a_SI, b_SI = np.asarray(a_SI, dtype=np.float64), np.asarray(b_SI, dtype=np.float64)
    truth = float(a_SI.mean() - b_SI.mean())
    members: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        members.setdefault(pair, []).append(number)
    groups = list(members.values())
    generator = np.random.default_rng(seed)
    held = 0
    for trial in range(simulations):
        drawn = generator.integers(0, len(groups), size=len(groups))
        items = [item for group in drawn for item in groups[group]]
        names = [str(place) for place, group in enumerate(drawn) for _ in groups[group]]
        seeds_a, seeds_b = (generator.integers(0, len(x), size=len(x)) for x in (a_SI, b_SI))
        low, high = paired_bootstrap(
            a_SI[seeds_a][:, items], b_SI[seeds_b][:, items], names, resamples=400, seed=seed + trial, level=level
        )
        held += low - 1e-12 <= truth <= high + 1e-12
    return held / simulations


def ratio_bootstrap(
    numerator_I: np.ndarray, denominator_I: np.ndarray, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator), such as bits per byte, resampling items."""
    weights_RI = np.random.default_rng(seed).multinomial(
        len(numerator_I), np.full(len(numerator_I), 1 / len(numerator_I)), size=resamples
    )
    ratios_R = (weights_RI @ np.asarray(numerator_I, float)) / (weights_RI @ np.asarray(denominator_I, float))
    low, high = np.quantile(ratios_R, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean of few values, such as seeds; ValueError for fewer than two, which allow none."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"an interval needs two values or more, got {len(values)}; run another seed or show none")
    half = float(special.stdtrit(len(values) - 1, 0.5 + level / 2)) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def pair_standard_error(values_SI: np.ndarray, pairs: Sequence[str]) -> float:
    """Standard error of the mean over items when pairs are drawn anew and the seeds stay (a ratio estimate); 0 for one pair."""
    sums_P = pair_sums(values_SI, pairs).mean(0)
    items_P = pair_sums(np.ones((1, len(pairs))), pairs)[0]
    if len(sums_P) < 2:
        return 0.0
    rest_P = sums_P - items_P * sums_P.sum() / items_P.sum()
    return float(math.sqrt(np.square(rest_P).sum() * len(sums_P) / (len(sums_P) - 1)) / items_P.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def discordance(a_SI: np.ndarray, b_SI: np.ndarray, pairs: Sequence[str]) -> float:
    """Mean square of the pair differences per item: what plays the part of McNemar's discordant share in `mde`.

    For one seed and pairs of one item it is the share of items on which the two arms differ; twins whose differences go
    together make it larger, averaging over seeds makes it smaller.
    """
    return float(np.square(_pair_differences(a_SI, b_SI, pairs)).sum() / len(pairs))


def mde(n: int, discordance: float, *, level: float = 0.95, power: float = 0.80) -> float:
    """Smallest difference of two accuracies on n items that a two-sided paired test finds with the given power.

    d = (z_level + z_power) sqrt(q / n) for discordance q: the normal approximation with the variance under the hypothesis,
    which for d << q is Connor's (1987) and errs on the large side. A difference cannot exceed the discordance: where q is
    too small for its own answer, the answer is the d at which every discordant item goes one way.
    """
    if n < 1 or discordance < 0:
        raise ValueError(f"mde needs n >= 1 and a discordance >= 0, got n={n}, discordance={discordance}")
    z = special.ndtri(0.5 + level / 2) + special.ndtri(power)
    return float(min(1.0, max(z * math.sqrt(discordance / n), z * z / n)))


def mean_mde(differences_I: np.ndarray, *, level: float = 0.95, power: float = 0.80) -> float:
    """Smallest mean difference found with the given power, from the spread of the differences seen (normal approximation)."""
    differences_I = np.asarray(differences_I, dtype=np.float64)
    if len(differences_I) < 2:
        raise ValueError(f"a spread needs two items or more, got {len(differences_I)}")
    z = special.ndtri(0.5 + level / 2) + special.ndtri(power)
    return float(z * differences_I.std(ddof=1) / math.sqrt(len(differences_I)))


def brier(probabilities_IC: np.ndarray, gold_I: Sequence[int]) -> float:
    """Mean over items of the squared distance between the class probabilities and the true class (0 best, 2 worst)."""
    probabilities_IC = _checked_probabilities(probabilities_IC, gold_I)
    truth_IC = np.eye(probabilities_IC.shape[1])[np.asarray(gold_I)]
    return float(np.square(probabilities_IC - truth_IC).sum(1).mean())


def ece(probabilities_IC: np.ndarray, gold_I: Sequence[int], *, bins: int) -> float:
    """Expected calibration error of the top class, bins of equal mass: mean |accuracy - confidence| weighted by items."""
    rows = reliability(probabilities_IC, gold_I, bins=bins)
    return float(sum(n * abs(accuracy - confidence) for n, confidence, accuracy in rows) / len(gold_I))


def reliability(probabilities_IC: np.ndarray, gold_I: Sequence[int], *, bins: int) -> list[tuple[int, float, float]]:
    """(items, mean confidence, accuracy) for each of `bins` groups of equal mass, least confident first."""
    probabilities_IC = _checked_probabilities(probabilities_IC, gold_I)
    confidence_I = probabilities_IC.max(1)
    right_I = probabilities_IC.argmax(1) == np.asarray(gold_I)
    groups = np.array_split(np.argsort(confidence_I, kind="stable"), bins)
    return [(len(group), float(confidence_I[group].mean()), float(right_I[group].mean())) for group in groups if len(group)]


def _checked_probabilities(probabilities_IC: np.ndarray, gold_I: Sequence[int]) -> np.ndarray:
    probabilities_IC = np.asarray(probabilities_IC, dtype=np.float64)
    if probabilities_IC.ndim != 2 or len(probabilities_IC) != len(gold_I) or not len(gold_I):
        raise ValueError(f"probabilities must be [{len(gold_I)} items, classes], got {probabilities_IC.shape}")
    if not np.allclose(probabilities_IC.sum(1), 1, atol=1e-4) or (probabilities_IC < 0).any():
        raise ValueError("each row of probabilities must be >= 0 and sum to 1; normalise over the classes first")
    return probabilities_IC


# Calibration and thresholds: fitted on one set of items (dev), used on another.


def temperature(probabilities_IC: np.ndarray, gold_I: Sequence[int]) -> float:
    """The T for which softmax(log p / T) gives the gold labels the largest likelihood (Guo et al. 2017), within 0.05 to 20."""
    from scipy import optimize

    probabilities_IC = _checked_probabilities(probabilities_IC, gold_I)
    log_IC = np.log(np.maximum(probabilities_IC, 1e-12))
    rows = np.arange(len(log_IC))

    def loss(log_t: float) -> float:
        scaled_IC = log_IC / math.exp(log_t)
        return float((special.logsumexp(scaled_IC, axis=1) - scaled_IC[rows, list(gold_I)]).mean())

    found = optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded", options={"xatol": 1e-6})
    return float(math.exp(found.x))


def tempered(probabilities_IC: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) over the classes."""
    return special.softmax(np.log(np.maximum(np.asarray(probabilities_IC, dtype=np.float64), 1e-12)) / temperature, axis=1)


def threshold_for_recall(scores_I: Sequence[float], positive_I: Sequence[bool], recall: float) -> float:
    """The highest threshold t at which `score >= t` finds at least this share of the positives."""
    if not 0 < recall <= 1 or not any(positive_I):
        raise ValueError(f"a threshold for recall {recall} needs 0 < recall <= 1 and a positive item among {len(positive_I)}")
    found = np.sort([s for s, positive in zip(scores_I, positive_I, strict=True) if positive])[::-1]
    return float(found[math.ceil(recall * len(found) - 1e-9) - 1])


def review_load(recall: float, false_alarms: float, prevalence: float, talks: int) -> dict[str, float | None]:
    """Of `talks` conversations at this prevalence: how many are flagged, how many of those violate, how many are missed.

    `precision` is the share of flagged conversations that violate; None where nothing is flagged.
    """
    hits, alarms = talks * prevalence * recall, talks * (1 - prevalence) * false_alarms
    return {
        "flagged": hits + alarms,
        "precision": hits / (hits + alarms) if hits + alarms else None,
        "missed": talks * prevalence * (1 - recall),
    }
