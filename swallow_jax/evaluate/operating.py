"""From scores to work: calibration and thresholds fitted on the dev set alone, the review load they mean, what checks cost.

Letters: I items, C labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swallow_jax import stats
from swallow_jax.evaluate import metrics

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operating:
    """`dev_set` as config.test_set; thresholds for these shares of violations found; load per `talks` at these prevalences."""

    dev_set: str
    recalls: tuple[float, ...]
    prevalences: tuple[float, ...]
    talks: int

    def __post_init__(self):
        for name in ("recalls", "prevalences"):
            if bad := [x for x in getattr(self, name) if not isinstance(x, int | float) or not 0 < x <= 1]:
                raise ValueError(f"config.operating.{name} holds {bad[0]!r}; write shares, 0.001 for 0.1 %")
        if self.talks < 1:
            raise ValueError(f"config.operating.talks is {self.talks}; name the conversations of a period, such as 10000")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What a million tokens cost, or an hour of the machine; `source` says where the figure is from and of when."""

    currency: str
    source: str
    input_per_million: float | None = None
    output_per_million: float | None = None
    per_hour: float | None = None

    def __post_init__(self):
        by_token = self.input_per_million is not None and self.output_per_million is not None
        if by_token == (self.per_hour is not None):
            raise ValueError("a price is input_per_million and output_per_million, or per_hour; write one of the two")


def violation_score(row: Row) -> float:
    """The probability of any violation."""
    return 1.0 - row["probs"][metrics.COMPLIANT]


def points(dev: metrics.Arm, test: metrics.Arm, labels: Sequence[str], several: bool, settings: Operating,
           statistics: metrics.Statistics) -> dict[str, Any]:  # fmt: skip
    """How one arm works on the test set: as it answers, and with thresholds that each seed's own dev answers chose.

    Counts are summed over the arm's seeds. Without label probabilities there is one point only, the answers themselves.
    """
    rows = [row for seed in test.rows for row in seed]
    flagged = [row["pred"] != metrics.COMPLIANT for row in rows]
    found = {"model": test.name, "dev_set": settings.dev_set, "talks": settings.talks,
             "as_answered": _point(rows, flagged, settings, statistics.level), "thresholds": []}  # fmt: skip
    if not all(row.get("probs") for seed in (*dev.rows, *test.rows) for row in seed):
        return found
    for recall in settings.recalls:
        chosen = [
            stats.threshold_for_recall([violation_score(r) for r in seed], [r["gold"] != metrics.COMPLIANT for r in seed], recall)
            for seed in dev.rows
        ]
        flagged = [violation_score(r) >= t for t, seed in zip(chosen, test.rows, strict=True) for r in seed]
        found["thresholds"].append(
            {"dev_recall": recall, "threshold": chosen} | _point(rows, flagged, settings, statistics.level)
        )
    if not several:
        heats, tempered, gold_I = [], [], []
        for dev_seed, test_seed in zip(dev.rows, test.rows, strict=True):
            heats.append(stats.temperature(*metrics.probabilities(dev_seed, labels)))
            probs_IC, gold = metrics.probabilities(test_seed, labels)
            tempered.append(stats.tempered(probs_IC, heats[-1]))
            gold_I += gold
        found["temperature"] = heats
        found["calibrated"] = metrics.calibration(np.concatenate(tempered), gold_I, statistics.bins)
    return found


def _point(rows: Sequence[Row], flagged: Sequence[bool], settings: Operating, level: float) -> dict[str, Any]:
    violating = [row["gold"] != metrics.COMPLIANT for row in rows]
    # An answer without a label does not find a violation, and on a compliant item it still wants a person.
    hits = sum(f and v and row["valid"] for f, v, row in zip(flagged, violating, rows, strict=True))
    alarms = sum((f or not row["valid"]) and not v for f, v, row in zip(flagged, violating, rows, strict=True))
    positives, negatives = sum(violating), len(rows) - sum(violating)
    point: dict[str, Any] = {"found": hits, "violations": positives, "alarms": alarms, "compliant": negatives}
    point["recall_ci95"] = list(stats.wilson(hits, positives, level)) if positives else None
    point["alarm_ci95"] = list(stats.wilson(alarms, negatives, level)) if negatives else None
    if positives and negatives:
        point["load"] = [
            {"prevalence": p, **stats.review_load(hits / positives, alarms / negatives, p, settings.talks)}
            for p in settings.prevalences
        ]
    return point


def cost(timings: Sequence[Mapping[str, Any]], price: Price | None) -> dict[str, Any]:
    """Seconds, tokens and price of 1,000 checks from what was asked, over all seeds; null for what is not known.

    Seconds are null where answers were replayed from a file; tokens where an endpoint does not count them.
    """
    asked = sum(t["asked"] for t in timings)
    if not asked:
        return {"checks": 0, "seconds_per_1000": None, "tokens_per_1000": None, "price_per_1000": None, "currency": None}

    def per_thousand(field: str) -> float | None:
        values = [t.get(field) for t in timings]
        return None if None in values else 1000 * sum(values) / asked

    seconds = None if any(t.get("replayed") for t in timings) else per_thousand("seconds")
    read, written = per_thousand("prompt_tokens"), per_thousand("completion_tokens")
    amount = None
    if price is not None and price.per_hour is not None and seconds is not None:
        amount = price.per_hour * seconds / 3600
    if price is not None and price.per_hour is None and read is not None and written is not None:
        amount = (price.input_per_million * read + price.output_per_million * written) / 1e6
    return {
        "checks": asked, "seconds_per_1000": seconds, "tokens_per_1000": None if None in (read, written) else read + written,
        "price_per_1000": amount, "currency": None if price is None else price.currency,
        "price_source": None if price is None else price.source,
    }  # fmt: skip
