"""The plan: which conversations to ask for, written before anything is generated.

A plan row is one request for one conversation: `{"plan_id", "teacher", "split", "category", "also", "variant", "pair_id",
"slot", "attempt", "scenario", "persona", "attributes", "seed", "given"}`. `variant` is 'violation' or 'compliant'; the two
rows of a `pair_id` share everything else, so they are twins and lie in one split. `also` lists further categories that the
violating one breaks. `scenario` names the bank item behind a pair (None when a teacher invents it), and a scenario lies in one
split. `given` is None, or the opening a teacher is to continue.

A slot is a cell of the grid teacher x split x category x number, with its attributes; the first attempt to fill it bears its
name, later ones (`again`) keep its attributes and get another seed and scenario.

Everything is a function of the config and its seed, by hashing, so plans are equal on every machine and Python version.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from swallow_jax.task import VIOLATIONS, Task

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
    personas: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows for one teacher: the same number of pairs for every category, attributes by their weights.

    A smaller quota gives a part of the same rows, so answers recorded for a larger plan stay valid.

    `scenarios`: split -> category id -> [{"id", "product"}] (see `split_scenarios`); each is used once before any is used
    again. None: the teacher invents its scenarios.
    Raises ValueError when a split with a quota has no scenario for a category.
    """
    for category in task.categories:
        for split, pairs in (("dev", quotas.dev_pairs), ("train", quotas.train_pairs)):
            where = f"{seed}/{teacher}/{category.id}/{split}"
            whole = -(-pairs // _BLOCK) * _BLOCK  # blocks are drawn and mended whole, whatever the quota takes of them
            columns = {name: _column(values, whole, f"{where}/{name}") for name, values in task.attributes.items()}
            pool = None
            if scenarios is not None:
                pool = shuffled(sorted(scenarios[split].get(category.id, ()), key=lambda s: s["id"]), where)
                if pairs and not pool:
                    raise ValueError(
                        f"category {category.id} has no scenario for its {pairs} {split} pairs; "
                        "write more bank items or lower the quota"
                    )
            chosen = [pool[i % len(pool)] if pool else None for i in range(whole)]
            if "product" in columns:  # a scenario's product goes before the drawn one
                drawn = zip(chosen, columns["product"], strict=True)
                columns["product"] = [s["product"] if s and s["product"] != "any" else product for s, product in drawn]
            _repair(columns, task, where)
            for i in range(pairs):
                attributes = {name: column[i] for name, column in columns.items()}
                others = shuffled([c.id for c in task.categories if c.id != category.id], f"{where}/{i}/also")
                slot = f"{teacher}-{split}-{category.id}-{i:04d}"
                common = {
                    "pair_id": slot,
                    "slot": slot,
                    "attempt": 0,
                    "scenario": chosen[i]["id"] if chosen[i] else None,
                    "persona": personas[draw(f"{where}/{i}/persona") % len(personas)] if personas else "",
                    "attributes": attributes,
                    "seed": draw(f"{where}/{i}") % 2**31,
                    "given": None,
                }
                for variant in VARIANTS:
                    yield {
                        "plan_id": f"{slot}-{variant[0]}",
                        "teacher": teacher,
                        "split": split,
                        "category": category.id,
                        "also": sorted(others[: int(attributes.get(VIOLATIONS, 1)) - 1]),
                        "variant": variant,
                        **common,
                    }


def again(row: Mapping[str, Any], attempt: int, pool: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The same slot once more: another seed and, from the scenarios of its category and split, another one."""
    pair_id = f"{row['slot']}.{attempt}"
    scenario = row["scenario"]
    if pool:
        free = [s for s in pool if s["product"] in ("any", row["attributes"].get("product", "any"))] or list(pool)
        scenario = free[draw(f"{pair_id}/scenario") % len(free)]["id"]
    return {
        **row,
        "plan_id": f"{pair_id}-{row['variant'][0]}",
        "pair_id": pair_id,
        "attempt": attempt,
        "scenario": scenario,
        "seed": draw(f"{row['seed']}/{pair_id}") % 2**31,
        "given": None,
    }


def labels(row: Mapping[str, Any]) -> list[str]:
    """The label ids that a row's conversation must have."""
    return [row["category"], *row.get("also", ())] if row["variant"] == "violation" else []


def _repair(columns: dict[str, list[str]], task: Task, where: str) -> None:
    """Mend rows that break a constraint, within their block: by a swap that suits both rows (shares stay), else by a draw."""
    if not task.constraints:
        return
    for number in range(len(next(iter(columns.values()), ()))):
        for attempt in range(20):  # mending one constraint may break another
            row = {name: column[number] for name, column in columns.items()}
            name = next(filter(None, (c.broken(row) for c in task.constraints)), None)
            if name is None:
                break
            block = range(number - number % _BLOCK, min(len(columns[name]), number - number % _BLOCK + _BLOCK))
            for other in shuffled(block, f"{where}/{number}/{attempt}"):
                theirs = {n: column[other] for n, column in columns.items()}
                swapped = ({**row, name: theirs[name]}, {**theirs, name: row[name]})
                if not any(c.broken(r) for c in task.constraints for r in swapped):
                    columns[name][number], columns[name][other] = theirs[name], row[name]
                    break
            else:
                values = list(task.attributes[name])
                columns[name][number] = values[draw(f"{where}/{number}/{attempt}/{name}") % len(values)]
        else:
            raise ValueError(f"task {task.id}: its constraints leave no choice of attributes near {row}; loosen one in task.yaml")


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


def count(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Rows by class: each category's violations, and the compliant ones together."""
    return dict(collections.Counter(r["category"] if r["variant"] == "violation" else "compliant" for r in rows))


class Counts:
    """Rows counted as they pass: by class, by split, and by class x attribute."""

    def __init__(self):
        self.rows = 0
        self.by_class: collections.Counter = collections.Counter()
        self.by_split: collections.Counter = collections.Counter()
        self.by_attribute: dict[str, dict[str, collections.Counter]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        self.by_class[row["category"] if row["variant"] == "violation" else "compliant"] += 1
        self.by_split[row["split"]] += 1
        for name, value in row["attributes"].items():
            cells = self.by_attribute.setdefault(name, {}).setdefault(value, collections.Counter())
            cells[f"{row['category']}/{row['variant']}"] += 1

    def passing(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            self.add(row)
            yield row

    def summary(self) -> dict[str, Any]:
        cells = {n: {v: dict(c) for v, c in values.items()} for n, values in self.by_attribute.items()}
        return {"rows": self.rows, "by_class": dict(self.by_class), "by_split": dict(self.by_split), "by_attribute": cells}


def split_scenarios(
    scenarios: Mapping[str, Sequence[Mapping[str, str]]], *, dev: int, seed: int
) -> dict[str, dict[str, list[Mapping[str, str]]]]:
    """Put `dev` scenarios of each category aside for dev; every teacher of a plan shares the result."""
    found: dict[str, dict[str, list[Mapping[str, str]]]] = {"dev": {}, "train": {}}
    for category, items in scenarios.items():
        order = shuffled(sorted(items, key=lambda s: s["id"]), f"{seed}/scenarios/{category}")
        found["dev"][category], found["train"][category] = order[:dev], order[dev:]
    return found
