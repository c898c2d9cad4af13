"""Documents with their provenance, and the domain folder that says what may be read and how.

A document is a dict `{"id", "text", "source", "licence"}`, with `sector`, `url` and `retrieved_at` where they are known.
Paragraphs of a document are its lines. How files become documents stands in `readers`.

A domain folder holds `domain.yaml`: sources with licences and allowed uses, filter profiles, seed words (see
`configs/domains/japanese_finance/domain.yaml`). The licence gate: a source that states no licence, or does not allow training,
is refused unless `reason` says in words why it may be used all the same.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swallow_jax.data import filters, readers
from swallow_jax.data.readers import Failure, How, Piece

TRAINING = "training"  # the allowed use that every source must state
MAX_BYTES = 64 << 20  # of a document, where no config says otherwise


def read(
    paths: str | Path | Iterable[str | Path], *, source: str | None = None, licence: str | None = None
) -> Iterator[dict[str, Any]]:
    """Documents of files in the order given. `source` and `licence` are for rows and files that bring none of their own.

    Strict: raises ValueError naming file and line for what cannot be read, for a document without source or licence, and when
    there is no document at all.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = False
    for path in map(Path, paths):
        piece, how = Piece(path=path, name=str(path)), How(columns={}, extract="whole", max_bytes=MAX_BYTES)
        for row in readers.read(piece, how):
            if isinstance(row, Failure) and row.kind == "empty":
                continue
            document = complete(row, source, licence)
            if isinstance(document, Failure):
                raise ValueError(f"{document.where}: {document.words}")
            found = True
            yield document
    if not found:
        raise ValueError(f"no document in {', '.join(map(str, paths)) or 'an empty list of files'}: empty corpus")


