"""Files of many kinds to documents, or to failures with a reason: nothing is lost silently, nothing becomes mojibake.

JSON lines, CSV, TSV, text, HTML, law XML and manual pages, each also .gz or .zst; Parquet, Excel, PDF (extra `data`); zip
archives of these (EDINET's CSV comes so). Large line files and Parquet files are read in pieces by byte or row-group range.
"""

import codecs
import contextlib
import io
import itertools
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from swallow_jax.data import encodings, markup
from swallow_jax.data.files import Failure, Guard, How, Piece, ReadError, foreign, named, open_file, open_zip
from swallow_jax.data.tables import read_csv, read_excel, read_parquet, row_group_pieces

_SAMPLE = 1 << 20  # bytes that decide on a file's encoding
_ROFF = re.compile(r"\.[1-9][a-z]*$")


def pieces(path: Path, name: str, target_bytes: int) -> list[Piece]:
    """Cuts a file that can be read in parts into pieces of about `target_bytes`; any other file is one piece."""
    size = path.stat().st_size
    if size <= target_bytes:
        return [Piece(path=path, name=name)]
    if path.suffix.lower() in _LINES:
        return _line_pieces(path, name, size, target_bytes)
    if path.suffix.lower() == ".parquet":
        with contextlib.suppress(ReadError):  # an unreadable file fails where it is read
            return row_group_pieces(path, name, size, target_bytes)
    return [Piece(path=path, name=name)]


