"""Weights on disk, read and written in row blocks: safetensors both ways, the arrays of an Orbax checkpoint in.

A model is a dict of `Tensor`s by HF name; nothing is read before its rows are asked for, so a checkpoint of any size passes
through a few blocks. What comes from a file is not trusted: a broken header, a link out of the folder or a pickle is
refused by name, and nothing in a checkpoint is ever run.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from swallow_jax import run

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# A block is what one read, conversion or write holds; a few are alive at a time, whatever the model's size. Memory of this
# size is kept by malloc and used again; larger pieces come fresh from the kernel each time, which costs more than the copying.
BLOCK_BYTES = 1 << 24
_LARGEST_BLOCK = 1 << 28  # where an Orbax chunk holds more rows than a block, a block is a chunk's rows, up to this
_AHEAD_BYTES = 1 << 28  # read ahead of the writer
_THREADS = 4
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An array by its rows (of axis 0)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]  # rows [first, last), as a view where that is possible
    fill: Callable[[int, int, np.ndarray], None] | None = None  # the same into memory that is given, if that costs less
    align: int = 1  # rows that the store keeps together

    def __call__(self) -> np.ndarray:
        """The whole array (of a safetensors file: a view into its memory map)."""
        return self.rows(0, self.shape[0])

    def read(self, first: int, last: int, out: np.ndarray) -> None:
        """Rows [first, last) into `out`, which has their shape and dtype."""
        if self.fill is not None:
            self.fill(first, last, out)
        else:
            out[...] = self.rows(first, last)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def blocks(self, itemsize: int = 1) -> list[tuple[int, int]]:
        """Row ranges of at most BLOCK_BYTES (of what the store keeps together, where that is more)."""
        row = max(1, max(itemsize, self.dtype.itemsize) * math.prod(self.shape[1:]))
        step = max(1, BLOCK_BYTES // row)
        if self.align > 1 and self.align * row <= _LARGEST_BLOCK:
            step = max(self.align, step // self.align * self.align)
        return [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]


Tensors = dict[str, Tensor]


# Safetensors in.


def open_tensors(folder: str | os.PathLike) -> Tensors:
    """All tensors of a folder: model.safetensors, or the shards that the index names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    check_links(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_index(index)
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = None, ["model.safetensors"]
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles and not (folder / files[0]).is_file():
            raise ValueError(
                f"{folder} holds {pickles[0]}, a pickle, which may run code when it is opened, and no safetensors;"
                " convert it where you trust it, or take the safetensors revision"
            )
    tensors: Tensors = {}
    for name in files:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"weight file {file} is missing; download it again (only safetensors are read)")
        for tensor, reader in read_safetensors(file).items():
            if tensor in tensors or (weight_map is not None and weight_map.get(tensor) != name):
                raise ValueError(f"{file}: tensor {tensor} is not where the index says, or stands twice; download it again")
            tensors[tensor] = reader
    if weight_map is not None and (lost := sorted(set(weight_map) - set(tensors))):
        raise ValueError(f"{index}: {_short(lost[0])} is in the index but in no file; download it again")
    return tensors


def check_links(folder: str | os.PathLike) -> None:
    """Refuse links that lead out of the folder; those of the Hugging Face cache, from snapshots/ to blobs/, are inside."""
    folder = Path(folder)
    real = folder.resolve()
    homes = [real]
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        homes.append(real.parent.parent / "blobs")
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{file} is a link out of the folder (to {file.resolve()}); put the file itself there")


