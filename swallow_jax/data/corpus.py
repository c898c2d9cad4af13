"""A corpus in stages: annotate every document, look across documents, decide, tokenise, pack.

    annotate  each document alone: normalised, personal data masked, every rule's verdict        tasks
    resolve   exact duplicates, repeated paragraphs, repeated ids: by digests alone              here
    compare   paragraphs taken out, held against the test sets, MinHash keys                      tasks
    decide    near duplicates, sector quotas, which documents are held out                        here
    tokenise  the final annotated documents, token ids of the kept ones, all counts               tasks
    pack      fixed rows in the order of the documents                                            here

A task is some pieces of one source's files. Between stages lie files in work/, whole or absent, so that a killed job goes on
at the first task without a result; what a stage here does is done again from them. Memory holds digests and keys, never
texts: about 450 bytes a document and 25 a paragraph, most of it in files mapped to memory.
"""

import array
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swallow_jax import run, text
from swallow_jax.data import dedup, documents, engines, filters, packing, shards, staging
from swallow_jax.data.readers import Failure, Piece

_BATCH = 64  # documents that are held against the test sets at a time
_SAMPLES = 3  # documents of each kind of decision that the report shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    domains: tuple  # domain folders
    root: str  # where each source's `place` begins: "/" or an unpacked tree
    mask: tuple  # kinds of personal data that become tokens, see privacy.TOKENS
    unique_paragraphs: bool  # drop a paragraph met before, in any document
    near_bands: int
    near_rows: int
    corrections: str | None  # decisions of experts that overrule the rules, as tools.review import writes them
    task_mb: float  # of input in a task; the result does not depend on it
    max_document_mb: float  # the longest line or file that is one document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contamination:
    test_sets: tuple  # globs of conversation files, or of task folders (their test_sets and dev_sets)
    protect: str  # 'turns' | 'evidence', see dedup.protected_utterances
    ngram: int
    jaccard: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that a task must know; it travels to the worker, so its paths are absolute."""

    folder: Path  # the run folder
    corpus: Corpus
    contamination: Contamination | None
    test_files: tuple[Path, ...]
    seed: int
    tokenizer: Path | None  # from `tokenise` on

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def part(self, stage: str, number: int, suffix: str) -> Path:
        return self.work / stage / f"{number:05d}.{suffix}"


# The plan


def plan(job: Job) -> list[dict[str, Any]]:
    """The tasks: pieces of files, in the order of domains, sources and files; kept in work/plan.json.

    Raises ValueError where the files are not those with which the job began.
    """
    target = max(1, int(job.corpus.task_mb * 2**20))
    tasks, sizes = [], {}
    for index, domain in enumerate(_domains(job.corpus.domains)):
        for source in domain.sources:
            pending, room = [], 0
            for piece in source.pieces(domain.folder, Path(job.corpus.root), target):
                size = piece.path.stat().st_size if piece.path.exists() else 0
                sizes[str(piece.path)] = size
                length = (
                    (piece.end - piece.begin) if piece.end is not None and piece.path.suffix != ".parquet" else min(size, target)
                )
                if pending and room + length > target:
                    tasks.append({"domain": index, "source": source.id, "pieces": pending})
                    pending, room = [], 0
                pending.append([str(piece.path), piece.name, piece.begin, piece.end, piece.first])
                room += length
            tasks.append({"domain": index, "source": source.id, "pieces": pending})
    made = {"tasks": tasks, "bytes": sizes}
    path = job.work / "plan.json"
    if not path.is_file():
        run.write_json(path, made)
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != made:
        changed = sorted(set(before["bytes"].items()) ^ set(sizes.items()))
        raise ValueError(f"{changed[0][0] if changed else 'a source'} has changed since this run began; choose another --workdir")
    return [task | {"job": job, "number": number} for number, task in enumerate(tasks)]


@functools.lru_cache(maxsize=4)
def _domains(folders: tuple[str, ...]) -> list[documents.Domain]:
    return [documents.load_domain(folder) for folder in folders]


# Annotate


def annotate(task: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the task's pieces; writes rows with verdicts, failures, and digests. Returns counts."""
    job: Job = task["job"]
    domain = _domains(job.corpus.domains)[task["domain"]]
    source = next(source for source in domain.sources if source.id == task["source"])
    profile, corrections = domain.profiles[source.profile], _corrections(job.corpus.corrections)
    counts = _counts("rewrites", "removed", "masked", "seed_words", "failed", "overruled")
    digests = {name: [] for name in ("document", "id", "paragraph")}
    filled, good, lengths = [], [], []

    def rows() -> Iterator[dict[str, Any]]:
        for path, name, begin, end, first in task["pieces"]:
            piece = Piece(path=Path(path), name=name, begin=begin, end=end, first=first)
            for row in source.read_piece(piece, int(job.corpus.max_document_mb * 2**20)):
                if isinstance(row, Failure):
                    counts["failed"][row.kind] += 1
                    base = f"{domain.folder if source.path else Path(job.corpus.root)}/"
                    failures.append({"source": source.id} | row._asdict() | {"where": row.where.removeprefix(base)})
                    continue
                found = filters.clean(row["text"], profile, job.corpus.mask)
                for kind in ("rewrites", "removed", "masked"):
                    counts[kind].update(getattr(found, kind))
                counts["seed_words"].update(word for word in domain.seed_words if word in found.text)
                reasons = list(found.reasons)
                decision = corrections.get((source.id, row["id"]))
                if decision and found.text and (decision == "drop") != bool(reasons):
                    counts["overruled"][decision] += 1
                    reasons = ["expert"] if decision == "drop" else []
                if row["licence"] != source.licence and not source.reason:
                    reasons.insert(0, "other_licence")
                lines = found.text.split("\n") if found.text else []
                digests["document"].append(dedup.digest(found.text))
                digests["id"].append(dedup.digest(f"{source.id}:{row['id']}"))
                digests["paragraph"] += map(dedup.digest, lines)
                filled.append(bool(found.text))
                good.append(not reasons)
                lengths.append(len(lines))
                row |= {"text": found.text, "reasons": reasons, "masked": found.masked, "statistics": found.statistics}
                yield row | {"verdicts": found.verdicts}

    failures: list[dict[str, Any]] = []
    staging.write_rows(job.part("annotate", task["number"], "jsonl.gz"), rows())
    staging.write_rows(job.part("annotate", task["number"], "failed.gz"), failures)
    arrays = {name: np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2) for name, parts in digests.items()}
    flags = {"filled": np.array(filled, bool), "good": np.array(good, bool), "lines": np.array(lengths, np.int32)}
    staging.write_arrays(job.part("annotate", task["number"], "npz"), **arrays, **flags)
    return counts | {"documents": len(filled), "source": source.id, "licence": source.licence}


