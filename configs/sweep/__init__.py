"""Sets of overrides by name, and three ways to combine them: what the `sweep()` of a config returns.

    def sweep():
        return product(axis("sft.optim.learning_rate", (1e-3, 3e-3), name="rate"), axis("sft.data.seed", (0, 1, 2), name="seed"))

gives six arms, "rate=0.001,seed=0" and so on, each with its overrides {"sft.optim.learning_rate": 0.001, "sft.data.seed": 0}.
A set is a plain dict: arm -> {field: value}. Arms that differ in an axis named `seed` alone are repetitions of one arm.
"""

import itertools
from collections.abc import Sequence
from typing import Any

Arms = dict[str, dict[str, Any]]


def axis(field: str, values: Sequence[Any], *, name: str) -> Arms:
    """One arm a value of this field, called NAME=VALUE."""
    return chain(*({f"{name}={value}": {field: value}} for value in values))


def product(*sets: Arms) -> Arms:
    """Every choice of one arm from each set, the last set fastest."""
    return chain(*(_joined(choice) for choice in itertools.product(*(arms.items() for arms in sets))))


def zipped(*sets: Arms) -> Arms:
    """The first arms of all sets together, then the second ones; ValueError for sets of different lengths."""
    if len({len(arms) for arms in sets}) > 1:
        raise ValueError(f"zipped sets must be equally long, these have {', '.join(str(len(arms)) for arms in sets)} arms")
    return chain(*(_joined(choice) for choice in zip(*(arms.items() for arms in sets), strict=True)))


def chain(*sets: Arms) -> Arms:
    """The arms of all sets, one set after the other; ValueError for a name that occurs twice."""
    found: Arms = {}
    for arms in sets:
        if twice := found.keys() & arms.keys():
            raise ValueError(f"two arms are called {sorted(twice)[0]!r}; give an axis another name")
        found |= arms
    return found


def _joined(choice: Sequence[tuple[str, dict[str, Any]]]) -> Arms:
    name = ",".join(part for part, _ in choice)
    overrides: dict[str, Any] = {}
    for part, fields in choice:
        if twice := overrides.keys() & fields.keys():
            raise ValueError(f"arm {name}: {part!r} sets {sorted(twice)[0]} a second time")
        overrides |= fields
    return {name: overrides}
