"""Packing into fixed rows, and the shard folders that hold them."""

import json

import numpy as np
import pytest

from swallow_jax.data import packing, shards

BOS, EOS, PAD = 1, 2, 0
IDENTITY = {"tokenizer_sha256": "a" * 64, "vocab_size": 100}


def pack(documents, row_length):
    return list(packing.pack_documents(documents, row_length=row_length, bos_id=BOS, eos_id=EOS, pad_id=PAD))


def literal(rows):
    return [(row.tokens.tolist(), row.segments.tolist(), row.weights.tolist()) for row in rows]


def test_documents_are_concatenated_and_cut_at_the_row_border():
    first, second = literal(pack([[11, 12], [21, 22, 23], [31]], row_length=8))
    assert first == (
        [1, 11, 12, 2, 1, 21, 22, 23],
        [1, 1, 1, 1, 2, 2, 2, 2],
        [0, 1, 1, 1, 0, 1, 1, 1],
    )
    assert second == (  # the EOS that was cut off follows nothing in its row: an input, no target
        [2, 1, 31, 2, 0, 0, 0, 0],
        [1, 2, 2, 2, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
    )


def test_a_document_longer_than_rows_goes_on_as_the_first_segment():
    rows = literal(pack([list(range(10, 19))], row_length=4))
    assert [row[0] for row in rows] == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 2, 0]]
    assert [row[1] for row in rows] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert [row[2] for row in rows] == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]


def test_no_token_is_lost_and_only_the_last_row_is_padded():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 100, rng.integers(0, 40)).tolist() for _ in range(50)]
    rows = pack(documents, row_length=16)
    stream = [token for document in documents if document for token in [BOS, *document, EOS]]
    tokens = np.concatenate([row.tokens[row.segments > 0] for row in rows])
    assert tokens.tolist() == stream
    assert all((row.segments > 0).all() for row in rows[:-1])


def test_without_a_bos_token_the_first_token_is_no_target():
    (row,) = packing.pack_documents([[5, 6]], row_length=4, bos_id=None, eos_id=EOS, pad_id=PAD)
    assert (row.tokens.tolist(), row.weights.tolist()) == ([5, 6, 2, 0], [0, 1, 1, 0])


def sample(length, first=10):
    return list(range(first, first + length)), [0.0] + [1.0] * (length - 1)


def test_samples_go_where_they_leave_least_room_and_are_never_split():
    rows, dropped = packing.pack_samples(
        [sample(3, 30), sample(6, 10), sample(5, 20), sample(2, 40)], row_length=8, pad_id=PAD, too_long="error"
    )
    assert dropped == []
    assert [row.tokens.tolist() for row in rows] == [[10, 11, 12, 13, 14, 15, 40, 41], [20, 21, 22, 23, 24, 30, 31, 32]]
    assert [row.segments.tolist() for row in rows] == [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]]


def test_sample_weights_travel_with_their_tokens():
    (row,), _ = packing.pack_samples([([7, 8, 9, 4], [1.0, 0.0, 1.0, 1.0])], row_length=6, pad_id=PAD, too_long="error")
    assert row.weights.tolist() == [0, 0, 1, 1, 0, 0]  # the first token follows nothing, whatever its weight


def test_every_sample_lands_once_in_one_piece():
    rng = np.random.default_rng(0)
    samples = [sample(int(n), first=1000 * i) for i, n in enumerate(rng.integers(1, 33, 200), start=1)]
    rows, _ = packing.pack_samples(samples, row_length=32, pad_id=PAD, too_long="error")
    found = [row.tokens[row.segments == s].tolist() for row in rows for s in range(1, row.segments.max() + 1)]
    assert sorted(found) == sorted(ids for ids, _ in samples)
    assert len(rows) <= 11 / 9 * sum(len(ids) for ids, _ in samples) / 32 + 1  # the proven bound (Johnson 1974)


def test_a_sample_longer_than_a_row_is_an_error_or_a_counted_drop():
    samples = [sample(3), sample(9), sample(4)]
    with pytest.raises(ValueError, match="1 samples exceed row_length=8, the first is number 1 with 9 tokens"):
        packing.pack_samples(samples, row_length=8, pad_id=PAD, too_long="error")
    rows, dropped = packing.pack_samples(samples, row_length=8, pad_id=PAD, too_long="drop")
    assert (len(rows), dropped) == (1, [1])
    with pytest.raises(ValueError, match="too_long='cut' is unknown"):
        packing.pack_samples(samples, row_length=8, pad_id=PAD, too_long="cut")


def write(folder, rows, rows_per_shard=2, **changes):
    with shards.ShardWriter(folder, row_length=8, rows_per_shard=rows_per_shard, **(IDENTITY | changes)) as writer:
        writer.write(rows)
        writer.add_source("s", documents=3, tokens=12)
    return folder


ROWS = pack([[n, n + 1, n + 2] for n in range(10, 60, 5)], row_length=8)


@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 100])
def test_rows_come_back_as_they_went_in(tmp_path, rows_per_shard):
    opened = shards.open_shards(write(tmp_path / "a", ROWS, rows_per_shard), verify_sha256=True)
    assert literal(opened[i] for i in range(len(opened))) == literal(ROWS)
    with pytest.raises(IndexError):
        opened[len(ROWS)]


