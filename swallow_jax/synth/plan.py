"""The plan: which conversations to ask for, written before anything is generated.

A plan row is one request for one conversation: `{"plan_id", "teacher", "split", "category", "variant", "pair_id",
"scenario", "attributes", "seed", "given"}`. `variant` is 'violation' or 'compliant'; the two rows of a `pair_id` share
everything else, so they are twins and lie in one split. `scenario` names the bank item behind a pair (None when a teacher
invents it), and a scenario lies in one split. `given` is None, or the opening a teacher is to continue.

Everything is a function of the config and its seed, by hashing, so plans are equal on every machine and Python version.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax.task import Task

VARIANTS = ("violation", "compliant")
_BLOCK = 20  # pairs over which attribute shares are met


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quotas:
    """Pairs of twins for every category, by split."""

    train_pairs: int
    dev_pairs: int


def make_plan(
    task: Task,
    *,
    teacher: str,
    quotas: Quotas,
    seed: int,
    scenarios: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]] | None,
) -> list[dict[str, Any]]:
    """Rows for one teacher: the same number of pairs for every category, attributes by their weights.

    A smaller quota gives a part of the same rows, so answers recorded for a larger plan stay valid.

    `scenarios`: split -> category id -> [{"id", "product"}] (see `split_scenarios`); each is used once before any is used
    again. None: the teacher invents its scenarios.
    Raises ValueError when a split with a quota has no scenario for a category.
    """
    rows = []
    for category in task.categories:
        for split, pairs in (("dev", quotas.dev_pairs), ("train", quotas.train_pairs)):
            where = f"{seed}/{teacher}/{category.id}/{split}"
            columns = {name: _column(values, pairs, f"{where}/{name}") for name, values in task.attributes.items()}
            pool = None
            if scenarios is not None:
                pool = shuffled(sorted(scenarios[split].get(category.id, ()), key=lambda s: s["id"]), where)
                if pairs and not pool:
                    raise ValueError(
                        f"category {category.id} has no scenario for its {pairs} {split} pairs; "
                        "write more bank items or lower the quota"
                    )
            for i in range(pairs):
                attributes = {name: column[i] for name, column in columns.items()}
                scenario = pool[i % len(pool)] if pool else None
                if scenario and scenario["product"] != "any" and "product" in attributes:
                    attributes["product"] = scenario["product"]
                pair_id = f"{teacher}-{split}-{category.id}-{i:04d}"
                for variant in VARIANTS:
                    rows.append(
                        {
                            "plan_id": f"{pair_id}-{variant[0]}",
                            "teacher": teacher,
                            "split": split,
                            "category": category.id,
                            "variant": variant,
                            "pair_id": pair_id,
                            "scenario": scenario["id"] if scenario else None,
                            "attributes": attributes,
                            "seed": draw(f"{where}/{i}") % 2**31,
                            "given": None,
                        }
                    )
    return rows


def apportion(weights: Mapping[str, float], count: int, where: str) -> list[str]:
    """`count` values in shares nearest to the weights (largest remainder), in an order drawn from `where`."""
    total = sum(weights.values())
    exact = {value: weight * count / total for value, weight in weights.items()}
    counts = {value: int(share) for value, share in exact.items()}
    by_remainder = sorted(exact, key=lambda v: (counts[v] - exact[v], draw(f"{where}/{v}")))
    for value in by_remainder[: count - sum(counts.values())]:
        counts[value] += 1
    column = [value for value, n in counts.items() for _ in range(n)]
    return [column[i] for i in shuffled(range(count), where)]


def _column(weights: Mapping[str, float], count: int, where: str) -> list[str]:
    """Apportioned block by block, so that a longer column begins with the shorter one."""
    blocks = range(-(-count // _BLOCK))
    return [value for block in blocks for value in apportion(weights, _BLOCK, f"{where}/{block}")][:count]


def shuffled(items: Sequence[Any], where: str) -> list[Any]:
    """The items in an order that depends only on `where` and their positions."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: draw(f"{where}#{i}"))]


def draw(where: str) -> int:
    """A 64-bit number that depends only on the text `where`."""
    return int.from_bytes(hashlib.sha256(where.encode("utf-8")).digest()[:8], "big")


def count(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Rows by class: each category's violations, and the compliant ones together."""
    return dict(collections.Counter(r["category"] if r["variant"] == "violation" else "compliant" for r in rows))


def split_scenarios(
    scenarios: Mapping[str, Sequence[Mapping[str, str]]], *, dev: int, seed: int
) -> dict[str, dict[str, list[Mapping[str, str]]]]:
    """Put `dev` scenarios of each category aside for dev; every teacher of a plan shares the result."""
    found: dict[str, dict[str, list[Mapping[str, str]]]] = {"dev": {}, "train": {}}
    for category, items in scenarios.items():
        order = shuffled(sorted(items, key=lambda s: s["id"]), f"{seed}/scenarios/{category}")
        found["dev"][category], found["train"][category] = order[:dev], order[dev:]
    return found
