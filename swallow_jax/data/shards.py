"""Packed rows on disk: raw columns that memory-map, and an index that vouches for them.

    folder/index.json             written last: a folder without it was never finished
    folder/00000.tokens.bin       uint32  [rows, T]
    folder/00000.segments.bin     uint16  [rows, T]
    folder/00000.weights.bin      float16 [rows, T]
    folder/00001. ...             the next `rows_per_shard` rows

Little-endian, row-major, no header: the fastest of the formats measured for random rows.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from swallow_jax.data.packing import Row

FORMAT_VERSION = 1
COLUMNS = {"tokens": "<u4", "segments": "<u2", "weights": "<f2"}


class ShardWriter:
    """Streams rows into `folder`, which appears, whole, when the `with` block ends without an error.

    An older finished shard folder of that name is replaced at that moment; any other folder is refused.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        row_length: int,
        tokenizer_sha256: str,
        vocab_size: int,
        rows_per_shard: int,
    ):
        self.folder = Path(folder)
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        self._row_length, self._rows_per_shard = row_length, rows_per_shard
        self._vocab_size, self._tokenizer_sha256 = vocab_size, tokenizer_sha256
        self._shards: list[int] = []  # rows in each
        self._sha256: dict[str, str] = {}
        self._sources: dict[str, dict] = {}
        self._open: dict[str, tuple] = {}  # column -> (file, name, running hash)
        self._tokens = self._targets = 0

    def __enter__(self) -> "ShardWriter":
        if self.folder.exists() and not (self.folder / "index.json").exists():
            raise ValueError(f"{self.folder} exists and holds no shards; remove it or name another")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if len(row.tokens) != self._row_length:
                raise ValueError(f"row of {len(row.tokens)} tokens, expected {self._row_length}")
            if int(row.tokens.max()) >= self._vocab_size:
                raise ValueError(
                    f"token id {int(row.tokens.max())} in a vocabulary of {self._vocab_size}: "
                    "the rows come from another tokenizer"
                )
            if not self._open or self._shards[-1] == self._rows_per_shard:
                self._next_shard()
            for column, dtype in COLUMNS.items():
                file, _, digest = self._open[column]
                data = np.ascontiguousarray(getattr(row, column), dtype).tobytes()
                file.write(data)
                digest.update(data)
            self._shards[-1] += 1
            self._tokens += int(np.count_nonzero(row.segments))
            self._targets += int(np.count_nonzero(row.weights))

    def add_source(self, source: str, *, documents: int, tokens: int, **more) -> None:
        """Record what a source contributed; `more` may carry its licence, sector, ..."""
        self._sources[source] = {"documents": documents, "tokens": tokens, **more}

    @property
    def rows(self) -> int:
        return sum(self._shards)

    def _next_shard(self) -> None:
        self._close_shard()
        for column in COLUMNS:
            name = f"{len(self._shards):05d}.{column}.bin"
            self._open[column] = ((self._partial / name).open("wb"), name, hashlib.sha256())
        self._shards.append(0)

    def _close_shard(self) -> None:
        for file, name, digest in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._sha256[name] = digest.hexdigest()
        self._open = {}

    def __exit__(self, error, *_) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the first error
                for file, _, _ in self._open.values():
                    file.close()
                shutil.rmtree(self._partial)
            return
        self._close_shard()
        index = {
            "format_version": FORMAT_VERSION,
            "rows": self.rows,
            "row_length": self._row_length,
            "tokens": self._tokens,  # without padding
            "targets": self._targets,  # tokens with a loss weight
            "tokenizer_sha256": self._tokenizer_sha256,
            "vocab_size": self._vocab_size,
            "shards": self._shards,
            "sources": self._sources,
            "sha256": self._sha256,
        }
        with (self._partial / "index.json").open("w", encoding="utf-8") as file:
            json.dump(index, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        # A kill between these lines leaves the old folder whole, or none: never one half removed.
        old = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(self._partial, self.folder)
        shutil.rmtree(old, ignore_errors=True)


def hold_out(keys: Sequence[str], *, share: float, seed: int) -> list[bool]:
    """Which items are held out: those whose keys have the smallest hashes; equal keys stay together.

    At least one key is held out and one is not, where 0 < share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share {share} must lie in [0, 1)")
    if not share:
        return [False] * len(keys)
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    if len(ranked) < 2:
        raise ValueError("a single document cannot be split into train and heldout; set the held-out share to 0")
    held = set(ranked[: min(len(ranked) - 1, max(1, round(share * len(ranked))))])
    return [key in held for key in keys]


def hold_out_ranks(ranks_N2: np.ndarray, among: np.ndarray, *, share: float) -> np.ndarray:
    """`hold_out` for keys that come as the first 16 bytes of their hashes (uint64 [N, 2]); others than `among` never are."""
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share {share} must lie in [0, 1)")
    held = np.zeros(len(ranks_N2), bool)
    if not share or not among.any():
        return held
    places = np.flatnonzero(among)
    kinds, number = np.unique(ranks_N2[places], axis=0, return_inverse=True)  # sorted: the smallest hashes come first
    if len(kinds) < 2:
        raise ValueError("a single document cannot be split into train and heldout; set the held-out share to 0")
    held[places] = number.reshape(-1) < min(len(kinds) - 1, max(1, round(share * len(kinds))))
    return held


class Shards:
    """Random access to the rows of a finished folder: `shards[i]` -> Row."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index = folder, index
        self._ends = np.cumsum(index["shards"], dtype=np.int64)
        self._maps = [
            {
                column: np.memmap(folder / f"{n:05d}.{column}.bin", dtype, "r").reshape(rows, -1)
                for column, dtype in COLUMNS.items()
            }
            for n, rows in enumerate(index["shards"])
        ]

    def __len__(self) -> int:
        return self.index["rows"]

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        local = i - int(self._ends[shard]) + self.index["shards"][shard]
        return Row(*(np.asarray(self._maps[shard][column][local]) for column in COLUMNS))

    def __repr__(self) -> str:  # Grain prints its sources
        return f"Shards({self.folder.name}, rows={len(self)})"


def read_index(folder: str | Path) -> dict:
    """The index of a finished shard folder."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no index.json: make the shards with experiments.prepare")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the shards again") from error
    if index.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {index.get('format_version')}, this code reads {FORMAT_VERSION}; prepare the shards again"
        )
    return index


def open_shards(folder: str | Path, *, verify_sha256: bool = False) -> Shards:
    """Open a finished folder; sizes are always checked, contents where asked (reads every byte)."""
    folder = Path(folder)
    index = read_index(folder)
    if not index["rows"]:
        raise ValueError(f"{folder} holds no rows")
    for number, rows in enumerate(index["shards"]):
        for column, dtype in COLUMNS.items():
            path = folder / f"{number:05d}.{column}.bin"
            expected = rows * index["row_length"] * np.dtype(dtype).itemsize
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                raise ValueError(f"{path} has {size} bytes, its index says {expected}: truncated or missing; prepare it again")
            if verify_sha256:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != index["sha256"][path.name]:
                    raise ValueError(f"{path} has sha256 {found[:12]}..., not the one in its index")
    return Shards(folder, index)


def check_tokenizer(index: dict, *, tokenizer_sha256: str, vocab_size: int) -> None:
    """Refuse shards that another tokenizer made, or whose ids the model's embedding (`vocab_size`) lacks."""
    if index["vocab_size"] > vocab_size:
        raise ValueError(
            f"the shards' tokenizer has {index['vocab_size']} entries, the model's embedding {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    if index["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"the shards were made with tokenizer {index['tokenizer_sha256'][:12]}..., the model brings "
            f"{tokenizer_sha256[:12]}...; prepare the data again with the model's tokenizer"
        )