def test_index_says_what_the_rows_hold(tmp_path):
    index = shards.read_index(write(tmp_path / "a", ROWS))
    assert {name: index[name] for name in ("format_version", "rows", "row_length", "tokens", "vocab_size", "shards")} == {
        "format_version": 1,
        "rows": 7,
        "row_length": 8,
        "tokens": 50,  # ten documents of three, each with BOS and EOS
        "vocab_size": 100,
        "shards": [2, 2, 2, 1],
    }
    assert index["targets"] == sum(int((row.weights > 0).sum()) for row in ROWS)
    assert index["sources"] == {"s": {"documents": 3, "tokens": 12}}


def test_a_failed_write_leaves_no_folder(tmp_path):
    def breaking():
        yield ROWS[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a", breaking())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_is_replaced_and_a_foreign_folder_is_not(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "00000.tokens.bin").write_bytes(b"half")
    assert shards.read_index(write(tmp_path / "a", ROWS))["rows"] == 7
    assert shards.read_index(write(tmp_path / "a", ROWS[:2]))["rows"] == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no shards"):
        write(tmp_path / "b", ROWS)
    assert (tmp_path / "b" / "thesis.txt").read_text() == "precious"


def test_damage_is_noticed(tmp_path):
    folder = write(tmp_path / "a", ROWS)
    path = folder / "00001.segments.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"00001.segments.bin has 30 bytes, its index says 32"):
        shards.open_shards(folder)
    path.write_bytes(whole[:-2] + b"\xff\xff")
    shards.open_shards(folder)
    with pytest.raises(ValueError, match=r"00001.segments.bin has sha256"):
        shards.open_shards(folder, verify_sha256=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"None bytes|missing"):
        shards.open_shards(folder)


def test_what_is_no_shard_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no index.json"):
        shards.open_shards(tmp_path)
    folder = write(tmp_path / "a", ROWS)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        shards.open_shards(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        shards.open_shards(folder)
    with pytest.raises(ValueError, match="holds no rows"):
        shards.open_shards(write(tmp_path / "empty", []))


def test_ids_beyond_the_vocabulary_are_refused_at_writing(tmp_path):
    with pytest.raises(ValueError, match="token id 57 in a vocabulary of 57"):
        write(tmp_path / "a", ROWS, vocab_size=57)


def test_another_tokenizer_or_too_small_an_embedding_is_refused(tmp_path):
    index = shards.read_index(write(tmp_path / "a", ROWS))
    shards.check_tokenizer(index, tokenizer_sha256="a" * 64, vocab_size=128)  # a padded embedding is fine
    with pytest.raises(ValueError, match="has 100 entries, the model's embedding 99"):
        shards.check_tokenizer(index, tokenizer_sha256="a" * 64, vocab_size=99)
    with pytest.raises(ValueError, match=r"made with tokenizer aaaaaaaaaaaa..., the model brings bbbb"):
        shards.check_tokenizer(index, tokenizer_sha256="b" * 64, vocab_size=100)


def test_hold_out_takes_the_share_keeps_twins_together_and_ignores_order():
    keys = [f"text {i}" for i in range(100)] + ["text 3", "text 4"]
    held = shards.hold_out(keys, share=0.1, seed=0)
    chosen = {key for key, is_held in zip(keys, held, strict=True) if is_held}
    assert len(chosen) == 10
    assert held[3] == held[100] and held[4] == held[101]
    turned = shards.hold_out(keys[::-1], share=0.1, seed=0)
    assert turned[::-1] == held
    assert shards.hold_out(keys, share=0.1, seed=1) != held


def test_hold_out_of_a_tiny_corpus_leaves_something_on_both_sides():
    assert sorted(shards.hold_out(["a", "b"], share=0.01, seed=0)) == [False, True]
    assert sorted(shards.hold_out(["a", "b"], share=0.99, seed=0)) == [False, True]
    assert shards.hold_out(["a", "b"], share=0.0, seed=0) == [False, False]
    with pytest.raises(ValueError, match="single document cannot be split"):
        shards.hold_out(["a", "a"], share=0.1, seed=0)
    with pytest.raises(ValueError, match="share 1"):
        shards.hold_out(["a", "b"], share=1, seed=0)


def test_a_kill_while_an_older_folder_gives_way_leaves_it_whole_or_away(tmp_path, monkeypatch):
    """Renamed aside before it is removed: what stands under the folder's name is never half a folder."""
    one = np.zeros(4, np.uint32)
    row = packing.Row(one, np.ones(4, np.uint16), np.ones(4, np.float16))

    def write():
        with shards.ShardWriter(tmp_path / "a", row_length=4, rows_per_shard=2, **IDENTITY) as writer:
            writer.write([row])

    write()
    real = shards.shutil.rmtree

    def killed(path, **settings):
        assert path != tmp_path / "a"
        if path.name == "a.old" and path.exists():
            raise KeyboardInterrupt
        real(path, **settings)

    monkeypatch.setattr(shards.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write()
    monkeypatch.undo()
    assert len(shards.open_shards(tmp_path / "a", verify_sha256=True)) == 1
    write()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
