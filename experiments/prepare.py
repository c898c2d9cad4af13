"""Raw documents or dialogues -> packed token shards, with a report that says what went in and what was dropped, and why.

    python -m experiments.prepare --config=configs/prepare/tiny.py --workdir=runs/prepare_tiny

`config.corpus` reads domain folders: normalise, rules by source, duplicates, decontamination, tokenise, pack.
`config.dialogues` reads chat samples: decontaminate, render with the chat template, pack without splitting.
Writes train/ and heldout/ (shards), tokenizer/ where the config trains one, report.json and dropped.jsonl.
"""

import dataclasses
import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import run, text
from swallow_jax.data import dedup, documents, filters, packing, shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    domains: tuple  # domain folders
    root: str  # where the sources' `place` begins: "/" or an unpacked tree
    unique_paragraphs: bool  # a paragraph met before, in any document, is dropped
    near_bands: int
    near_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogues:
    files: tuple  # globs of chat samples
    train_on: str  # 'last' | 'all'
    too_long: str  # 'error' | 'drop'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contamination:
    test_sets: tuple  # globs of conversation files
    protect: str  # 'turns': every turn; 'evidence': turns that carry evidence, and their twins
    ngram: int
    jaccard: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    vocab_size: int
    texts: tuple  # globs of JSONL files whose strings join the corpus in training the tokenizer
    repeat: int  # how often those texts count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    row_length: int
    rows_per_shard: int
    heldout_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int
    corpus: Corpus | None
    dialogues: Dialogues | None
    contamination: Contamination | None
    tokenizer: str | None
    train_tokenizer: TrainTokenizer | None
    pack: Pack


def main(config, workdir: Path) -> dict[str, Any]:
    settings = run.build(Settings, config.to_dict(), "config")
    if (settings.corpus is None) == (settings.dialogues is None):
        raise ValueError("config: state either corpus or dialogues, the other None")
    if (settings.tokenizer is None) == (settings.train_tokenizer is None):
        raise ValueError("config: state either tokenizer (a folder) or train_tokenizer, the other None")
    folder = run.open_run(workdir, config.to_dict(), inputs=_inputs(settings), parents=())
    if folder.finished:
        return folder.result

    report = Report()
    protected = _protected(settings.contamination)
    if settings.corpus:
        kept, licences = _corpus(settings, report, protected)
    else:
        kept, licences = _dialogues(settings, report, protected)
    if not kept:
        raise ValueError(f"nothing is left of {report.documents_in} documents; reasons: {dict(report.dropped)}")

    tokenizer = _tokenizer(settings, folder.folder, kept)
    split = _split(kept, settings.pack.heldout_share, settings.seed)
    indices = {}
    for name, part in split.items():
        writer = shards.ShardWriter(
            folder.folder / name,
            row_length=settings.pack.row_length,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            rows_per_shard=settings.pack.rows_per_shard,
        )
        with writer:
            (_write_documents if settings.corpus else _write_samples)(writer, part, tokenizer, settings, report, name)
        indices[name] = shards.read_index(folder.folder / name)

    run.write_jsonl(folder.folder / "dropped.jsonl", report.dropped_rows)
    result = {
        "documents_in": report.documents_in,
        "kept": report.documents_in - sum(report.dropped.values()),
        "dropped_by_reason": dict(report.dropped),
        "tokens": sum(index["tokens"] for index in indices.values()),
        "rows": {name: index["rows"] for name, index in indices.items()},
    }
    run.write_json(folder.folder / "report.json", result | report.details(kept, indices))
    folder.note(licences=licences, tokenizer_sha256=tokenizer.sha256)
    return folder.finish(result)


