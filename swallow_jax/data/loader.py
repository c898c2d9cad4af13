"""Batches as a pure function of the step.

Grain's MapDataset gives random access to an endless, shuffled, mixed stream of rows, so batch `step` is found without
reading the batches before it, whatever the number of processes. A process asks for the rows of the global batch that its
devices hold (`hosts.local_rows`): put in their places they are the same [B, T] arrays for any number of processes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from swallow_jax.data import shards
from swallow_jax.data.packing import Row

Mixture = Sequence[tuple[str | Path, int]]


def open_batches(
    mixture: Mixture,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from `start_step` on, each {tokens, segments, positions, weights} of shape [len(rows), T].

    `mixture` lists (shard folder, integer weight): of every sum(weights) rows, exactly `weight` come from the folder.
    Each folder is shuffled anew in every epoch. `batch_size` is the global B, `rows` the part of each batch that is read (all).
    """
    import grain

    wanted = _wanted(rows, batch_size)
    stream = _row_stream(mixture, seed)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        return collate([stream[step * batch_size + i] for i in wanted])

    # Threads only read ahead; the order of an IterDataset over a MapDataset is the index order.
    steps = grain.MapDataset.range(start_step, len(stream) // batch_size).map(batch_at)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _wanted(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    if rows is None:
        return range(batch_size)
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {list(rows)} are not rows of a batch of {batch_size}")
    return rows


def row_places(mixture: Mixture, *, batch_size: int, seed: int) -> Callable[[int], list[tuple[int, int]]]:
    """step -> (part of the mixture, row in its folder) for each row of that batch of `open_batches`; no row is read."""
    stream = _row_stream(mixture, seed, lambda number, folder: _Places(number, shards.read_index(folder)["rows"]))
    return lambda step: [stream[step * batch_size + i] for i in range(batch_size)]


class _Places:
    """Stands for the rows of a folder where only their numbers are wanted."""

    def __init__(self, part: int, rows: int):
        self.part, self.rows = part, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> tuple[int, int]:
        return self.part, int(i)


def _row_stream(mixture: Mixture, seed: int, open_part=lambda _, folder: shards.open_shards(folder)):
    """MapDataset over the endless global sequence of rows; index n is the n-th row trained on."""
    import grain

    _check_mixture(mixture)
    parts = []
    for number, (folder, _) in enumerate(mixture):
        # Own seed for each part, so that equal sizes do not mean equal permutations.
        part_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        source = grain.MapDataset.source(open_part(number, folder))
        parts.append(source.seed(part_seed).shuffle().repeat())
    return grain.MapDataset.mix(parts, weights=[weight for _, weight in mixture])


def _check_mixture(mixture: Mixture) -> None:
    if not mixture:
        raise ValueError("the data mixture is empty; name at least one (shard folder, weight)")
    for folder, weight in mixture:
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
            raise ValueError(f"mixture weight {weight!r} of {folder} is not a positive integer")
    indices = [shards.read_index(folder) for folder, _ in mixture]
    for field in ("row_length", "tokenizer_sha256"):
        values = {str(index[field]) for index in indices}
        if len(values) > 1:
            raise ValueError(f"the mixture's folders differ in {field}: {sorted(values)}; prepare them alike")


def mixture_sha256(mixture: Mixture) -> str:
    """Identifies what is mixed (contents and weights, not paths); the checkpoint refuses another."""
    _check_mixture(mixture)
    parts = [[shards.read_index(folder), weight] for folder, weight in mixture]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def epoch_batches(folder: str | Path, *, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order; the last batch is filled up with empty rows (segments and weights 0). `rows` as above."""
    stored = shards.open_shards(folder)
    wanted = _wanted(rows, batch_size)
    for first in range(0, len(stored), batch_size):
        empty = Row(*(np.zeros_like(column) for column in stored[first]))
        yield collate([stored[first + i] if first + i < len(stored) else empty for i in wanted])


def collate(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows -> arrays [B, T] in the types the accelerator wants, with positions counted within each segment."""
    tokens, segments, weights = (np.stack(column) for column in zip(*rows, strict=True))
    index = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
    starts = np.zeros(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return {
        "tokens": tokens.astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": np.where(segments > 0, index - first, 0).astype(np.int32),
        "weights": weights.astype(np.float32),
    }
