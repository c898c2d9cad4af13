"""Token sequences into rows of fixed length whose documents stay isolated.

A row is three arrays of the same length T: `tokens`, `segments` (0 = padding, 1, 2, ... = document in the row; attention
never crosses a segment border) and `weights` (the loss weight of the token *as a target*). The first token of every
segment has weight 0, because nothing in its row precedes it.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_SEGMENTS = np.iinfo(np.uint16).max


class Row(NamedTuple):
    """One packed row; every array has shape [T]."""

    tokens: np.ndarray  # uint32
    segments: np.ndarray  # uint16
    weights: np.ndarray  # float16


class _OpenRow:
    """A row being filled from the left."""

    def __init__(self, row_length: int, pad_id: int):
        self.row = Row(
            np.full(row_length, pad_id, np.uint32),
            np.zeros(row_length, np.uint16),
            np.zeros(row_length, np.float16),
        )
        self.used = 0
        self.segment = 0

    @property
    def free(self) -> int:
        full = self.segment == MAX_SEGMENTS
        return 0 if full else len(self.row.tokens) - self.used

    def append(self, tokens: np.ndarray, weights: np.ndarray | float) -> None:
        span = slice(self.used, self.used + len(tokens))
        self.segment += 1
        self.row.tokens[span] = tokens
        self.row.segments[span] = self.segment
        self.row.weights[span] = weights
        self.row.weights[self.used] = 0  # nothing precedes it: an input, never a target
        self.used += len(tokens)


def pack_documents(
    documents: Iterable[Sequence[int]],
    *,
    row_length: int,
    bos_id: int | None,
    eos_id: int,
    pad_id: int,
) -> Iterator[Row]:
    """Concatenate documents (BOS before, EOS after each) and cut the stream every `row_length` tokens.

    No token is lost and only the last row is padded. A document cut at a row border goes on as segment 1 of the next row;
    its attention and positions start anew there.
    """
    before = np.array([] if bos_id is None else [bos_id], np.uint32)
    after = np.array([eos_id], np.uint32)
    current = _OpenRow(row_length, pad_id)
    for document in documents:
        if not len(document):
            continue
        rest = np.concatenate([before, np.asarray(document, np.uint32), after])
        while len(rest):
            head, rest = rest[: current.free], rest[current.free :]
            current.append(head, 1)
            if not current.free:
                yield current.row
                current = _OpenRow(row_length, pad_id)
    if current.used:
        yield current.row


def pack_samples(
    samples: Sequence[tuple[Sequence[int], Sequence[float]]],
    *,
    row_length: int,
    pad_id: int,
    too_long: str,
) -> tuple[list[Row], list[int]]:
    """Place whole samples (token ids, target weights), longest first, each where it leaves least room.

    A sample is never split. One longer than `row_length` is an error (`too_long='error'`) or left out ('drop').
    Returns the rows and the indices of the samples left out.
    """
    if too_long not in ("error", "drop"):
        raise ValueError(f"too_long={too_long!r} is unknown; use 'error' or 'drop'")
    dropped = [i for i, (ids, _) in enumerate(samples) if len(ids) > row_length]
    if dropped and too_long == "error":
        raise ValueError(
            f"{len(dropped)} samples exceed row_length={row_length}, the first is number {dropped[0]} with "
            f"{len(samples[dropped[0]][0])} tokens; raise row_length or set too_long='drop'"
        )
    order = sorted(
        (i for i, (ids, _) in enumerate(samples) if 0 < len(ids) <= row_length),
        key=lambda i: -len(samples[i][0]),  # stable: equal lengths keep their order
    )
    rows: list[_OpenRow] = []
    rooms: list[tuple[int, int]] = []  # (free places, row number), sorted: best fit by bisection
    for i in order:
        ids, weights = samples[i]
        if len(ids) != len(weights):
            raise ValueError(f"sample {i} has {len(ids)} tokens and {len(weights)} weights")
        place = bisect.bisect_left(rooms, (len(ids), -1))
        if place == len(rooms):
            rows.append(_OpenRow(row_length, pad_id))
            number = len(rows) - 1
        else:
            number = rooms.pop(place)[1]
        rows[number].append(np.asarray(ids, np.uint32), np.asarray(weights, np.float16))
        if rows[number].free:
            bisect.insort(rooms, (rows[number].free, number))
    return [row.row for row in rows], dropped
