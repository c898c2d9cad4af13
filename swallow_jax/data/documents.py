"""Raw files to documents, and the domain folder that says what may be read and how.

A document is a dict `{"id", "text", "source", "licence"}`, with `url` and `retrieved_at` where they are known. JSON lines
hold one document a line; a text or HTML file is one document. Paragraphs of a document are its lines.

A domain folder holds `domain.yaml`: sources with licences and allowed uses, filter profiles, seed words (see
`configs/domains/demo_general_ja/domain.yaml`). A source without a licence, or not allowed for training, is refused.
"""

import dataclasses
import gzip
import html.parser
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swallow_jax.data import filters

TRAINING = "training"  # the allowed use that every source must state

_TEXT = (".txt", ".md")
_HTML = (".html", ".htm", ".xhtml")
_ROWS = (".jsonl",)
_ROFF = re.compile(r"\.[1-9][a-z]*$")  # manual pages


# Files


def read(
    paths: str | Path | Iterable[str | Path], *, source: str | None = None, licence: str | None = None
) -> Iterator[dict[str, Any]]:
    """Documents of files in the order given. `source` and `licence` are for rows and files that bring none of their own.

    Raises ValueError naming file and line for what cannot be read, for a document without source or licence, and when
    there is no document at all.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = False
    for path in paths:
        for document in read_file(Path(path), name=str(path), source=source, licence=licence):
            found = True
            yield document
    if not found:
        raise ValueError(f"no document in {', '.join(map(str, paths)) or 'an empty list of files'}: empty corpus")


def read_file(path: Path, *, name: str, source: str | None, licence: str | None) -> Iterator[dict[str, Any]]:
    """Documents of one file; `name` stands for it in ids, so that they do not depend on where the reader keeps it."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind in _ROWS:
        for number, line in _lines(path):
            if line.strip():
                yield _row(line, f"{path}:{number}", f"{name}#{number}", source, licence)
    elif kind in _TEXT + _HTML or _ROFF.match(kind):
        data = _bytes(path)
        text = _decode_html(data, path) if kind in _HTML else _decode(data, "utf-8", str(path))
        text = html_text(text) if kind in _HTML else roff_text(text) if _ROFF.match(kind) else text
        if text.strip():
            if not (source and licence):
                raise ValueError(f"{path}: a plain file names no source or licence; state both in a domain.yaml")
            yield {"id": f"{source}:{name}", "text": text, "source": source, "licence": licence}
    else:
        known = " ".join(_ROWS + _TEXT + _HTML)
        kind = kind or "a file without suffix"
        raise ValueError(f"{path}: cannot read {kind}; known are {known} and manual pages, each also .gz")


def _row(line: bytes, where: str, default_id: str, source: str | None, licence: str | None) -> dict[str, Any]:
    try:
        row = json.loads(_decode(line, "utf-8", where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg}); mend or remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where}: needs a JSON object with a string "text"; got {line[:60]!r}')
    row["source"] = row.get("source") or source
    row["licence"] = row.get("licence") or licence
    for field in ("source", "licence"):
        if not row[field]:
            raise ValueError(f'{where}: the document states no "{field}"; add it to the row or to a domain.yaml')
    row["id"] = str(row.get("id") or f"{row['source']}:{default_id}")
    return row


def _open(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip after line {number} ({error}); fetch it again") from error


def _bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({error}); fetch it again") from error


def _decode(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not {encoding}; convert the file to UTF-8") from error


def _decode_html(data: bytes, path: Path) -> str:
    """HTML declares its encoding in the first bytes; without a declaration it is UTF-8."""
    declared = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w-]+)", data[:2048])
    encoding = declared[1].decode("ascii") if declared else "utf-8"
    try:
        return _decode(data, encoding, str(path))
    except LookupError as error:
        raise ValueError(f"{path}: declares the unknown encoding {encoding!r}") from error


# HTML