class Report:
    """What happened to every document: in = kept + dropped, each drop with its first reason."""

    def __init__(self):
        self.documents_in = 0
        self.dropped: Counter = Counter()
        self.dropped_rows: list[dict] = []
        self.sources: dict[str, Counter] = {}
        self.paragraphs_dropped: Counter = Counter()
        self.rewrites: Counter = Counter()
        self.contaminated: list[dict] = []
        self.seed_words: Counter = Counter()

    def enter(self, source: str) -> None:
        self.documents_in += 1
        self.sources.setdefault(source, Counter())["documents_in"] += 1

    def drop(self, document: dict, reasons: list[str]) -> None:
        self.dropped[reasons[0]] += 1
        self.sources[document["source"]][f"dropped: {reasons[0]}"] += 1
        self.dropped_rows.append({"id": document["id"], "source": document["source"], "reasons": reasons})

    def details(self, kept: list[dict], indices: dict[str, dict]) -> dict[str, Any]:
        for document in kept:
            counts = self.sources[document["source"]]
            counts["kept"] += 1
            counts["characters"] += len(document.get("text", ""))
            counts["japanese_characters"] += int(filters.japanese_letters(document.get("text", "")))
        for index in indices.values():
            for source, counts in index["sources"].items():
                self.sources[source]["tokens"] += counts["tokens"]
        return {
            "sources": {source: dict(counts) for source, counts in self.sources.items()},
            "paragraphs_dropped": dict(self.paragraphs_dropped),
            "rewrites": dict(self.rewrites),
            "contaminated": self.contaminated,
            "documents_with_seed_word": dict(self.seed_words),
        }


# Documents


def _corpus(settings: Settings, report: Report, protected: list[dict]) -> tuple[list[dict], list[dict]]:
    """Documents that stay, and the licences they come under."""
    corpus = settings.corpus
    annotated, licences, seen, paragraphs = [], [], dedup.Seen(), dedup.Seen()
    for domain in map(documents.load_domain, corpus.domains):
        profiles = {
            name: {part: filters.check_rules(rules, f"{domain.id}.profiles.{name}.{part}") for part, rules in body.items()}
            for name, body in domain.profiles.items()
        }
        for source in domain.sources:
            licences.append({"source": source.id, "licence": source.licence, "attribution": source.attribution})
            profile = profiles[source.profile]
            for document in _progress(_read(source, domain, Path(corpus.root)), source.id):
                report.enter(source.id)
                _annotate(document, profile, report, seen, paragraphs if corpus.unique_paragraphs else None)
                report.seed_words.update(word for word in domain.seed_words if word in document["text"])
                annotated.append(document)
    if not annotated:
        raise ValueError(f"no document in the domains {list(corpus.domains)}: empty corpus")

    texts = [document["text"] for document in annotated]
    clusters = dedup.near_duplicates(texts, bands=corpus.near_bands, rows=corpus.near_rows, seed=settings.seed)
    for i, first in enumerate(clusters):
        if first != i and not annotated[first]["reasons"]:
            annotated[i]["reasons"].append("near_duplicate")
    _decontaminate(annotated, texts, settings.contamination, protected, report)
    return _drop(annotated, report), licences


def _read(source: documents.Source, domain: documents.Domain, root: Path) -> Iterator[dict]:
    for file in source.files(domain.folder, root):
        yield from source.read(file, domain.folder, root)


def _annotate(document: dict, profile: dict, report: Report, seen: dedup.Seen, paragraphs: dedup.Seen | None) -> None:
    """Normalise in place and write every rule's verdict beside the text; `reasons` lists what speaks against keeping it."""
    document["text"], rewrites = filters.normalise(document["text"])
    report.rewrites.update(rewrites)
    document["text"], removed = filters.keep_paragraphs(document["text"], profile.get("paragraph", {}))
    report.paragraphs_dropped.update(removed)
    document["verdicts"] = filters.annotate(document["text"], profile.get("document", {}))
    document["reasons"] = filters.failed(document["verdicts"])
    if not document["text"]:
        document["reasons"].insert(0, "empty")
    elif not seen.add(document["text"]):
        document["reasons"].append("exact_duplicate")
    elif paragraphs is not None and not document["reasons"]:
        lines = document["text"].split("\n")
        fresh = [line for line in lines if paragraphs.add(line)]
        report.paragraphs_dropped["seen_before"] += len(lines) - len(fresh)
        document["text"] = "\n".join(fresh)
        if not fresh:
            document["reasons"].append("only_repeated_paragraphs")