def _line_pieces(path: Path, name: str, size: int, target_bytes: int) -> list[Piece]:
    bounds = [size * i // -(-size // target_bytes) for i in range(-(-size // target_bytes))] + [size]
    found, first = [], 1
    with path.open("rb") as file:
        for begin, end in itertools.pairwise(bounds):
            found.append(Piece(path=path, name=name, begin=begin, end=end, first=first))
            first += begin == 0
            # A line belongs to the piece in which it begins: count the ends of line before `end`, without the last byte.
            file.seek(max(begin - 1, 0))
            left = end - 1 - file.tell()
            while left > 0:
                chunk = file.read(min(left, 1 << 20))
                first += chunk.count(b"\n")
                left -= len(chunk)
    return found


def read(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    """Rows {"text", ...} of a piece, with "where" to tell its place, and failures."""
    empty = True
    try:
        for row in _read(piece, how):
            empty = False
            if isinstance(row, Failure):
                yield row
            elif broken := encodings.damage(row["text"]):
                yield Failure(row["where"], "mojibake", f"{broken}; fetch it again, or leave it out")
            else:
                yield row
        if empty and piece.begin == 0:
            yield Failure(str(piece.path), "empty", "there is no document in it")
    except ReadError as error:
        yield Failure(str(piece.path), error.kind, error.words)
    except OSError as error:
        yield Failure(str(piece.path), "unreadable", f"{error.strerror or error}; correct the path or its permissions")


def kind_of(name: str) -> str:
    """The suffix that says how a file is read, without .gz and .zst."""
    return Path(re.sub(r"\.(gz|zst)$", "", name, flags=re.I)).suffix.lower()


def _read(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    if not piece.path.exists():
        raise ReadError("unreadable", "a link that leads nowhere or in a circle; mend or remove it")
    kind = kind_of(piece.name)
    if kind in _LINES or kind in _STREAMS or kind in _WHOLE or _ROFF.match(kind):
        with open_file(piece.path) as file:
            if kind in _LINES:
                yield from _json_lines(file, piece, how)
            else:
                yield from _of_stream(file, kind, piece.name, str(piece.path), how)
    elif kind in _PACKED:
        yield from _PACKED[kind](piece, how)
    else:
        raise ReadError("unknown_kind", f"cannot read {kind or 'a file without suffix'}; known are {KNOWN}")


def _of_stream(file: IO[bytes], kind: str, name: str, where: str, how: How) -> Iterator[dict[str, Any] | Failure]:
    if kind in _STREAMS:
        yield from _STREAMS[kind](file, name, where, how)
        return
    data = file.read(how.max_bytes + 1)
    if len(data) > how.max_bytes:
        raise ReadError("too_long", f"longer than {how.max_bytes >> 20} MB; split it, or raise max_document_mb")
    text = markup.roff_text(_decode(data)) if _ROFF.match(kind) else _WHOLE[kind](data, how)
    if text.strip():
        yield {"text": text, "where": where, "default_id": name}


# Bytes to text


def _decode(data: bytes, declared: str | None = None) -> str:
    try:
        encoding = declared or encodings.detect(data)
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ReadError("encoding", f"byte {error.start} is not {encoding}; convert the file to UTF-8") from error
    except LookupError as error:
        raise ReadError("encoding", f"declares the unknown encoding {declared!r}; convert the file to UTF-8") from error
    except ValueError as error:
        raise ReadError("encoding", str(error)) from error


def _html(data: bytes, how: How) -> str:
    """HTML declares its encoding in the first bytes; where it lies or is silent, the bytes themselves tell."""
    found = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w-]+)", data[:2048])
    declared = found[1].decode("ascii").lower() if found else None
    if declared in ("shift_jis", "shift-jis", "x-sjis", "windows-31j"):
        declared = "cp932"  # what browsers read: Shift_JIS with the vendors' characters
    try:
        page = _decode(data, declared)
    except ReadError:
        if declared is None or "unknown" in _declaration_error(declared):
            raise
        page = _decode(data)
    return markup.article_text(page) if how.extract == "article" else markup.html_text(page)


def _declaration_error(declared: str) -> str:
    try:
        codecs.lookup(declared)
    except LookupError:
        return "unknown"
    return ""


def _law(data: bytes, how: How) -> str:
    try:
        return markup.law_text(data)
    except ValueError as error:
        raise ReadError("not_xml", f"{error}; only the XML of e-Gov's laws is read") from error


# Lines


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """(line, its length in bytes); a line longer than max_bytes is passed over and comes as None."""
    while line := file.readline(max_bytes + 1):
        length = len(line)
        if length <= max_bytes:
            yield line, length
            continue
        while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
            length += len(line)
        yield None, length


def _json_lines(file: IO[bytes], piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    number, place = piece.first - 1, piece.begin
    legacy = _legacy(file, piece, how)
    if piece.begin:
        file.seek(piece.begin - 1)
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        place = file.tell()
    for line, length in _lines(file, how.max_bytes):
        if piece.end is not None and place >= piece.end:
            return
        number, place = number + 1, place + length
        where = f"{piece.path}:{number}"
        if line is None:
            yield Failure(where, "too_long", f"a line of {length >> 20} MB; split it, or raise max_document_mb")
        elif line.strip():
            try:
                row = _json_row(line, legacy)
                yield named(row, how.columns) | {"where": where, "default_id": f"{piece.name}#{number}"}
            except ReadError as error:
                yield Failure(where, error.kind, error.words)


def _legacy(file: IO[bytes], piece: Piece, how: How) -> str | None:
    """The encoding of those lines that are not UTF-8, judged by all of them at the file's beginning."""
    if piece.path.suffix.lower() not in _LINES:
        return None  # a packed stream cannot be read twice; JSON is UTF-8 by its standard anyway
    sample = file.read(min(_SAMPLE, how.max_bytes))
    file.seek(0)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ReadError("encoding", "JSON lines in UTF-16; convert the file to UTF-8")
    lines = [line for line in sample.split(b"\n")[: None if len(sample) < _SAMPLE else -1] if not _is_utf8(line)]
    try:
        return encodings.detect(b"\n".join(lines)) if lines else None
    except ValueError:
        return None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _json_row(line: bytes, legacy: str | None) -> dict[str, Any]:
    try:
        row = json.loads(_decode(line, "utf-8" if legacy is None or _is_utf8(line) else legacy))
    except json.JSONDecodeError as error:
        raise ReadError("not_json", f"not a JSON object ({error.msg}); mend or remove the line") from error
    except (RecursionError, ValueError) as error:  # nested a thousand deep; a number of five thousand digits
        raise ReadError("not_json", f"not a JSON object ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise ReadError("no_text", f'needs a JSON object with a string "text"; got {line[:60]!r}')
    return row


# Packed kinds


def _whole_file(path: Path, how: How) -> bytes:
    with path.open("rb") as file:
        data = file.read(how.max_bytes + 1)
    if len(data) > how.max_bytes:
        raise ReadError("too_long", f"longer than {how.max_bytes >> 20} MB; split it, or raise max_document_mb")
    return data


def _pdf(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    try:
        import pypdf
    except ImportError as error:
        raise ValueError(f"{piece.path}: PDF needs pypdf; pip install 'swallow_jax[data]'") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every repair; what matters comes as a failure
    data = _whole_file(piece.path, how)
    if not data.strip():
        return
    reader = foreign(lambda: pypdf.PdfReader(io.BytesIO(data)), "PDF")
    if reader.is_encrypted and not foreign(lambda: reader.decrypt(""), "PDF"):
        raise ReadError("encrypted", "an encrypted PDF; save it without its password first")
    text = foreign(lambda: "\n".join(page.extract_text() for page in reader.pages), "PDF")
    if not text.strip():
        raise ReadError("no_text", "a PDF without a text layer; run character recognition (OCR) over it first")
    yield {"text": text, "where": str(piece.path), "default_id": piece.name}


def _archive(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    """Members of kinds that are read as streams; archives within archives are not opened."""
    with open_zip(piece.path) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            kind, where = kind_of(member.filename), f"{piece.path}/{member.filename}"
            if member.is_dir() or not (kind in _STREAMS or kind in _WHOLE):
                continue
            try:
                guarded = Guard(archive.open(member), member.compress_size)
                with io.BufferedReader(guarded, 1 << 20) as file:
                    yield from _of_stream(file, kind, f"{piece.name}/{member.filename}", where, how)
            except ReadError as error:
                yield Failure(where, error.kind, error.words)
            except RuntimeError as error:
                yield Failure(where, "encrypted", f"{error}; unpack it with its password first")
            except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
                yield Failure(where, "damaged", f"damaged zip ({error}); fetch it again")


_LINES = (".jsonl", ".ndjson")
_STREAMS = {".csv": read_csv, ".tsv": read_csv}
_WHOLE: dict[str, Callable[[bytes, How], str]] = {
    **dict.fromkeys((".txt", ".md"), lambda data, how: _decode(data)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".xml": _law,
}
_PACKED = {".parquet": read_parquet, ".xlsx": read_excel, ".pdf": _pdf, ".zip": _archive}
KNOWN = " ".join((*_LINES, *_STREAMS, *_WHOLE, *_PACKED)) + " and manual pages, most also .gz or .zst"