_DROPPED = frozenset(
    ("script", "style", "nav", "header", "footer", "aside", "noscript", "button", "select", "svg", "head", "template", "iframe")
)
_BLOCKS = frozenset(
    ("p", "div", "br", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ul", "ol", "dl", "dt", "dd", "table", "tr", "thead", "tbody")
    + ("td", "th", "caption", "pre", "blockquote", "section", "article", "main", "body", "figure", "figcaption", "hr", "form")
    + ("fieldset", "details", "summary", "address")
)
_JAPANESE = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_JOIN = re.compile(rf"(?<=[{_JAPANESE}])[ \t\r\n]*\n[ \t\r\n]*(?=[{_JAPANESE}])")


class _TextOf(html.parser.HTMLParser):
    """Collects text outside dropped elements, one paragraph for each block element."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._parts: list[str] = []
        self._dropped: list[str] = []  # open dropped elements
        self._pre = 0

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            self._dropped.clear()  # </head> may be left out
        if tag in _DROPPED:
            self._dropped.append(tag)
        elif tag in _BLOCKS:
            self._break()
            self._pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in self._dropped:
            # An unclosed <nav> inside must not swallow the page: close up to the matching one.
            while self._dropped.pop() != tag:
                pass
        elif tag in _BLOCKS:
            self._break()
            self._pre -= tag == "pre" and self._pre > 0

    def handle_startendtag(self, tag, attrs):
        if tag in _BLOCKS:
            self._break()

    def handle_data(self, data):
        if not self._dropped and data != "¶":  # Sphinx's link to a heading
            self._parts.append(data)

    def _break(self):
        text = "".join(self._parts)
        self._parts.clear()
        if not self._pre:
            # A line break in the source is no space between two Japanese characters.
            text = re.sub(r"[ \t\r\n\f\v]+", " ", _JOIN.sub("", text))
        if text.strip():
            self.paragraphs.append(text.strip())

    def close(self):
        super().close()
        self._break()


def html_text(page: str) -> str:
    """Readable text of an HTML page: block elements become lines; scripts, navigation and the head are dropped."""
    parser = _TextOf()
    parser.feed(page)
    parser.close()
    return "\n".join(parser.paragraphs)


# Manual pages

_FONTS = re.compile(r"[.'](?:B|I|R|BR|BI|RB|RI|IR|IB|SM|SB)\s+(.*)")
_HEADS = re.compile(r"[.'](?:SH|SS|Sh|Ss)\s+(.*)")
_ESCAPES = (
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^,/:%)!c]|\\\*\(..|\\\*.|\\\".*"), ""),
    (re.compile(r"\\\(bu|\\\[bu\]"), "・"),
    (re.compile(r"\\\(em|\\\(en|\\\[e[mn]\]"), "-"),
    (re.compile(r"\\\((?:[lr]q|aq|dq)|\\\[(?:[lr]q|aq|dq)\]"), '"'),
    (re.compile(r"\\\(..|\\\[[^]]*\]|\\[nhvwkz](?:\(..|'[^']*'|.)"), ""),
    (re.compile(r"\\[~0 ]"), " "),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
)


def roff_text(page: str) -> str:
    """Readable text of a manual page (man macros): headings and paragraphs become lines, unfilled text (code) is dropped."""
    paragraphs: list[list[str]] = [[]]
    filling = True
    for line in page.splitlines():
        if line[:1] not in (".", "'"):
            if filling:
                paragraphs[-1].append(line)
            if not line.strip():
                paragraphs.append([])
            continue
        macro = line[1:].split(maxsplit=1)[0] if line[1:].strip() else ""
        if macro in ("nf", "EX"):
            filling = False
        elif macro in ("fi", "EE"):
            filling = True
        if found := _FONTS.match(line):
            if filling:
                words = re.findall(r'"([^"]*)"|(\S+)', found[1])
                glue = " " if len(macro) == 1 or macro == "SM" else ""  # BR, IR ... join what they alternate
                paragraphs[-1].append(glue.join(quoted or word for quoted, word in words))
        elif found := _HEADS.match(line):
            paragraphs += [[found[1].strip('"')], []]
        elif macro not in ("ft", "ad", "hy", "ne", "ie", "el", "if") and not macro.startswith('\\"'):
            paragraphs.append([])
    lines = (_JOIN.sub("", "\n".join(parts)) for parts in paragraphs)
    lines = (re.sub(r"\s+", " ", _unescape(line)).strip() for line in lines)
    return "\n".join(line for line in lines if line)


def _unescape(text: str) -> str:
    for pattern, to in _ESCAPES:
        text = pattern.sub(to, text)
    return text


# The domain folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where one kind of document lies and what may be done with it. One of `path` and `place` is set."""

    id: str
    path: str | None  # glob relative to the domain folder
    place: str | None  # glob relative to the reader's root, such as usr/share/doc/...
    licence: str
    allowed_uses: tuple[str, ...]
    attribution: str
    sector: str
    profile: str
    url: str | None
    retrieved_at: str | None

    def files(self, folder: Path, root: Path) -> list[Path]:
        """The source's files in a stable order; raises ValueError where there is none."""
        base, pattern = (folder, self.path) if self.path else (root, self.place)
        files = sorted(file for file in base.glob(pattern.lstrip("/")) if file.is_file())
        if not files:
            raise ValueError(
                f"source {self.id}: nothing matches {base / pattern.lstrip('/')}; install or unpack it, set --config.root "
                "to where it was unpacked, or leave the source out of the domain"
            )
        return files

    def read(self, file: Path, folder: Path, root: Path) -> Iterator[dict[str, Any]]:
        """Documents of one file, with this source's id; its licence, sector, url and time where a row has none of its own."""
        name = file.relative_to(folder if self.path else root).as_posix()
        for document in read_file(file, name=name, source=self.id, licence=self.licence):
            document["source"] = self.id
            for field in ("sector", "url", "retrieved_at"):
                if getattr(self, field):
                    document.setdefault(field, getattr(self, field))
            yield document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain folder, read: its sources, filter profiles, seed words and the share of general text to replay."""

    id: str
    folder: Path
    sources: tuple[Source, ...]
    profiles: Mapping[str, Mapping[str, filters.Rules]]
    replay_share: float
    seed_words: tuple[str, ...]


_DOMAIN_FIELDS = {"id", "language", "description", "replay_share", "seed_words", "profiles", "sources"}


def load_domain(folder: str | Path) -> Domain:
    """Read and check `folder/domain.yaml`; raises ValueError naming the field and the remedy."""
    import yaml

    path = Path(folder) / "domain.yaml"
    if not path.exists():
        raise ValueError(f"{path} does not exist; a domain folder needs it")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or set(content) != _DOMAIN_FIELDS:
        given = set(content) if isinstance(content, dict) else set()
        raise ValueError(f"{path}: missing {sorted(_DOMAIN_FIELDS - given)}, unknown {sorted(given - _DOMAIN_FIELDS)}")
    sources = tuple(_source(row, f"{path}: source {n}", content["profiles"]) for n, row in enumerate(content["sources"]))
    ids = [source.id for source in sources]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: a source id occurs twice in {ids}")
    return Domain(
        id=content["id"],
        folder=Path(folder),
        sources=sources,
        profiles=filters.check_profiles(content["profiles"], f"{path}: profiles"),
        replay_share=float(content["replay_share"]),
        seed_words=tuple(content["seed_words"]),
    )


def _source(row: Mapping[str, Any], where: str, profiles: Mapping[str, Any]) -> Source:
    where = f"{where} ({row.get('id', 'without id')})"
    fields = {field.name for field in dataclasses.fields(Source)}
    optional = {"path", "place", "url", "retrieved_at"}
    if unknown := set(row) - fields:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}; known are {sorted(fields)}")
    if not row.get("licence"):
        raise ValueError(f"{where}: states no licence; find it out and write it down, or leave the source out")
    if missing := fields - optional - set(row):
        raise ValueError(f"{where}: missing fields {sorted(missing)}")
    if TRAINING not in row["allowed_uses"]:
        raise ValueError(f"{where}: allowed_uses {row['allowed_uses']} does not contain '{TRAINING}': it may not be read")
    if bool(row.get("path")) == bool(row.get("place")):
        raise ValueError(f"{where}: state either path (in the domain folder) or place (on the reader's machine)")
    if row["profile"] not in profiles:
        raise ValueError(f"{where}: profile {row['profile']!r} is not among {sorted(profiles)}")
    values = {name: row.get(name) for name in fields} | {"allowed_uses": tuple(row["allowed_uses"])}
    return Source(**values)
