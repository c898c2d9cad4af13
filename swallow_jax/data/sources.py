"""Where the rows of a batch come from, as a pure function of the step: for metrics of each source, and to name rows in a report.

A folder that experiments.prepare wrote from documents says in its index in which row each source begins; a row counts for the
source with which it begins. Of other folders (chat samples, packed longest first) the folder is the source.
"""

import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swallow_jax.data import loader, shards


class Sources:
    """The sources of a mixture: `names`, and which of them each row of a batch is from."""

    def __init__(self, mixture: loader.Mixture, *, batch_size: int, seed: int):
        self._places = loader.row_places(mixture, batch_size=batch_size, seed=seed)
        self._folders = [str(folder) for folder, _ in mixture]
        self._begins: list[list[tuple[int, int]]] = []  # of each folder: (first row, number of the source)
        names: list[str] = []
        for folder in self._folders:
            told = shards.read_index(folder)["sources"]
            label, first = Path(folder).parent.name, len(names)
            if told and all("first_row" in counts for counts in told.values()):
                order = sorted(told, key=lambda source: told[source]["first_row"])
                names += [f"{label}/{source}" for source in order]
                self._begins.append([(told[source]["first_row"], first + i) for i, source in enumerate(order)])
            else:
                names.append(label)
                self._begins.append([(0, first)])
        # Two folders may bear one name.
        self.names = tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))

    def numbers(self, step: int) -> list[int]:
        """The source of each row of batch `step`, as a place in `names`."""
        return [self._number(part, row) for part, row in self._places(step)]

    def describe(self, step: int) -> list[str]:
        """Each row of batch `step`: its folder, its number there, its source."""
        return [f"{self._folders[p]} row {row} [{self.names[self._number(p, row)]}]" for p, row in self._places(step)]

    def _number(self, part: int, row: int) -> int:
        begins = self._begins[part]
        return begins[max(0, bisect.bisect_right(begins, row, key=lambda begin: begin[0]) - 1)][1]

    def annotate(
        self, batches: Iterator[dict[str, np.ndarray]], *, start_step: int, rows: list[int], byte_lengths: np.ndarray
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches from `start_step` on with `sources` and `bytes` (of each token's text), both [len(rows), T]."""
        for step, batch in enumerate(batches, start_step):
            numbers = self.numbers(step)
            own = np.array([numbers[i] for i in rows], np.int32)[:, None]
            yield batch | {
                "sources": np.broadcast_to(own, batch["tokens"].shape),
                "bytes": byte_lengths[batch["tokens"]],
            }