def read_safetensors(file: Path) -> Tensors:
    """One file's tensors: views into a memory map, after every entry of the header was checked against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8 or length > 100_000_000:
            raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes); download it again")
        header = _parse(f.read(length), f"{file}: the header")
    start, end = 8 + length, 0
    data = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    header.pop("__metadata__", None)
    spans = {name: (name, *_entry(file, name, entry)) for name, entry in header.items()}
    tensors: Tensors = {}
    for name, dtype, shape, first, last in sorted(spans.values(), key=lambda span: span[3:]):
        if start + last > size:
            raise ValueError(f"{file}: truncated ({name} ends at byte {start + last}, the file at {size}); download it again")
        if first != end:
            raise ValueError(f"{file}: {name} begins at byte {first} of the data, {end} is next; the header is broken")
        end = last
        whole = functools.partial(_view, data, start + first, start + last, dtype, shape)
        stride = dtype.itemsize * math.prod(shape[1:])
        fill = functools.partial(_pread, file, start + first, stride)
        tensors[name] = Tensor(shape=shape, dtype=dtype, rows=functools.partial(_rows_of, whole), fill=fill)
    if start + end != size:
        raise ValueError(f"{file}: {size - start - end} bytes belong to no tensor; the header is broken, download it again")
    return {name: tensors[name] for name in header}


def _entry(file: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte) of a header's entry."""
    if not name.isprintable() or len(name) > 200:
        raise ValueError(f"{file}: a tensor's name is not printable or longer than 200 characters; the header is broken")
    if not isinstance(entry, dict):
        raise ValueError(f"{file}: {name} is described by {type(entry).__name__}, an object is wanted; the header is broken")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{file}: {name} has dtype {_short(code)}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{file}: {name} has shape {_short(shape)} and offsets {_short(offsets)}; both are lists of natural numbers,"
            " the header is broken"
        )
    dtype, (first, last) = DTYPES[code], offsets
    if last - first != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{file}: {name} of shape {_short(shape)} does not fit its {last - first} bytes; the header is broken")
    return dtype, tuple(shape), first, last


def _read_index(index: Path) -> dict[str, str]:
    weight_map = _parse(index.read_bytes(), f"{index}: truncated, or no index of weights; it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: truncated, or no index of weights; download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise ValueError(
                f"{index}: {_short(tensor)} is said to lie in {_short(name)}; safetensors files of this folder alone are read"
            )
    return weight_map


