"""Raw documents or dialogues -> packed token shards, and a report of what went in, what was dropped, and why.

    python -m experiments.prepare --config=configs/prepare/tiny.py --workdir=runs/prepare/tiny

`config.corpus` reads domain folders: normalise, rules by source, duplicates, decontamination, tokenise, pack.
`config.dialogues` reads chat samples: decontaminate, render with the chat template, pack without splitting.
Writes train/ and heldout/ (shards), tokenizer/ where the config trains one, report.json and dropped.jsonl.
"""

import dataclasses
import glob
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
    root: str  # where each source's `place` begins: "/" or an unpacked tree
    unique_paragraphs: bool  # drop a paragraph met before, in any document
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
    protect: str  # 'turns' | 'evidence', see dedup.protected_utterances
    ngram: int
    jaccard: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    vocab_size: int
    texts: tuple  # globs of JSONL files whose Japanese strings join the corpus
    repeat: int  # how often those strings count


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
    tokenizer: str | None  # a folder, or:
    train_tokenizer: TrainTokenizer | None
    pack: Pack


def read_settings(config: Any) -> Settings:
    """The config as dataclasses, checked."""
    chosen = run.build(Settings, config.to_dict(), "config")
    for one, other in (("corpus", "dialogues"), ("tokenizer", "train_tokenizer")):
        if (getattr(chosen, one) is None) == (getattr(chosen, other) is None):
            raise ValueError(f"config: state one of {one} and {other}, the other one None")
    return chosen


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Prepare what the config names; returns documents_in, kept, dropped_by_reason, contamination_left, tokens, rows."""
    chosen = read_settings(config)
    job = run.open_run(workdir, config.to_dict(), inputs=_inputs(chosen))
    if job.finished:
        print(f"{workdir} is finished; nothing to do", flush=True)
        return job.result

    # Read, and annotate every document with what speaks against it.
    report = Report()
    rows = list(_read_corpus(chosen.corpus, report) if chosen.corpus else _read_samples(chosen.dialogues, report))
    protected = _protected(chosen.contamination)
    report.contaminated = _decontaminate(rows, protected, chosen.contamination)
    if chosen.corpus:
        _mark_near_duplicates(rows, chosen.corpus, chosen.seed)

    # Only now drop.
    kept = [row for row in rows if not row["reasons"]]
    for row in rows:
        if row["reasons"]:
            report.drop(row)
    if not report.documents_in:
        raise ValueError("the corpus is empty: check the sources of the domain and their paths")
    if not kept:
        raise ValueError(f"nothing is left of {report.documents_in} documents: {dict(report.dropped)}; loosen the profile")
    left = _decontaminate(kept, protected, chosen.contamination)

    # Tokenise and pack.
    tokenizer = _tokenizer(chosen, job.folder, kept)
    keys = [row.get("pair_id") or row["text"] for row in kept]  # twins share a split
    held = shards.hold_out(keys, share=chosen.pack.heldout_share, seed=chosen.seed)
    indices = {}
    for name, wanted in (("train", False), ("heldout", True)):
        part = [row for row, is_held in zip(kept, held, strict=True) if is_held == wanted]
        if part:
            _write(job.folder / name, part, tokenizer, chosen, report)
            indices[name] = shards.read_index(job.folder / name)

    result = {
        "documents_in": report.documents_in,
        "kept": report.documents_in - sum(report.dropped.values()),
        "dropped_by_reason": dict(report.dropped),
        "contamination_left": len(left),
        "tokens": sum(index["tokens"] for index in indices.values()),
        "rows": {name: index["rows"] for name, index in indices.items()},
    }
    print(f"{result['kept']:,} of {report.documents_in:,} documents kept, {result['tokens']:,} tokens", flush=True)
    run.write_jsonl(job.folder / "dropped.jsonl", report.dropped_rows)
    run.write_json(job.folder / "report.json", result | report.details())
    licences = sorted({entry["licence"] for entry in report.licences})
    job.note(licences=licences, attributions=report.licences, tokenizer_sha256=tokenizer.sha256)
    return job.finish(result)


class Report:
    """What became of every document: in = kept + dropped, each drop counted under its first reason."""

    def __init__(self):
        self.documents_in = 0
        self.dropped, self.paragraphs, self.rewrites, self.seed_words = Counter(), Counter(), Counter(), Counter()
        self.sources: dict[str, Counter] = {}
        self.licences: list[dict] = []
        self.dropped_rows: list[dict] = []
        self.contaminated: list[dict] = []

    def enter(self, source: str, **counts: int) -> None:
        self.documents_in += 1
        self.sources.setdefault(source, Counter()).update(documents_in=1, **counts)

    def drop(self, row: dict) -> None:
        self.dropped[row["reasons"][0]] += 1
        self.sources[row["source"]][f"dropped: {row['reasons'][0]}"] += 1
        self.dropped_rows.append({field: row[field] for field in ("id", "source", "reasons")})

    def details(self) -> dict[str, Any]:
        return {
            "sources": self.sources,
            "licences": self.licences,
            "paragraphs_dropped": self.paragraphs,
            "characters_rewritten": self.rewrites,
            "documents_with_seed_word": self.seed_words,
            "contaminated": self.contaminated,
        }


# Reading: rows {"id", "text", "source", "reasons", ...}


def _read_corpus(corpus: Corpus, report: Report) -> Iterator[dict]:
    seen, paragraphs = dedup.Seen(), dedup.Seen()
    for domain in map(documents.load_domain, corpus.domains):
        for source in domain.sources:
            report.licences.append({"source": source.id, "licence": source.licence, "attribution": source.attribution})
            profile = domain.profiles[source.profile]
            for file in _progress(source.files(domain.folder, Path(corpus.root)), source.id, "files"):
                for row in source.read(file, domain.folder, Path(corpus.root)):
                    report.enter(source.id)
                    row |= filters.clean(row["text"], profile)._asdict()
                    report.rewrites.update(row.pop("rewrites"))
                    report.paragraphs.update(row.pop("removed"))
                    report.seed_words.update(word for word in domain.seed_words if word in row["text"])
                    if row["text"] and not seen.add(row["text"]):
                        row["reasons"].append("exact_duplicate")
                    elif corpus.unique_paragraphs and not row["reasons"]:
                        _drop_repeated_paragraphs(row, paragraphs, report)
                    yield row


def _drop_repeated_paragraphs(row: dict, paragraphs: dedup.Seen, report: Report) -> None:
    lines = row["text"].split("\n")
    fresh = [line for line in lines if paragraphs.add(line)]
    report.paragraphs["seen_before"] += len(lines) - len(fresh)
    row["text"] = "\n".join(fresh)
    if not fresh:
        row["reasons"].append("only_repeated_paragraphs")


def _read_samples(dialogues: Dialogues, report: Report) -> Iterator[dict]:
    licences: dict[str, str] = {}
    for path in _expand(dialogues.files):
        for number, row in enumerate(run.iter_jsonl(path), 1):
            if not row.get("id") or not isinstance(row.get("messages"), list):
                raise ValueError(f'{path}: sample {number} is no chat sample {{"id", "messages": [{{"role", "content"}}]}}')
            source = row.get("source") or path.stem
            licences[source] = row.get("licence") or "not stated"
            report.enter(source)
            content = "\n".join(message["content"] for message in row["messages"])
            yield row | {"source": source, "text": content, "reasons": []}
    report.licences = [{"source": source, "licence": licence} for source, licence in licences.items()]


# Test sets and near duplicates: reasons that need more than one document


def _protected(contamination: Contamination | None) -> list[dict]:
    if contamination is None:
        return []
    conversations = (row for path in _expand(contamination.test_sets) for row in run.iter_jsonl(path))
    return dedup.protected_utterances(conversations, contamination.protect)


def _decontaminate(rows: list[dict], protected: list[dict], contamination: Contamination | None) -> list[dict]:
    """Adds the reason "contaminated" where a row carries a protected utterance, in part or nearly; lists each find."""
    if not protected:
        return []
    utterances = [item["text"] for item in protected]
    found = []
    for hit in dedup.leaks([row["text"] for row in rows], utterances, ngram=contamination.ngram, threshold=contamination.jaccard):
        row, item = rows[hit.train], protected[hit.protected]
        if "contaminated" not in row["reasons"]:
            row["reasons"].insert(0, "contaminated")
        found.append(
            {"id": row["id"], "conversation_id": item["conversation_id"], "turn": item["turn"]}
            | {"ngram": hit.overlap, "jaccard": round(hit.jaccard, 3)}
        )
    return found


def _mark_near_duplicates(rows: list[dict], corpus: Corpus, seed: int) -> None:
    good = [row for row in rows if not row["reasons"]]
    texts = [row["text"] for row in good]
    first = dedup.near_duplicates(texts, bands=corpus.near_bands, rows=corpus.near_rows, seed=seed)
    for i, row in enumerate(good):
        if first[i] != i:
            row["reasons"].append("near_duplicate")


# Tokens and rows


def _tokenizer(settings: Settings, folder: Path, kept: list[dict]) -> text.Tokenizer:
    if settings.tokenizer:
        return text.load_tokenizer(settings.tokenizer)
    own = [value for path in _expand(settings.train_tokenizer.texts) for value in _strings(run.read_jsonl(path))]
    own = [value for value in own if filters.japanese_letters(value)]  # ids and enum values are no text
    return text.train_bpe(
        # As they are: dialogues are not normalised before training either.
        [row["text"] for row in kept] + own * settings.train_tokenizer.repeat,
        vocab_size=settings.train_tokenizer.vocab_size,
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


def _write(folder: Path, part: list[dict], tokenizer: text.Tokenizer, settings: Settings, report: Report) -> None:
    """Tokenise, pack and store one split, and count what each source contributes."""
    contributed: dict[str, Counter] = {}

    def count(row: dict, ids: list[int]) -> None:
        contributed.setdefault(row["source"], Counter()).update(documents=1, tokens=len(ids))
        characters, japanese = len(row["text"]), int(filters.japanese_letters(row["text"]))
        report.sources[row["source"]].update(kept=1, characters=characters, japanese_characters=japanese, tokens=len(ids))

    def encoded() -> Iterator[list[int]]:
        for row in _progress(part, f"tokens of {folder.name}", "docs"):
            ids = tokenizer.encode(row["text"])
            count(row, ids)
            yield ids

    with shards.ShardWriter(
        folder,
        row_length=settings.pack.row_length,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        rows_per_shard=settings.pack.rows_per_shard,
    ) as writer:
        shape = {"row_length": settings.pack.row_length, "pad_id": tokenizer.pad_id}
        if settings.corpus:
            controls = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_ids[0]}
            writer.write(packing.pack_documents(encoded(), **shape, **controls))
        else:
            train_on = settings.dialogues.train_on
            samples = [tokenizer.chat_sample(_messages(row), train_on=train_on) for row in part]
            packed, left_out = packing.pack_samples(samples, **shape, too_long=settings.dialogues.too_long)
            for i, row in enumerate(part):
                if i in set(left_out):
                    report.drop(row | {"reasons": ["too_long"]})
                else:
                    count(row, samples[i][0])
            writer.write(packed)
        for source, counts in contributed.items():
            writer.add_source(source, **counts)


def _messages(row: dict) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]


# Files


def _expand(globs: Iterable[str]) -> list[Path]:
    """Files of the globs in a stable order; a glob that matches nothing is an error."""
    found = []
    for pattern in globs:
        files = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (patterns may be absolute)
        if not files:
            raise ValueError(f"nothing matches {pattern!r}; correct the path in the config")
        found += map(Path, files)
    return found


def _inputs(settings: Settings) -> dict[str, Path]:
    globs = [
        *(settings.dialogues.files if settings.dialogues else ()),
        *(settings.contamination.test_sets if settings.contamination else ()),
        *(settings.train_tokenizer.texts if settings.train_tokenizer else ()),
    ]
    folders = [Path(folder) for folder in (settings.corpus.domains if settings.corpus else ())]
    inputs = {str(path): path for path in [*_expand(globs), *folders]}
    return inputs | ({"tokenizer": Path(settings.tokenizer)} if settings.tokenizer else {})


def _progress(items: Iterable, what: str, unit: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=f" {unit}", disable=None, leave=False)


if __name__ == "__main__":
    door.launch(main, __doc__)
