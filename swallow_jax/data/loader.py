"""Batches as a pure function of the step.

Grain's MapDataset gives random access to an endless, shuffled, mixed stream of rows, so batch `step` is found without
reading the batches before it, whatever the number of hosts. Host h of H holds rows h*B/H ... (h+1)*B/H of the global
batch: joined in host order they are the same [B, T] arrays for every H.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
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
    host_index: int = 0,
    host_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from `start_step` on, each {tokens, segments, positions, weights} of shape [B / hosts, T].

    `mixture` lists (shard folder, integer weight): of every sum(weights) rows, exactly `weight` come from the folder.
    Each folder is shuffled anew in every epoch. `batch_size` is the global B.
    """
    import grain

    if batch_size % host_count:
        raise ValueError(f"batch_size={batch_size} does not divide over {host_count} hosts")
    local = batch_size // host_count
    rows = _row_stream(mixture, seed)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size + host_index * local
        return collate([rows[first + i] for i in range(local)])

    # Threads only read ahead; the order of an IterDataset over a MapDataset is the index order.
    steps = grain.MapDataset.range(start_step, len(rows) // batch_size).map(batch_at)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _row_stream(mixture: Mixture, seed: int):
    """MapDataset over the endless global sequence of rows; index n is the n-th row trained on."""
    import grain

    _check_mixture(mixture)
    parts = []
    for number, (folder, _) in enumerate(mixture):
        # Own seed for each part, so that equal sizes do not mean equal permutations.
        part_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        source = grain.MapDataset.source(shards.open_shards(folder))
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


def epoch_batches(folder: str | Path, *, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order; the last batch is filled up with empty rows (segments and weights 0)."""
    rows = shards.open_shards(folder)
    for first in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        empty = Row(*(np.zeros_like(column) for column in chunk[0]))
        yield collate(chunk + [empty] * (batch_size - len(chunk)))


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
