"""What all readers share: pieces of files, failures with a reason, and opening packed files without falling for bombs."""

import dataclasses
import gzip
import io
import lzma
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

RATIO = 200  # unpacked bytes for one packed: text is packed 3 to 30 times, a bomb a thousand times
ROOM = 64 << 20  # unpacked bytes that are never called a bomb


class Failure(NamedTuple):
    """A document that could not be read: where, a short kind to count by, and a sentence with the remedy."""

    where: str
    kind: str
    words: str


class ReadError(Exception):
    """What ends the reading of a file or of a row."""

    def __init__(self, kind: str, words: str):
        super().__init__(words)
        self.kind, self.words = kind, words


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a source's files are to be read.

    columns: our field -> the file's column or key, for tables and JSON lines: text, id, url, retrieved_at, licence; and
      conversation, speaker for call logs with one turn a row (rows of one conversation stand together).
    extract: 'whole' page of an HTML file or its main 'article'.
    max_bytes: the longest line or whole-file document, after unpacking.
    """

    columns: Mapping[str, str]
    extract: str
    max_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a file: bytes [begin, end) of a line file, row groups of a Parquet file; end None means all of it."""

    path: Path
    name: str  # stands for the file in ids
    begin: int = 0
    end: int | None = None
    first: int = 1  # number of the first line or row


def named(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Our fields from the file's; a dialogue without a text of its own becomes lines `speaker：words`."""
    row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
    turns = row.get("turns")
    if "text" not in row and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        row["text"] = "\n".join(turn_line(turn.get("speaker"), turn.get("text")) for turn in turns)
    if not isinstance(row.get("text"), str):
        raise ReadError("no_text", f'needs a JSON object with a string "text"; got {str(row)[:60]!r}')
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        raise ReadError("encoding", "half of a surrogate pair in its text; mend or remove it") from error
    return row


def turn_line(speaker: Any, text: Any) -> str:
    return f"{speaker}：{text or ''}" if speaker else str(text or "")


# Opening


class Guard(io.RawIOBase):
    """Counts what a packed file unpacks to, and stops a bomb."""

    def __init__(self, file: IO[bytes], packed: int):
        self._file, self._left, self._packed = file, max(ROOM, RATIO * packed), packed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, lzma.LZMAError, NotImplementedError) as error:
            raise ReadError("damaged", f"damaged gzip or zip ({error}); fetch it again") from error
        except RuntimeError as error:  # zipfile: an encrypted member
            raise ReadError("encrypted", f"{error}; unpack it with its password first") from error
        self._left -= len(data)
        if self._left < 0:
            raise ReadError("bomb", f"unpacks to more than {RATIO} times its {self._packed} bytes; look at it before reading it")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_file(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zst"):
        return path.open("rb")
    return io.BufferedReader(Guard(gzip.open(path) if suffix == ".gz" else _open_zst(path), path.stat().st_size), 1 << 20)


def _open_zst(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path}: .zst needs zstandard; pip install 'swallow_jax[data]'") from error

    class Whole(io.RawIOBase):  # zstandard's errors have no common base with the others, and a cut stream has none at all
        def __init__(self):
            self._file = path.open("rb")
            self._reader = zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

        def read(self, size: int = -1) -> bytes:
            try:
                return self._reader.read(size)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error

        def close(self) -> None:
            self._file.close()
            super().close()

    return Whole()


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise ReadError("damaged", f"no whole zip file ({error}); fetch it again") from error


def foreign(call: Callable[[], Any], kind: str) -> Any:
    """`call()` of a parser to which hostile files may do anything: whatever it raises is the file's failure, in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except ReadError:
        raise
    except Exception as error:  # KeyError, RecursionError, struct.error, ...: pypdf and openpyxl promise no common base
        raise ReadError(
            "damaged", f"no whole {kind} file ({type(error).__name__}: {str(error)[:200]}); fetch it again"
        ) from error
