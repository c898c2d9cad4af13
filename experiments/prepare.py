"""Raw documents or dialogues -> packed token shards, and a report of what went in, what was dropped, and why.

    python -m experiments.prepare --config=configs/prepare/tiny.py --workdir=runs/prepare/tiny

`config.corpus` reads domain folders: normalise, mask personal data, rules by source, duplicates, decontamination, tokenise, pack.
`config.dialogues` reads chat samples: decontaminate, render with the chat template, pack without splitting.
Writes train/ and heldout/ (shards), tokenizer/ where the config trains one, documents/ (every document with every verdict),
report.html, report.json, dropped.jsonl, failed.jsonl. A killed run goes on with the same command; `--config.engine.kind=local
--config.engine.workers=8` uses eight processes, `ray` and `slurm` more machines, for the same bytes.
"""

import dataclasses
import functools
import glob
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import corpus_page, door
from swallow_jax import run, text
from swallow_jax.data import chats, corpus, documents, engines, filters, mixture, shards, staging, summary
from swallow_jax.data.corpus import Contamination, Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogues:
    files: tuple  # globs of chat samples
    train_on: str  # 'last' | 'all'
    too_long: str  # 'error' | 'drop'


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
class Mix:
    """What continued pre-training shall read beside these shards; the share of replay stands in domain.yaml."""

    replay: tuple  # shard folders of general text
    chat: tuple  # shard folders of chat samples
    chat_share: float
    train_rows: int  # rows of the planned training: steps * batch size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int
    corpus: Corpus | None
    dialogues: Dialogues | None
    contamination: Contamination | None
    tokenizer: str | None  # a folder, or:
    train_tokenizer: TrainTokenizer | None
    pack: Pack
    mix: Mix | None
    engine: engines.Engine


def read_settings(config: Any) -> Settings:
    """The config as dataclasses, checked."""
    chosen = run.build(Settings, config.to_dict(), "config")
    for one, other in (("corpus", "dialogues"), ("tokenizer", "train_tokenizer")):
        if (getattr(chosen, one) is None) == (getattr(chosen, other) is None):
            raise ValueError(f"config: state one of {one} and {other}, the other one None")
    if chosen.mix and not chosen.corpus:
        raise ValueError("config: mix belongs to a corpus; chat samples are one of its parts")
    return chosen


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Prepare what the config names; returns documents_in, kept, dropped_by_reason, contamination_left, tokens, rows."""
    chosen = read_settings(config)
    # Where and on how many machines is no part of what is made: a run may go on with another engine.
    told = {name: value for name, value in config.to_dict().items() if name != "engine"}
    job = run.open_run(workdir, told, inputs=_inputs(chosen))
    if job.finished:
        shutil.rmtree(job.folder / "work", ignore_errors=True)
        print(f"{workdir} is finished; nothing to do", flush=True)
        return job.result
    return (_corpus if chosen.corpus else _dialogues)(chosen, job)


# Documents


def _corpus(chosen: Settings, job: run.Run) -> dict[str, Any]:
    if not 0 <= chosen.pack.heldout_share < 1:
        raise ValueError(f"the held-out share {chosen.pack.heldout_share} must lie in [0, 1)")
    settings = dataclasses.replace(chosen.corpus, domains=tuple(str(Path(folder).resolve()) for folder in chosen.corpus.domains))
    work = corpus.Job(
        folder=job.folder.resolve(),
        corpus=settings,
        contamination=chosen.contamination,
        test_files=_test_files(chosen.contamination),
        seed=chosen.seed,
        tokenizer=None,
    )
    clock = _Clock()
    tasks = corpus.plan(work)
    clock.ring("plan")

    # Annotate first ...
    annotated = corpus.run_stage(corpus.annotate, tasks, work, chosen.engine)
    clock.ring("annotate")
    failed = summary.merged(annotated, "failed")
    read = sum(part["documents"] for part in annotated)
    if not read + failed.total() - failed["empty"]:
        raise ValueError("the corpus is empty: check the sources of the domain and their paths")
    corpus.resolve(work, len(tasks))
    clock.ring("resolve")
    compared = corpus.run_stage(corpus.compare, tasks, work, chosen.engine)
    clock.ring("compare")

    # ... only now drop.
    corpus.decide(work, tasks, chosen.pack.heldout_share)
    clock.ring("decide")
    if next(corpus.kept_texts(work, len(tasks)), None) is None:
        first = next((f"; first failure: {row['where']}: {row['words']}" for row in corpus.read_failures(work, len(tasks))), "")
        raise ValueError(
            f"nothing is left of {read + failed.total()} documents: {_why(work, tasks, failed)}; loosen the profile{first}"
        )

    # Tokenise and pack.
    work = dataclasses.replace(work, tokenizer=_tokenizer(chosen, work.folder, corpus.kept_texts(work, len(tasks))))
    clock.ring("train_tokenizer")
    tasks = [task | {"job": work} for task in tasks]
    tokenised = corpus.run_stage(corpus.tokenise, tasks, work, chosen.engine)
    clock.ring("tokenise")
    shape = {"row_length": chosen.pack.row_length, "rows_per_shard": chosen.pack.rows_per_shard}
    indices = corpus.pack(work, tasks, **shape)
    clock.ring("pack")

    dropped = summary.merged(tokenised, "dropped")
    result = {
        "documents_in": read + failed.total(),
        "kept": read - dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "failed_by_reason": dict(sorted(failed.items())),
        "contamination_left": sum(len(part["left"]) for part in tokenised),
        "tokens": sum(index["tokens"] for index in indices.values()),
        "rows": {name: index["rows"] for name, index in indices.items()},
    }
    domains = [documents.load_domain(folder) for folder in chosen.corpus.domains]
    details = summary.details(domains, annotated, compared, tokenised)
    if chosen.mix:
        details["mixture"] = _mixture(chosen.mix, job.folder, domains)
    staging.sweep(work.folder / "documents")
    fields = ("id", "source", "reasons")
    reasons = ({name: row[name] for name in fields} for row in staging.read_documents(work.folder) if row["reasons"])
    staging.write_lines(job.folder / "dropped.jsonl", reasons)
    staging.write_lines(job.folder / "failed.jsonl", corpus.read_failures(work, len(tasks)))
    run.write_json(job.folder / "report.json", result | details)
    corpus_page.write(job.folder)
    print(f"{result['kept']:,} of {result['documents_in']:,} documents kept, {result['tokens']:,} tokens", flush=True)
    if failed:
        print(f"{failed.total():,} could not be read: {dict(failed)}; see {job.folder / 'failed.jsonl'}", flush=True)
    licences = sorted({entry["licence"] for entry in details["licences"]})
    sha256 = text.load_tokenizer(work.tokenizer).sha256
    clock.ring("report")
    job.note(licences=licences, attributions=details["licences"], tokenizer_sha256=sha256, seconds_by_stage=clock.seconds)
    job.finish(result)
    shutil.rmtree(work.work)
    return result


class _Clock:
    """Seconds of each stage, this time (a resumed run counts what was left)."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ring(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = round(now - self._last, 2), now