def _drop(annotated: list[dict], report: Report) -> list[dict]:
    kept = []
    for document in annotated:
        if document["reasons"]:
            report.drop(document, document["reasons"])
        else:
            kept.append(document)
    return kept


# Dialogues


def _dialogues(settings: Settings, report: Report, protected: list[dict]) -> tuple[list[dict], list[dict]]:
    samples, licences = [], Counter()
    for path in _expand(settings.dialogues.files):
        for number, row in enumerate(run.read_jsonl(path), 1):
            if not isinstance(row.get("id"), str) or not isinstance(row.get("messages"), list):
                raise ValueError(f'{path}: sample {number} needs "id" and "messages"')
            sample = row | {"source": row.get("source", path.stem), "reasons": []}
            report.enter(sample["source"])
            licences[(sample["source"], row.get("licence"))] += 1
            samples.append(sample)
    texts = ["\n".join(message["content"] for message in sample["messages"]) for sample in samples]
    _decontaminate(samples, texts, settings.contamination, protected, report)
    return _drop(samples, report), [{"source": source, "licence": licence} for source, licence in licences]


# Test sets


def _protected(contamination: Contamination | None) -> list[dict]:
    """The utterances that no training text may carry: {"conversation_id", "turn", "text"}."""
    if contamination is None:
        return []
    if contamination.protect not in ("turns", "evidence"):
        raise ValueError(f"contamination.protect={contamination.protect!r}; use 'turns' or 'evidence'")
    conversations = [row for path in _expand(contamination.test_sets) for row in run.read_jsonl(path)]
    guilty: dict[str, set[int]] = {}  # pair_id -> turns with evidence in either twin
    for row in conversations:
        pair = row.get("pair_id") or row["conversation_id"]
        guilty.setdefault(pair, set()).update(item["turn"] for item in row.get("evidence", ()))
    return [
        {"conversation_id": row["conversation_id"], "turn": number, "text": turn["text"]}
        for row in conversations
        for number, turn in enumerate(row["turns"])
        if contamination.protect == "turns" or number in guilty[row.get("pair_id") or row["conversation_id"]]
    ]


def _decontaminate(
    rows: list[dict], texts: list[str], contamination: Contamination | None, protected: list[dict], report: Report
) -> None:
    """Adds the reason "contaminated" to rows that carry a protected utterance, whole, in part or nearly."""
    if not protected:
        return
    utterances = [item["text"] for item in protected]
    owners = [i for i, part in enumerate(texts) for _ in part.split("\n")]
    lines = [line for part in texts for line in part.split("\n")]
    hits = [(hit.train, hit) for hit in dedup.ngram_hits(texts, utterances, n=contamination.ngram)]
    near = dedup.near_hits(lines, utterances, threshold=contamination.jaccard)
    hits += [(owners[hit.train], hit) for hit in near]
    for i, hit in hits:
        found = protected[hit.protected]
        report.contaminated.append(
            {"id": rows[i]["id"], "conversation_id": found["conversation_id"], "turn": found["turn"]}
            | {"ngram": hit.overlap, "jaccard": round(hit.jaccard, 3)}
        )
        if "contaminated" not in rows[i]["reasons"]:
            rows[i]["reasons"].insert(0, "contaminated")


# Tokens and rows