def complete(row: dict[str, Any] | Failure, source: str | None, licence: str | None) -> dict[str, Any] | Failure:
    """A reader's row with id, source and licence; a failure where one of them is nowhere stated."""
    if isinstance(row, Failure):
        return row
    where, default_id = row.pop("where"), row.pop("default_id")
    row["source"] = row.get("source") or source
    row["licence"] = row.get("licence") or licence
    for field in ("source", "licence"):
        if not isinstance(row[field], str):
            words = (
                f'the document states no "{field}"; state it there or, as a plain file names no source or licence, in domain.yaml'
            )
            return Failure(where, f"no_{field}", words)
    row["id"] = str(row.get("id") or f"{row['source']}:{default_id}")
    return row


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
    reason: str | None  # why it may be used although its licence does not say so
    columns: Mapping[str, str]  # our field -> the file's column, see readers.How
    extract: str  # of HTML: the 'whole' page or its main 'article'

    def files(self, folder: Path, root: Path) -> list[Path]:
        """The source's files in a stable order; raises ValueError where there is none."""
        base, pattern = (folder, self.path) if self.path else (root, self.place)
        # A link that leads nowhere stays in the list: it fails with a reason when it is read.
        files = sorted(
            file for file in base.glob(pattern.lstrip("/")) if file.is_file() or (file.is_symlink() and not file.is_dir())
        )
        if not files:
            raise ValueError(
                f"source {self.id}: nothing matches {base / pattern.lstrip('/')}; install or unpack it, set --config.root "
                "to where it was unpacked, or leave the source out of the domain"
            )
        return files

    def pieces(self, folder: Path, root: Path, target_bytes: int) -> list[Piece]:
        """The source's files, large ones in parts, in a stable order."""
        base = folder if self.path else root
        return [
            piece
            for file in self.files(folder, root)
            for piece in readers.pieces(file, file.relative_to(base).as_posix(), target_bytes)
        ]

    def read_piece(self, piece: Piece, max_bytes: int) -> Iterator[dict[str, Any] | Failure]:
        """Documents of a piece, with this source's id; its licence, sector, url and time where a row has none of its own."""
        how = How(columns=self.columns, extract=self.extract, max_bytes=max_bytes)
        for row in readers.read(piece, how):
            document = complete(row, self.id, self.licence)
            if not isinstance(document, Failure):
                document["source"] = self.id
                for field in ("sector", "url", "retrieved_at"):
                    if getattr(self, field):
                        document.setdefault(field, getattr(self, field))
            yield document

    def read(self, file: Path, folder: Path, root: Path) -> Iterator[dict[str, Any] | Failure]:
        """Documents of a whole file."""
        name = file.relative_to(folder if self.path else root).as_posix()
        yield from self.read_piece(Piece(path=file, name=name), MAX_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain folder, read: its sources, filter profiles, seed words and the share of general text to replay."""

    id: str
    folder: Path
    sources: tuple[Source, ...]
    profiles: Mapping[str, Mapping[str, filters.Rules]]
    replay_share: float
    seed_words: tuple[str, ...]
    quotas: Mapping[str, float]  # sector -> its largest share of the characters kept
    glossary: tuple[str, ...]  # terms whose coverage is reported


_DOMAIN_FIELDS = {"id", "language", "description", "replay_share", "seed_words", "profiles", "sources"}
_DOMAIN_OPTIONS = {"quotas", "glossary"}


def load_domain(folder: str | Path) -> Domain:
    """Read and check `folder/domain.yaml`; raises ValueError naming the field and the remedy."""
    import yaml

    path = Path(folder) / "domain.yaml"
    if not path.exists():
        raise ValueError(f"{path} does not exist; a domain folder needs it")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    given = set(content) if isinstance(content, dict) else set()
    if not _DOMAIN_FIELDS <= given <= _DOMAIN_FIELDS | _DOMAIN_OPTIONS:
        unknown = sorted(given - _DOMAIN_FIELDS - _DOMAIN_OPTIONS)
        raise ValueError(f"{path}: missing {sorted(_DOMAIN_FIELDS - given)}, unknown {unknown}")
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
        quotas=_quotas(content.get("quotas") or {}, {source.sector for source in sources}, path),
        glossary=_glossary(content.get("glossary"), Path(folder)),
    )


def _quotas(quotas: Mapping[str, float], sectors: set[str], path: Path) -> Mapping[str, float]:
    for sector, share in quotas.items():
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"{path}: quotas: {sector}: {share!r} is no share in (0, 1]")
    # Sectors without a quota may fill what the others leave; all of them bounded must be able to make up a whole.
    if quotas and sectors <= set(quotas) and sum(quotas[sector] for sector in sectors) < 1 - 1e-9:
        raise ValueError(f"{path}: quotas sum to less than 1 over {sorted(sectors)}; nothing could be kept")
    return dict(quotas)


def _glossary(name: str | None, folder: Path) -> tuple[str, ...]:
    """Terms of a glossary file in the domain folder: JSON lines {"term"}, or one term a line."""
    if not name:
        return ()
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist; correct `glossary` in {folder / 'domain.yaml'}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    terms = [json.loads(line)["term"] if line.startswith("{") else line for line in lines]
    return tuple(dict.fromkeys(filters.normalise(term)[0] for term in terms))


def _source(row: Mapping[str, Any], where: str, profiles: Mapping[str, Any]) -> Source:
    where = f"{where} ({row.get('id', 'without id')})"
    fields = {field.name for field in dataclasses.fields(Source)}
    optional = {"path", "place", "url", "retrieved_at", "reason", "columns", "extract"}
    if unknown := set(row) - fields:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}; known are {sorted(fields)}")
    reason = str(row.get("reason") or "").strip()
    row = {**row, "licence": row.get("licence") or (reason and "not stated"), "reason": reason or None}
    if not row["licence"]:
        raise ValueError(f"{where}: states no licence; write it down, leave the source out, or write a `reason` for using it")
    if missing := fields - optional - set(row):
        raise ValueError(f"{where}: missing fields {sorted(missing)}")
    if TRAINING not in row["allowed_uses"] and not reason:
        raise ValueError(
            f"{where}: allowed_uses {row['allowed_uses']} does not contain '{TRAINING}': it may not be read without a `reason`"
        )
    if bool(row.get("path")) == bool(row.get("place")):
        raise ValueError(f"{where}: state either path (in the domain folder) or place (on the reader's machine)")
    if row["profile"] not in profiles:
        raise ValueError(f"{where}: profile {row['profile']!r} is not among {sorted(profiles)}")
    if row.get("extract", "whole") not in ("whole", "article"):
        raise ValueError(f"{where}: extract {row['extract']!r} is unknown; use whole or article")
    defaults = {"columns": {}, "extract": "whole", "allowed_uses": ()}
    values = {name: row.get(name) or defaults.get(name) for name in fields}
    return Source(**values | {"allowed_uses": tuple(values["allowed_uses"])})