def _why(work: corpus.Job, tasks: list, failed: Counter) -> dict[str, int]:
    """First reasons of a corpus of which nothing is left."""
    rows = (row for number in range(len(tasks)) for row in staging.read_rows(work.part("compare", number, "jsonl.gz")))
    return dict(Counter(row["reasons"][0] if row["reasons"] else "sector_quota" for row in rows) + failed)


def _mixture(mix: Mix, folder: Path, domains: list[documents.Domain]) -> list[dict[str, Any]]:
    """Integer weights for the first domain's replay share, into mixture.json; the table of shares and epochs is printed."""
    parts = mixture.with_replay(
        str(folder / "train"),
        replay=mix.replay,
        replay_share=domains[0].replay_share if mix.replay else 0.0,
        chat=mix.chat,
        chat_share=mix.chat_share,
    )
    run.write_json(folder / "mixture.json", {"mixture": parts, "train_rows": mix.train_rows})
    print(mixture.table_text(parts, rows=mix.train_rows), flush=True)
    return mixture.table(parts, rows=mix.train_rows)


# Dialogues


def _dialogues(chosen: Settings, job: run.Run) -> dict[str, Any]:
    report = chats.Report()
    rows = list(chats.read(_expand(chosen.dialogues.files), report))
    if not rows:
        raise ValueError("the corpus is empty: check the globs of dialogues.files")
    test_files = _test_files(chosen.contamination)
    contaminated = chats.decontaminate(rows, test_files, chosen.contamination)
    for row in rows:
        if row["reasons"]:
            report.drop(row)
    kept = [row for row in rows if not row["reasons"]]
    if not kept:
        raise ValueError(f"nothing is left of {len(rows)} samples: {dict(report.dropped)}")
    left = chats.decontaminate([row | {"reasons": []} for row in kept], test_files, chosen.contamination)
    tokenizer = text.load_tokenizer(_tokenizer(chosen, job.folder, (row["text"] for row in kept)))
    keys = [row.get("pair_id") or row["text"] for row in kept]  # twins share a split
    held = shards.hold_out(keys, share=chosen.pack.heldout_share, seed=chosen.seed)
    indices = {}
    for name, wanted in (("train", False), ("heldout", True)):
        part = [row for row, is_held in zip(kept, held, strict=True) if is_held == wanted]
        if part:
            how = {"train_on": chosen.dialogues.train_on, "too_long": chosen.dialogues.too_long}
            shape = {"row_length": chosen.pack.row_length, "rows_per_shard": chosen.pack.rows_per_shard}
            chats.write(job.folder / name, part, tokenizer, report, **how, **shape)
            indices[name] = shards.read_index(job.folder / name)
    result = {
        "documents_in": len(rows),
        "kept": len(rows) - sum(report.dropped.values()),
        "dropped_by_reason": dict(report.dropped),
        "contamination_left": len(left),
        "tokens": sum(index["tokens"] for index in indices.values()),
        "rows": {name: index["rows"] for name, index in indices.items()},
    }
    print(f"{result['kept']:,} of {len(rows):,} samples kept, {result['tokens']:,} tokens", flush=True)
    details = {"sources": report.sources, "licences": report.licences, "contaminated": contaminated}
    run.write_jsonl(job.folder / "dropped.jsonl", report.dropped_rows)
    run.write_json(job.folder / "report.json", result | details)
    licences = sorted({entry["licence"] for entry in report.licences})
    job.note(licences=licences, attributions=report.licences, tokenizer_sha256=tokenizer.sha256)
    return job.finish(result)