def _parse(blob: bytes, what: str) -> dict[str, Any]:
    """A JSON object; raises ValueError for anything else, a name given twice included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        value = json.loads(blob.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also not UTF-8, numbers of thousands of digits, endless nesting
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split("\n")[0]
        raise ValueError(f"{what} is not JSON ({reason}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object; download it again")
    return value


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number of more than 64 bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _view(data: np.ndarray, first: int, last: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return data[first:last].view(dtype).reshape(shape)


def _rows_of(whole: Callable[[], np.ndarray], first: int, last: int) -> np.ndarray:
    value = whole()
    return value[first:last] if value.ndim else value


def _pread(file: Path, start: int, stride: int, first: int, last: int, out: np.ndarray) -> None:
    left, offset = memoryview(_bytes(out)), start + first * stride
    with open(file, "rb", buffering=0) as f:
        while left:
            if (got := os.preadv(f.fileno(), [left], offset)) == 0:
                raise ValueError(f"{file}: truncated while it was read; download it again")
            left, offset = left[got:], offset + got


# Arrays of a checkpoint (Orbax) in.


def best_step(path: str | os.PathLike, which: str) -> Path:
    """The step's folder under a run's checkpoints/: the `last`, or the `best` by held-out loss (the earlier of equals).

    Steps saved without a held-out loss, because somebody asked to stop, are the best only where there is no other.
    """
    root = Path(path) / "checkpoints"
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r}; known: best, last")
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"{root} holds no whole checkpoint; train the run first")
    if which == "last":
        return root / str(steps[-1])
    losses = {s: json.loads((root / str(s) / "data" / "metadata").read_text())["heldout_loss"] for s in steps}
    measured = [s for s in steps if losses[s] is not None] or steps[-1:]
    return root / str(min(measured, key=lambda s: (losses[s], s)))


def open_checkpoint(step: Path, keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """TensorStore arrays of a step's parameters, opened but not read; `step` is a folder of a run's checkpoints/.

    Chunks that were read stay in a cache of one block, for rows of many layers kept in one chunk (small models).
    """
    import tensorstore

    state = (step / "state").resolve()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _LARGEST_BLOCK}})
    arrays = {}
    for key in keys:
        store = {"driver": "ocdbt", "base": f"file://{state}/", "path": ".".join(("params", *key)) + "/"}
        try:
            arrays[key] = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=context).result()
        except ValueError as error:
            raise ValueError(f"{step} holds no parameter {'.'.join(key)} ({str(error).splitlines()[0][:120]})") from None
    return arrays


def stored_tensor(array: Any, layer: int | None) -> Tensor:
    """One layer of a stacked TensorStore array, or all of an array that has no layers."""
    view = array if layer is None else array[layer]
    chunk = array.chunk_layout.read_chunk.shape[0 if layer is None else 1]
    return Tensor(
        shape=tuple(view.shape),
        dtype=np.dtype(view.dtype.numpy_dtype),
        rows=lambda first, last: view[first:last].read().result(),
        fill=functools.partial(_fill_stored, view),
        align=chunk or 1,
    )


def _fill_stored(view: Any, first: int, last: int, out: np.ndarray) -> None:
    import tensorstore

    tensorstore.array(out).write(view[first:last][tensorstore.d[0].translate_to[0]]).result()


def save_args(tree: Any) -> Any:
    """How Orbax should cut large arrays: layer by layer, in chunks of a block, so that they can be read in row blocks.

    Left alone it keeps up to 2 GiB in one compressed chunk, which must be decoded whole for a single row.
    """
    import orbax.checkpoint as ocp

    def cut(x: Any) -> Any:
        if math.prod(x.shape) * np.dtype(x.dtype).itemsize <= BLOCK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES, shard_axes=(0,) if len(x.shape) == 3 else ())

    return jax.tree.map(cut, tree)


# Blocks.


def convert(value: np.ndarray, out: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # values that do not fit become infinite
        out[...] = value
    if out.dtype == np.float16 and value.dtype != np.float16 and np.isinf(out).any() and np.isfinite(value).all():
        raise ValueError(f"{name} holds values beyond float16's range; take bfloat16 or float32")


def check_finite(value: np.ndarray, name: str) -> None:
    """Raise when a block holds NaN or infinity: without its sign, such a number's bits are those of infinity or more."""
    bits = np.dtype(f"u{value.dtype.itemsize}")
    flat, infinity = np.ascontiguousarray(value).reshape(-1).view(bits), int(np.array(np.inf, value.dtype).view(bits))
    mask = bits.type((1 << 8 * bits.itemsize - 1) - 1)
    piece = 1 << 17  # numbers; what is masked stays in the processor's cache
    for first in range(0, flat.size, piece):
        if int((flat[first : first + piece] & mask).max()) >= infinity:
            raise ValueError(f"{name} holds NaN or infinity; the checkpoint is broken, take another or an earlier step")


# Out.