@functools.lru_cache(maxsize=4)
def _corrections(path: str | None) -> dict[tuple[str, str], str]:
    """(source, id) -> 'keep' | 'drop'; of several corrections of one document the last counts."""
    if path is None:
        return {}
    found = {}
    for number, row in run.numbered_jsonl(path):
        if row.get("decision") not in ("keep", "drop"):
            raise ValueError(f"{path}:{number}: decision {row.get('decision')!r} is neither keep nor drop")
        found[row["source"], row["id"]] = row["decision"]
    return found


# Resolve


def resolve(job: Job, count: int) -> None:
    """Which documents, ids and paragraphs were met before; the first in the order of the corpus stays."""
    parts = [staging.read_arrays(job.part("annotate", number, "npz")) for number in range(count)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    filled, good, lines = joined("filled"), joined("good"), joined("lines")
    copies = filled & ~dedup.first_seen(joined("document"), filled)
    again = ~dedup.first_seen(joined("id"))
    renamed = np.where(again, np.arange(len(again)), -1)  # by the place in the corpus, whatever the tasks
    among = np.repeat(good & ~copies, lines)
    if job.corpus.unique_paragraphs:
        keep = dedup.first_seen(joined("paragraph"), among) | ~among
    else:
        keep = np.ones(len(among), bool)
    documents_before = paragraphs_before = 0
    for number, part in enumerate(parts):
        own = slice(documents_before, documents_before + len(part["filled"]))
        theirs = slice(paragraphs_before, paragraphs_before + int(part["lines"].sum()))
        staging.write_arrays(job.part("resolve", number, "npz"), copies=copies[own], renamed=renamed[own], keep=keep[theirs])
        documents_before, paragraphs_before = own.stop, theirs.stop


# Compare


def compare(task: Mapping[str, Any]) -> dict[str, Any]:
    """Takes repeated paragraphs out, holds texts against the test sets, and makes the keys of near duplicates."""
    job, number = task["job"], task["number"]
    known = staging.read_arrays(job.part("resolve", number, "npz"))
    counts = _counts("paragraphs")
    keys, good, held, lengths = [], [], [], []

    def cleaned() -> Iterator[dict[str, Any]]:
        place = 0
        for i, row in enumerate(staging.read_rows(job.part("annotate", number, "jsonl.gz"))):
            lines = row["text"].split("\n") if row["text"] else []
            keep = known["keep"][place : place + len(lines)]
            place += len(lines)
            if known["renamed"][i] >= 0:  # ids name documents in reviews and reports: they must differ
                row["id"] = f"{row['id']}~{known['renamed'][i]}"
            if known["copies"][i]:
                row["reasons"].append("exact_duplicate")
            elif not row["reasons"] and not keep.all():
                counts["paragraphs"]["seen_before"] += int((~keep).sum())
                row["text"] = "\n".join(line for line, fresh in zip(lines, keep, strict=True) if fresh)
                if not row["text"]:
                    row["reasons"].append("only_repeated_paragraphs")
            yield row

    def rows() -> Iterator[dict[str, Any]]:
        for batch in _batches(cleaned(), _BATCH):
            _decontaminate(batch, job)
            texts = [row["text"] for row in batch if not row["reasons"]]
            signatures = dedup.sketches(texts, num_perm=job.corpus.near_bands * job.corpus.near_rows, seed=job.seed)
            keys.append(dedup.band_keys(signatures, job.corpus.near_bands))
            for row in batch:
                good.append(not row["reasons"])
                lengths.append(len(row["text"]))
                key = str(row.get("pair_id") or row["text"])  # twins share a split
                held.append(hashlib.sha256(f"{job.seed}:{key}".encode()).digest()[:16])
                yield row

    path = job.part("compare", number, "jsonl.gz")
    staging.write_rows(path, rows())
    bands = np.concatenate([np.zeros((0, job.corpus.near_bands), np.uint64), *keys])
    ranks = np.frombuffer(b"".join(held), ">u8").reshape(-1, 2).astype(np.uint64)
    staging.write_arrays(
        job.part("compare", number, "npz"),
        keys=bands,
        good=np.array(good, bool),
        ranks=ranks,
        lengths=np.array(lengths, np.int64),
    )
    return counts


def _decontaminate(rows: list[dict[str, Any]], job: Job) -> None:
    """Adds the reason "contaminated", before all others, and what was found."""
    if not job.test_files:
        return
    items, index = protected(job.test_files, job.contamination)
    for hit in index.hits([row["text"] for row in rows]):
        row, item = rows[hit.train], items[hit.protected]
        if "contaminated" not in row["reasons"]:
            row["reasons"].insert(0, "contaminated")
        row.setdefault("contaminated", []).append(
            {"test_set": item["test_set"], "conversation_id": item["conversation_id"], "turn": item["turn"]}
            | {"ngram": hit.overlap, "jaccard": round(hit.jaccard, 3)}
        )


@functools.lru_cache(maxsize=2)
def protected(files: tuple[Path, ...], settings: Contamination) -> tuple[list[dict[str, Any]], dedup.Protected]:
    """The utterances of all test sets with where they stand, and their index."""
    items = [
        item | {"test_set": f"{path.parent.name}/{path.name}"}
        for path in files
        for item in dedup.protected_utterances(run.iter_jsonl(path), settings.protect)
    ]
    return items, dedup.Protected([item["text"] for item in items], ngram=settings.ngram, threshold=settings.jaccard)


# Decide


def decide(job: Job, tasks: list[Mapping[str, Any]], heldout_share: float) -> None:
    """Near duplicates, quotas and the held-out split, for every document."""
    parts = [staging.read_arrays(job.part("compare", number, "npz"), without=("keys",)) for number in range(len(tasks))]
    good = np.concatenate([part["good"] for part in parts])
    keys = _mapped_keys(job, len(tasks), int(good.sum()))
    near = np.zeros(len(good), bool)
    near[good] = dedup.clusters(keys) != np.arange(len(keys))
    del keys
    (job.work / "keys.bin").unlink()
    lengths = np.concatenate([part["lengths"] for part in parts])
    ranks = np.concatenate([part["ranks"] for part in parts])
    kept = good & ~near
    over = _over_quota(job, tasks, parts, kept, lengths, ranks)
    kept &= ~over
    held = shards.hold_out_ranks(ranks, kept, share=heldout_share)
    begin = 0
    for number, part in enumerate(parts):
        own = slice(begin, begin + len(part["good"]))
        staging.write_arrays(job.part("decide", number, "npz"), near=near[own], over=over[own], held=held[own])
        begin = own.stop


def _mapped_keys(job: Job, count: int, size: int) -> np.ndarray:
    """All band keys [size, bands], column by column in a file: 320 bytes a document need not be memory."""
    bands = job.corpus.near_bands
    if not size:
        (job.work / "keys.bin").touch()
        return np.zeros((0, bands), np.uint64)
    keys = np.memmap(job.work / "keys.bin", np.uint64, "w+", shape=(bands, size))
    begin = 0
    for number in range(count):
        part = staging.read_arrays(job.part("compare", number, "npz"), only=("keys",))["keys"]
        keys[:, begin : begin + len(part)] = part.T
        begin += len(part)
    keys.flush()
    return keys.T


def _over_quota(job, tasks, parts, kept: np.ndarray, lengths: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """bool [documents]: what a sector has beyond its share of the domain's characters; which documents go is drawn by hash."""
    over = np.zeros(len(kept), bool)
    domains = _domains(job.corpus.domains)
    if not any(domain.quotas for domain in domains):
        return over
    sizes = [len(part["good"]) for part in parts]
    of_domain = np.repeat([task["domain"] for task in tasks], sizes)
    sectors = np.array(
        [row.get("sector", "") for n in range(len(parts)) for row in staging.read_rows(job.part("compare", n, "jsonl.gz"))]
    )
    for number, domain in enumerate(domains):
        inside = kept & (of_domain == number)
        have = {sector: int(lengths[inside & (sectors == sector)].sum()) for sector in np.unique(sectors[inside]).tolist()}
        allowed = quota_characters(have, domain.quotas)
        for sector in domain.quotas:
            places = np.flatnonzero(inside & (sectors == sector))
            order = places[np.lexsort((places, ranks[places, 1], ranks[places, 0]))]
            over[order[np.cumsum(lengths[order]) > allowed.get(sector, 0)]] = True
    return over


def quota_characters(have: Mapping[str, int], quotas: Mapping[str, float]) -> dict[str, int]:
    """How many characters each sector may keep, so that none has more than its share of what is kept, and most is kept.

    With all bounded sectors at their bound the total T solves T = free + T * (sum of their quotas); a sector that has less
    than that is no bound.
    """
    bounded = {sector for sector in have if sector in quotas}
    while True:
        free = sum(size for sector, size in have.items() if sector not in bounded)
        share = sum(quotas[sector] for sector in bounded)
        total = free / (1 - share) if share < 1 - 1e-12 else (float("inf") if free else 0.0)
        if share >= 1 - 1e-12 and not free:
            total = min((have[sector] / quotas[sector] for sector in bounded), default=0.0)
            break
        loose = {sector for sector in bounded if have[sector] <= quotas[sector] * total}
        if not loose:
            break
        bounded -= loose
    return {sector: int(quotas[sector] * total) if sector in bounded else size for sector, size in have.items()}


# Tokenise


def tokenise(task: Mapping[str, Any]) -> dict[str, Any]:
    """The final rows with their decisions, the ids of the kept ones, and what the report counts."""
    job, number = task["job"], task["number"]
    tokenizer, domain = _tokenizer(job.tokenizer), _domains(job.corpus.domains)[task["domain"]]
    decided = staging.read_arrays(job.part("decide", number, "npz"))
    counts = _counts("dropped", "of_source", "sectors", "glossary", "lengths", "would_drop")
    ids = array.array("I")  # a list of Python integers would take nine times the room
    ends, held, samples, leaks, left = [0], [], {}, [], []

    def rows() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(staging.read_rows(job.part("compare", number, "jsonl.gz"))):
            row["reasons"] += ["near_duplicate"] * bool(decided["near"][i]) + ["sector_quota"] * bool(decided["over"][i])
            row["split"] = None if row["reasons"] else "heldout" if decided["held"][i] else "train"
            counts["would_drop"].update(filters.failed(filters.annotate("", filters.SWALLOW_V1, row["statistics"])))
            if row["reasons"]:
                counts["dropped"][row["reasons"][0]] += 1
                leaks.extend({"id": row["id"], "source": row["source"]} | hit for hit in row.get("contaminated", ()))
            else:
                keep(row)
            sample(row)
            yield row

    def keep(row: dict[str, Any]) -> None:
        own = tokenizer.encode(row["text"])
        ids.extend(own)
        ends.append(len(ids))
        held.append(row["split"] == "heldout")
        size, japanese = len(row["text"]), int(filters.japanese_letters(row["text"]))
        counts["of_source"].update(kept=1, characters=size, japanese_characters=japanese, tokens=len(own))
        counts["sectors"][f"{row.get('sector', 'not stated')}"] += size
        counts["lengths"][str(1 << max(size - 1, 0).bit_length())] += 1  # the next power of two
        counts["glossary"].update(term for term in domain.glossary if term in row["text"])
        if job.test_files and (hits := protected(job.test_files, job.contamination)[1].ngram_hits(row["text"])):
            left.extend(hit.overlap for hit in hits)

    def sample(row: dict[str, Any]) -> None:
        """Of each decision the documents with the smallest hashes: a fair draw that does not depend on the tasks."""
        rank = hashlib.sha256(f"{job.seed}:{row['source']}:{row['id']}".encode()).hexdigest()[:16]
        drawn = samples.setdefault(row["reasons"][0] if row["reasons"] else "kept", [])
        drawn.append({"rank": rank, "id": row["id"], "source": row["source"], "text": row["text"][:400]})
        drawn.sort(key=lambda one: one["rank"])
        del drawn[_SAMPLES:]

    staging.write_rows(job.folder / "documents" / f"{number:05d}.jsonl.gz", rows())
    staging.write_arrays(
        job.part("tokens", number, "npz"),
        ids=np.frombuffer(ids, np.uint32) if ids else np.zeros(0, np.uint32),
        ends=np.array(ends, np.int64),
        held=np.array(held, bool),
    )
    return counts | {"samples": samples, "contaminated": leaks, "left": left}


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: Path) -> text.Tokenizer:
    return text.load_tokenizer(folder)


def kept_texts(job: Job, count: int) -> Iterator[str]:
    """Texts of the documents that stay, in order, before they are tokenised."""
    for number in range(count):
        decided = staging.read_arrays(job.part("decide", number, "npz"))
        for i, row in enumerate(staging.read_rows(job.part("compare", number, "jsonl.gz"))):
            if not row["reasons"] and not decided["near"][i] and not decided["over"][i]:
                yield row["text"]


# Pack


def pack(job: Job, tasks: list[Mapping[str, Any]], *, row_length: int, rows_per_shard: int) -> dict[str, dict]:
    """Writes train/ and heldout/ from the token ids; returns the index of each that has rows."""
    tokenizer, indices = _tokenizer(job.tokenizer), {}
    for name, wanted in (("train", False), ("heldout", True)):
        contributed: dict[str, Counter] = {}

        def sequences(wanted: bool = wanted, contributed: dict = contributed) -> Iterator[np.ndarray]:
            for task in tasks:
                part = staging.read_arrays(job.part("tokens", task["number"], "npz"))  # document i is ids[ends[i] : ends[i + 1]]
                for begin, end, held in zip(part["ends"][:-1], part["ends"][1:], part["held"], strict=True):
                    if held == wanted:
                        # Sources come one after the other, so where each begins tells of every row which one it is from.
                        counts = contributed.setdefault(task["source"], Counter(first_row=writer.rows))
                        counts.update(documents=1, tokens=int(end - begin))
                        yield part["ids"][begin:end]

        if not any((staging.read_arrays(job.part("tokens", task["number"], "npz"))["held"] == wanted).any() for task in tasks):
            continue
        with shards.ShardWriter(
            job.folder / name,
            row_length=row_length,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            rows_per_shard=rows_per_shard,
        ) as writer:
            controls = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_ids[0], "pad_id": tokenizer.pad_id}
            writer.write(packing.pack_documents(sequences(), row_length=row_length, **controls))
            for source, counts in contributed.items():
                writer.add_source(source, **counts)
        indices[name] = shards.read_index(job.folder / name)
    return indices


# Small parts


def read_failures(job: Job, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield from staging.read_rows(job.part("annotate", number, "failed.gz"))


def _counts(*names: str) -> dict[str, Counter]:
    return {name: Counter() for name in names}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


Stage = Callable[[Mapping[str, Any]], dict[str, Any]]


def run_stage(stage: Stage, tasks: list[Mapping[str, Any]], job: Job, engine: engines.Engine) -> list[dict[str, Any]]:
    return engines.run_tasks(stage, tasks, engine=engine, folder=job.work, name=stage.__name__)