# The tokenizer


def _tokenizer(settings: Settings, folder: Path, kept: Iterable[str]) -> Path:
    """The folder of the tokenizer: the one named, or one trained on the kept texts (once: a resumed run finds it)."""
    if settings.tokenizer:
        return Path(settings.tokenizer).resolve()
    if not (folder / "tokenizer" / "tokenizer.json").is_file():  # written last
        own = [value for path in _expand(settings.train_tokenizer.texts) for value in _strings(run.read_jsonl(path))]
        own = [value for value in own if filters.japanese_letters(value)]  # ids and enum values are no text
        text.train_bpe(
            # As they are: dialogues are not normalised before training either.
            itertools.chain(kept, own * settings.train_tokenizer.repeat),
            vocab_size=settings.train_tokenizer.vocab_size,
            folder=folder / "tokenizer",
            chat_template=text.LLAMA3_CHAT_TEMPLATE,
            special_tokens=text.SPECIAL_TOKENS,
        )
    return folder / "tokenizer"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


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


@functools.cache
def _test_files(contamination: Contamination | None) -> tuple[Path, ...]:
    """The conversation files of the globs; a task folder stands for its test and development sets."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where it exists
    files: list[Path] = []
    for path in _expand(contamination.test_sets) if contamination else ():
        if path.is_dir():
            if (path / "task.yaml").is_file():
                task = yaml.load((path / "task.yaml").read_text(encoding="utf-8"), Loader=loader)
                sets: Mapping[str, str] = {
                    **(task.get("test_sets") or {}),
                    **{f"dev {k}": v for k, v in (task.get("dev_sets") or {}).items()},
                }
                files += [path / name for name in sets.values() if (path / name).is_file()]
        else:
            files.append(path)
    if contamination and not files:
        raise ValueError(
            f"contamination.test_sets {contamination.test_sets} name no test set; correct them, or set contamination to None"
        )
    return tuple(dict.fromkeys(path.resolve() for path in files))


def _inputs(settings: Settings) -> dict[str, Path]:
    globs = [
        *(settings.dialogues.files if settings.dialogues else ()),
        *(settings.train_tokenizer.texts if settings.train_tokenizer else ()),
    ]
    folders = [Path(folder) for folder in (settings.corpus.domains if settings.corpus else ())]
    corrections = [Path(settings.corpus.corrections)] if settings.corpus and settings.corpus.corrections else []
    tests = [Path(os.path.relpath(path)) for path in _test_files(settings.contamination)]
    inputs = {str(path): path for path in [*_expand(globs), *tests, *folders, *corrections]}
    return inputs | ({"tokenizer": Path(settings.tokenizer)} if settings.tokenizer else {})


if __name__ == "__main__":
    door.launch(main, __doc__)