def stream(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, np.dtype], *, check: bool, threads: bool
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, first row, block) of all tensors in the order given, each block converted to its tensor's dtype in `kinds`.

    A block's memory is used again once the next one is asked for.
    """
    memory = _Memory()

    def read(name: str, first: int, last: int) -> np.ndarray:
        tensor, kind = tensors[name], kinds[name]
        shape = (last - first, *tensor.shape[1:])
        out = memory.take(shape, kind)
        if tensor.dtype == kind:
            tensor.read(first, last, out)
        else:
            raw = memory.take(shape, tensor.dtype)
            tensor.read(first, last, raw)
            convert(raw, out, name)
            memory.give(raw)
        if check:
            check_finite(out, name)
        return out

    jobs = [(name, first, last) for name, t in tensors.items() for first, last in t.blocks(kinds[name].itemsize)]
    calls = [functools.partial(read, *job) for job in jobs]
    sizes = [tensors[name].nbytes * (last - first) // tensors[name].shape[0] for name, first, last in jobs]
    blocks = ahead(zip(sizes, calls, strict=True)) if threads else (call() for call in calls)
    for (name, first, _), block in zip(jobs, blocks, strict=True):
        yield name, first, block
        memory.give(block)


class _Memory:
    """Pieces of memory that are given back and used again."""

    def __init__(self):
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = dtype.itemsize * math.prod(shape)
        with self._lock:
            fitting = [i for i, piece in enumerate(self._free) if size <= piece.nbytes]
            piece = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes)) if fitting else None
            if piece is None and self._free:
                self._free.pop(0)  # too small for what comes now
        piece = np.empty(max(size, 1), np.uint8) if piece is None else piece
        return piece[:size].view(dtype).reshape(shape)

    def give(self, array: np.ndarray) -> None:
        while array.base is not None:
            array = array.base
        with self._lock:
            self._free.append(array)


def ahead(jobs: Iterable[tuple[int, Callable[[], Any]]]) -> Iterator[Any]:
    """Results of (bytes, call) in order; threads work ahead of the reader by no more than a few blocks' bytes."""
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    held = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for size, call in jobs:
                while waiting and held + size > _AHEAD_BYTES:
                    cost, future = waiting.popleft()
                    yield future.result()
                    held -= cost
                    del future
                waiting.append((size, pool.submit(call)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:  # the reader may have stopped early
            for _, future in waiting:
                future.cancel()


def sha256(tensors: Mapping[str, Tensor], *, threads: bool = True) -> str:
    """SHA-256 over the tensors in sorted name order, each as name, shape, dtype and row-major bytes."""
    ordered = dict(sorted(tensors.items()))
    digest = Digest(ordered, {name: t.dtype for name, t in ordered.items()})
    for name, first, block in stream(ordered, digest.kinds, check=False, threads=threads):
        digest.update(name, first, block)
    return digest.hexdigest()


class Digest:
    """`sha256` of tensors while they pass by, in sorted name order."""

    def __init__(self, tensors: Mapping[str, Tensor], kinds: Mapping[str, np.dtype]):
        self.tensors, self.kinds, self._hash = tensors, kinds, hashlib.sha256()

    def update(self, name: str, first: int, block: np.ndarray) -> None:
        if first == 0:
            self._hash.update(f"{name} {list(self.tensors[name].shape)} {self.kinds[name].name}\n".encode())
        self._hash.update(_bytes(block).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, np.dtype],
    *,
    max_shard_bytes: int,
    check: bool,
    digest: bool,
    threads: bool,
) -> str | None:
    """Write model.safetensors, or model-0000x-of-n.safetensors and an index; returns `sha256` of what was written.

    A file is on disk (fsync) when this returns; it is flushed while the next one is being written.
    """
    ordered = dict(sorted(tensors.items()))
    sizes = {name: kinds[name].itemsize * math.prod(t.shape) for name, t in ordered.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    running = Digest(ordered, kinds) if digest else None
    with contextlib.ExitStack() as stack:
        blocks = stack.enter_context(contextlib.closing(stream(ordered, kinds, check=check, threads=threads)))
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        bar = stack.enter_context(progress(sum(sizes.values()), "writing"))
        flushed = []
        for file, shard in zip(names, shards, strict=True):
            f = stack.enter_context(open(folder / file, "wb", buffering=0))
            _write(f, _header(shard, ordered, kinds, sizes))
            left = sum(sizes[name] for name in shard)
            while left:
                name, first, block = next(blocks)
                if running:
                    running.update(name, first, block)
                _write(f, _bytes(block).data)
                left -= block.nbytes
                bar.update(block.nbytes)
            flushed.append(flusher.submit(os.fsync, f.fileno()))
        wait_all(flushed)
    if len(shards) > 1:
        weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        run.write_json(folder / "model.safetensors.index.json", index)
    return running.hexdigest() if running else None


def _header(names: Sequence[str], tensors: Mapping[str, Tensor], kinds: Mapping, sizes: Mapping[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        span = [offset, offset + sizes[name]]
        header[name] = {"dtype": CODES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": span}
        offset = span[1]
    blob = json.dumps(header, separators=(",", ":")).encode("utf-8")
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob


def _write(f: Any, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:  # one call writes 2 GiB at most
        left = left[f.write(left) :]


def progress(total: int, what: str) -> Any:
    """A bar of bytes; nothing for less than a second's work, a line now and then where no terminal is."""
    from tqdm import tqdm

    seconds = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=seconds, disable=total < 500_000_000)


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


def wait_all(futures: Iterable[Future]) -> None:
    """Wait for all; the first error cancels what has not begun."""
    futures = list(futures)
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
