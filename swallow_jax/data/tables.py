"""Tables to documents: CSV, Excel, Parquet and EDINET's CSV; one document a row, or one a conversation of consecutive rows."""

import codecs
import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from swallow_jax.data import encodings, markup
from swallow_jax.data.files import RATIO, ROOM, Failure, How, Piece, ReadError, foreign, named, open_zip, turn_line

_SAMPLE = 1 << 20  # bytes that decide on a file's encoding


def read_csv(file: IO[bytes], name: str, where: str, how: How) -> Iterator[dict[str, Any] | Failure]:
    sample = file.read(min(_SAMPLE, how.max_bytes))
    if not sample.strip():
        return
    try:
        encoding = encodings.detect(sample, partial=len(sample) == _SAMPLE)
    except ValueError as error:
        raise ReadError("encoding", str(error)) from error
    lines = _text_lines(itertools.chain([sample], iter(lambda: file.read(_SAMPLE), b"")), encoding, how.max_bytes)
    head = next(lines, "")
    # Excel writes CSV with commas, or tabs in its "Unicode text"; EDINET writes tabs.
    delimiter = "\t" if head.count("\t") > head.count(",") else ","
    csv.field_size_limit(how.max_bytes)
    rows = csv.reader(itertools.chain([head], lines), delimiter=delimiter)
    try:
        header = [cell.strip() for cell in next(rows)]
        if {"要素ID", "値"} <= set(header):
            yield from _edinet(rows, header, name, where)
        else:
            yield from _table(rows, header, name, where, how)
    except csv.Error as error:
        raise ReadError("damaged", f"line {rows.line_num}: {error}; mend or remove it") from error


def _text_lines(chunks: Iterable[bytes], encoding: str, max_bytes: int) -> Iterator[str]:
    decoder, pending, done = codecs.getincrementaldecoder(encoding)(), "", 0
    for chunk in itertools.chain(chunks, [None]):
        try:
            pending += decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise ReadError("encoding", f"byte {done + error.start} is not {encoding}; convert the file to UTF-8") from error
        done += len(chunk or b"")
        *lines, pending = pending.split("\n")
        yield from (line + "\n" for line in lines)
        if len(pending) > max_bytes:
            raise ReadError("too_long", f"a line longer than {max_bytes >> 20} MB; split it, or raise max_document_mb")
    if pending:
        yield pending


def _table(rows: Iterable[list[Any]], header: list[str], name: str, where: str, how: How) -> Iterator[dict[str, Any] | Failure]:
    columns = {"text": "text"} | dict(how.columns)
    if missing := sorted(set(columns.values()) - set(header)):
        raise ReadError(
            "no_text", f"no column {', '.join(missing)} among {', '.join(header)[:200]}; state `columns` in domain.yaml"
        )
    place = {ours: header.index(theirs) for ours, theirs in columns.items()}

    def documents() -> Iterator[dict[str, Any] | Failure]:
        for number, row in enumerate(rows, 2):
            if not any(cell not in (None, "") for cell in row):
                continue
            at = f"{where}:{number}"
            if len(row) <= max(place.values()):
                yield Failure(at, "short_row", f"a row of {len(row)} cells, the header has {len(header)}; mend or remove it")
                continue
            found = {ours: "" if row[i] is None else str(row[i]) for ours, i in place.items()}
            yield found | {"where": at, "default_id": f"{name}#{number}"}

    yield from _conversations(documents(), how.max_bytes) if "conversation" in columns else documents()


def _conversations(turns: Iterable[dict[str, Any] | Failure], max_bytes: int) -> Iterator[dict[str, Any] | Failure]:
    """Joins consecutive turns of one conversation to one document of lines `speaker：words`."""
    call, lines, size = None, [], 0
    for turn in itertools.chain(turns, [None]):
        if isinstance(turn, Failure):
            yield turn
            continue
        if call and (turn is None or turn["conversation"] != call["conversation"] or size > max_bytes):
            yield {**call, "id": call.get("id") or call["conversation"], "text": "\n".join(lines)}
            lines, size, call = [], 0, None
        if turn:
            call = call or {field: value for field, value in turn.items() if field != "speaker"}
            lines.append(turn_line(turn.get("speaker"), turn["text"]))
            size += len(lines[-1])


def _edinet(rows: Iterable[list[str]], header: list[str], name: str, where: str) -> Iterator[dict[str, Any]]:
    """EDINET's CSV holds one filing: of its rows the text blocks, each under its name; single figures are no text."""
    element, value = header.index("要素ID"), header.index("値")
    title = header.index("項目名") if "項目名" in header else element
    parts = []
    for row in rows:
        if len(row) > max(element, value, title) and row[element].endswith("TextBlock") and row[value].strip():
            words = markup.html_text(row[value]) if "</" in row[value] else row[value].strip()
            parts.append(row[title].removesuffix("[テキストブロック]").removesuffix(" [テキストブロック]").strip() + "\n" + words)
    if parts:
        yield {"text": "\n".join(parts), "where": where, "default_id": name}


def parquet_file(path: Path):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install 'swallow_jax[data]'") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ReadError("damaged", f"no whole Parquet file ({' '.join(str(error).split())[:200]}); fetch it again") from error


def row_group_pieces(path: Path, name: str, size: int, target_bytes: int) -> list[Piece]:
    with parquet_file(path) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    step = max(1, len(counts) * target_bytes // size)
    return [
        Piece(path=path, name=name, begin=i, end=min(i + step, len(counts)), first=1 + sum(counts[:i]))
        for i in range(0, len(counts), step)
    ]


def read_parquet(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    import pyarrow as pa

    with parquet_file(piece.path) as file:
        number = piece.first - 1
        try:
            # Few rows at a time: a row group of long documents may hold gigabytes.
            for batch in file.iter_batches(batch_size=64, row_groups=range(piece.begin, piece.end or file.num_row_groups)):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{piece.path}:{number}"
                    try:
                        row = {field: _plain(value) for field, value in row.items()}
                        yield named(row, how.columns) | {"where": where, "default_id": f"{piece.name}#{number}"}
                    except ReadError as error:
                        yield Failure(where, error.kind, error.words)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            words = " ".join(str(error).split())[:200]
            raise ReadError("damaged", f"damaged after row {number} ({words}); fetch it again") from error


def _plain(value: Any) -> Any:
    """What JSON can hold: bytes are no text, times become words."""
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def read_excel(piece: Piece, how: How) -> Iterator[dict[str, Any] | Failure]:
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(f"{piece.path}: Excel needs openpyxl; pip install 'swallow_jax[data]'") from error
    with open_zip(piece.path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(ROOM, RATIO * piece.path.stat().st_size):
            raise ReadError("bomb", f"unpacks to {unpacked >> 20} MB; look at it before reading it")
    with piece.path.open("rb") as file:  # a file of ours: openpyxl leaves its own open where a workbook is broken
        sheets = foreign(lambda: openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets, "Excel")
        for sheet in sheets:
            rows = iter(sheet.iter_rows(values_only=True))
            first = foreign(lambda rows=rows: next(rows, None), "Excel")
            if first is None or not any(first):
                continue
            header = ["" if cell is None else str(cell).strip() for cell in first]
            rest = iter(lambda rows=rows: foreign(lambda: next(rows, None), "Excel"), None)
            yield from _table(map(list, rest), header, f"{piece.name}/{sheet.title}", f"{piece.path}/{sheet.title}", how)