def _tokenizer(settings: Settings, folder: Path, kept: list[dict]) -> text.Tokenizer:
    if settings.tokenizer:
        return text.load_tokenizer(settings.tokenizer)
    train = settings.train_tokenizer
    own = [value for path in _expand(train.texts) for row in run.read_jsonl(path) for value in _strings(row)]

    def texts() -> Iterator[str]:
        for document in kept:
            yield from _strings(document["text"] if "text" in document else document["messages"])
        for _ in range(train.repeat):
            yield from (filters.normalise(value)[0] for value in own)

    return text.train_bpe(
        texts(),
        vocab_size=train.vocab_size,
        folder=folder / "tokenizer",
        chat_template=text.LLAMA3_CHAT_TEMPLATE,
        special_tokens=text.SPECIAL_TOKENS,
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _split(kept: list[dict], heldout_share: float, seed: int) -> dict[str, list[dict]]:
    """Held out are the texts with the smallest hash, twins (one `pair_id`) together; at least one where a share is asked."""

    def key(row: dict) -> str:
        identity = row.get("pair_id") or row.get("text") or row["id"]
        return hashlib.sha256(f"{seed}:{identity}".encode()).hexdigest()

    if not 0 <= heldout_share < 1:
        raise ValueError(f"pack.heldout_share={heldout_share} must lie in [0, 1)")
    if not heldout_share:
        return {"train": kept}
    keys = [key(row) for row in kept]
    unique = sorted(set(keys))
    if len(unique) < 2:
        raise ValueError("one document cannot be split into train and heldout; set pack.heldout_share=0")
    held = set(unique[: max(1, min(len(unique) - 1, round(heldout_share * len(unique))))])
    return {
        "train": [row for row, k in zip(kept, keys, strict=True) if k not in held],
        "heldout": [row for row, k in zip(kept, keys, strict=True) if k in held],
    }


def _write_documents(
    writer: shards.ShardWriter, part: list[dict], tokenizer: text.Tokenizer, settings: Settings, report: Report, name: str
) -> None:
    counts: dict[str, Counter] = {}

    def encoded() -> Iterator[list[int]]:
        for document in _progress(part, f"tokens of {name}"):
            ids = tokenizer.encode(document["text"])
            counts.setdefault(document["source"], Counter()).update(documents=1, tokens=len(ids))
            yield ids

    rows = packing.pack_documents(
        encoded(),
        row_length=settings.pack.row_length,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_ids[0],
        pad_id=tokenizer.pad_id,
    )
    writer.write(rows)
    for source, count in counts.items():
        writer.add_source(source, **count)


def _write_samples(
    writer: shards.ShardWriter, part: list[dict], tokenizer: text.Tokenizer, settings: Settings, report: Report, name: str
) -> None:
    samples = []
    for sample in _progress(part, f"tokens of {name}"):
        messages = [{"role": message["role"], "content": message["content"]} for message in sample["messages"]]
        samples.append(tokenizer.chat_sample(messages, train_on=settings.dialogues.train_on))
    rows, left_out = packing.pack_samples(
        samples,
        row_length=settings.pack.row_length,
        pad_id=tokenizer.pad_id,
        too_long=settings.dialogues.too_long,
    )
    for i in left_out:
        report.drop(part[i], ["too_long"])
    writer.write(rows)
    counts: dict[str, Counter] = {}
    for i in sorted(set(range(len(part))) - set(left_out)):
        counts.setdefault(part[i]["source"], Counter()).update(documents=1, tokens=len(samples[i][0]))
    for source, count in counts.items():
        writer.add_source(source, **count)


# Files


def _expand(globs: Iterable[str]) -> list[Path]:
    """Files of the globs in a stable order; a glob that matches nothing is an error."""
    found = []
    for pattern in globs:
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise ValueError(f"nothing matches {pattern!r}; correct the path in the config")
        found += [Path(file) for file in files]
    return found


def _inputs(settings: Settings) -> dict[str, Path]:
    inputs = {f"domain:{Path(folder).name}": Path(folder) for folder in (settings.corpus.domains if settings.corpus else ())}
    files = list(settings.dialogues.files if settings.dialogues else ())
    files += settings.contamination.test_sets if settings.contamination else ()
    files += settings.train_tokenizer.texts if settings.train_tokenizer else ()
    inputs |= {str(path): path for path in _expand(files)}
    if settings.tokenizer:
        inputs["tokenizer"] = Path(settings.tokenizer)
    return inputs


def _progress(items: Iterable, what: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=" docs", disable=None, leave=False)


if __name__ == "__main__":
    door.launch(main, __doc__)
