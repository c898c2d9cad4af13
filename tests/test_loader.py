"""Batches are a pure function of the step, whatever the number of hosts."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from swallow_jax.data import loader, packing, shards


def make(folder, first, rows, row_length=4, tokenizer="t"):
    """Shards whose row i is [first + i] * row_length, as one segment."""
    with shards.ShardWriter(
        folder, row_length=row_length, tokenizer_sha256=tokenizer, vocab_size=1000, rows_per_shard=3
    ) as writer:
        for i in range(rows):
            tokens = np.full(row_length, first + i, np.uint32)
            writer.write([packing.Row(tokens, np.ones(row_length, np.uint16), np.ones(row_length, np.float16))])
    return folder


def mixture(tmp_path):
    return [(make(tmp_path / "a", 0, 7), 3), (make(tmp_path / "b", 100, 4), 1)]


def order(batches, count):
    """First token of every row of the next `count` batches."""
    return [batch["tokens"][:, 0].tolist() for batch in itertools.islice(batches, count)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_the_order_of_the_data_does_not_change(tmp_path):
    batches = loader.open_batches(mixture(tmp_path), batch_size=4, seed=0, start_step=0)
    # Three rows of a (0-6) to one of b (100-103); another order would orphan every checkpoint in the middle of a run.
    assert order(batches, 4) == [[0, 1, 4, 101], [3, 2, 6, 103], [5, 4, 6, 100], [0, 5, 3, 102]]


def test_a_later_start_gives_the_same_batches(tmp_path):
    mixed = mixture(tmp_path)
    straight = order(loader.open_batches(mixed, batch_size=4, seed=5, start_step=0), 9)
    assert order(loader.open_batches(mixed, batch_size=4, seed=5, start_step=6), 3) == straight[6:]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batch(tmp_path, hosts):
    mixed = mixture(tmp_path)
    settings = {"batch_size": 8, "seed": 1, "start_step": 3}
    whole = order(loader.open_batches(mixed, **settings), 5)
    shares = [range(h * 8 // hosts, (h + 1) * 8 // hosts) for h in range(hosts)]
    parts = [order(loader.open_batches(mixed, **settings, rows=share), 5) for share in shares]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == whole


def test_rows_may_lie_apart_and_repeat_elsewhere(tmp_path):
    """A mesh may give a process rows that are no neighbours, and two processes the same rows (tensor parallel)."""
    mixed = mixture(tmp_path)
    settings = {"batch_size": 8, "seed": 1, "start_step": 3}
    whole = order(loader.open_batches(mixed, **settings), 2)
    apart = order(loader.open_batches(mixed, **settings, rows=(0, 1, 4, 5)), 2)
    assert apart == [[rows[i] for i in (0, 1, 4, 5)] for rows in whole]


def test_an_epoch_is_read_by_rows_too(tmp_path):
    folder = make(tmp_path / "a", 1, 5)
    parts = [[b["tokens"][:, 0].tolist() for b in loader.epoch_batches(folder, batch_size=4, rows=r)] for r in ((0, 1), (2, 3))]
    assert parts == [[[1, 2], [5, 0]], [[3, 4], [0, 0]]]


def test_every_epoch_has_each_row_once_in_its_own_order(tmp_path):
    folder = make(tmp_path / "a", 0, 8)
    batches = loader.open_batches([(folder, 1)], batch_size=2, seed=0, start_step=0)
    first, second, third = (flat(order(batches, 4)) for _ in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(8))
    assert first != second != third


def test_weights_hold_exactly_in_every_window(tmp_path):
    mixed = [(make(tmp_path / "a", 0, 7), 7), (make(tmp_path / "b", 100, 4), 5)]
    rows = flat(order(loader.open_batches(mixed, batch_size=12, seed=0, start_step=0), 20))
    assert [sum(row >= 100 for row in rows[i : i + 12]) for i in range(0, 240, 12)] == [5] * 20


def test_two_folders_of_one_size_are_not_shuffled_alike(tmp_path):
    mixed = [(make(tmp_path / "a", 0, 50), 1), (make(tmp_path / "b", 100, 50), 1)]
    rows = flat(order(loader.open_batches(mixed, batch_size=10, seed=0, start_step=0), 10))
    assert [row for row in rows if row < 100] != [row - 100 for row in rows if row >= 100]


def test_seed_changes_the_order(tmp_path):
    mixed = mixture(tmp_path)
    one, two = (order(loader.open_batches(mixed, batch_size=4, seed=s, start_step=0), 4) for s in (0, 1))
    assert one != two


def test_positions_count_within_segments_and_arrays_fit_the_accelerator():
    row = packing.Row(
        np.array([9, 8, 7, 6, 5, 0, 0], np.uint32),
        np.array([1, 1, 2, 2, 2, 0, 0], np.uint16),
        np.array([0, 1, 0, 1, 1, 0, 0], np.float16),
    )
    batch = loader.collate([row])
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 0, 0]]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "segments": "int32",
        "positions": "int32",
        "weights": "float32",
    }


def test_an_epoch_in_order_ends_with_empty_rows(tmp_path):
    first, second, third = loader.epoch_batches(make(tmp_path / "a", 1, 5), batch_size=2)
    assert [batch["tokens"][:, 0].tolist() for batch in (first, second, third)] == [[1, 2], [3, 4], [5, 0]]
    assert third["weights"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert third["segments"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_mixture_hash_knows_contents_and_weights_but_not_places(tmp_path):
    (a, _), (b, _) = mixture(tmp_path)
    moved = make(tmp_path / "elsewhere", 0, 7)
    assert loader.mixture_sha256([(a, 3), (b, 1)]) == loader.mixture_sha256([(moved, 3), (b, 1)])
    assert len({loader.mixture_sha256(m) for m in ([(a, 3), (b, 1)], [(a, 2), (b, 1)], [(b, 1), (a, 3)], [(a, 3)])}) == 4


def test_a_wrong_mixture_is_named(tmp_path):
    a = make(tmp_path / "a", 0, 7)
    settings = {"batch_size": 4, "seed": 0, "start_step": 0}
    with pytest.raises(ValueError, match="mixture is empty"):
        loader.open_batches([], **settings)
    for weight in (0, -1, 0.5, True):
        with pytest.raises(ValueError, match=f"mixture weight {weight} of .* is not a positive integer"):
            loader.open_batches([(a, weight)], **settings)
    with pytest.raises(ValueError, match=r"differ in row_length: \['4', '8'\]"):
        loader.open_batches([(a, 1), (make(tmp_path / "long", 0, 2, row_length=8), 1)], **settings)
    with pytest.raises(ValueError, match="differ in tokenizer_sha256"):
        loader.open_batches([(a, 1), (make(tmp_path / "other", 0, 2, tokenizer="u"), 1)], **settings)
    for rows in ((), (3, 4), (-1,)):
        with pytest.raises(ValueError, match=r"rows \[.*\] are not rows of a batch of 4"):
            loader.open_batches([(a, 1)], **settings, rows=rows)


def test_importing_the_room_brings_in_neither_grain_nor_jax():
    code = "import sys; from swallow_jax.data import loader, shards, packing, dedup, filters, documents; "
    code += "print(sorted({'grain', 'jax', 'rensa', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
