"""How fast a Japanese corpus becomes packed shards, beside HojiChar's rules and datasketch's near duplicates in the same run.

    python -m tools.bench prepare --mb=64 --workers=2

Makes JSON lines of that size (sentences of the project's own texts, with figures, names and telephone numbers drawn in), and runs
experiments.prepare on them in a process of its own: all published rules, personal data, exact and near duplicates (40 x 20),
decontamination against configs/tasks, tokenising with configs/base, packing. mb_per_s counts bytes of UTF-8 input over the
whole run, starting Python included; memory is the anonymous memory of all its processes together (smaps, every 0.2 s).

Then, in one process each, on the same documents: our rules against HojiChar's filters of the same kinds (normalising, length,
Japanese, sentence length, ellipses, repetition of 2- to 10-grams, personal data; thresholds that reject nothing, so that every
filter sees every document), and our near duplicates against datasketch's MinHash and LSH with as many permutations (800) over
the same character 5-grams.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CONFIG = """
from configs.prepare import demo_cpt


def get_config():
    c = demo_cpt.get_config()
    c.corpus.domains = ({domain!r},)
    c.corpus.unique_paragraphs = False
    c.corpus.task_mb = {task_mb}
    c.tokenizer = "configs/base"
    c.engine.kind = {kind!r}
    c.engine.workers = {workers}
    c.pack.row_length, c.pack.rows_per_shard, c.pack.heldout_share = 4096, 16384, 0.001
    return c
"""
_DOMAIN = {
    "id": "bench",
    "language": "ja",
    "description": "made by tools.bench prepare",
    "replay_share": 0.2,
    "seed_words": ["保険料", "預金", "株式"],
    "profiles": {"web": {"paragraph": {}, "document": "swallow_v1"}},
    "sources": [
        {"id": "bench", "path": "*.jsonl", "licence": "Apache-2.0", "attribution": "made", "sector": "other"}
        | {"allowed_uses": ["training"], "profile": "web"}
    ],
}


def main(argv: list[str]) -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=64, help="size of the input")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", choices=["here", "local"], default="local")
    parser.add_argument("--peers", choices=["yes", "no"], default="yes", help="HojiChar and datasketch too (extra `bench`)")
    parser.add_argument("--peer_mb", type=float, default=2, help="size of what the peers read")
    parser.add_argument("--dir", help="where the input is made (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if args.mb <= 0 or args.peer_mb <= 0 or args.workers < 1:
        parser.error("--mb, --peer_mb and --workers must be positive")
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench_prepare_") as folder:
        found = measure(Path(folder), args.mb, args.workers, args.engine)
        if args.peers == "yes":
            found |= measure_peers(args.peer_mb)
    print(json.dumps(found))
    return 0


def measure(place: Path, mb: float, workers: int, engine: str) -> dict[str, Any]:
    """The whole program on made input."""
    domain = place / "domain"
    domain.mkdir()
    (domain / "domain.yaml").write_text(json.dumps(_DOMAIN), encoding="utf-8")
    size = write_corpus(domain / "made.jsonl", mb)
    print(f"made {size / 1e6:.0f} MB", flush=True)
    content = {"domain": str(domain), "kind": engine, "workers": workers, "task_mb": max(1.0, min(16.0, mb / workers / 4))}
    (place / "config.py").write_text(_CONFIG.format(**content))
    command = [sys.executable, "-m", "experiments.prepare", f"--config={place / 'config.py'}", f"--workdir={place / 'run'}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"experiments.prepare failed with {process.returncode}")
    result = json.loads(output.strip().splitlines()[-1])
    stages = json.loads((place / "run/manifest.json").read_text(encoding="utf-8"))["seconds_by_stage"]
    shutil.rmtree(place / "run")
    return {
        "input_mb": round(size / 1e6, 1),
        "workers": workers,
        "seconds": round(seconds, 1),
        "mb_per_s": round(size / 1e6 / seconds, 3),
        "mb_per_s_by_stage": {name: round(size / 1e6 / took, 2) for name, took in stages.items() if took},
        "peak_anonymous_gb": round(peak[0] / 1e9, 3),
        "documents_in": result["documents_in"],
        "kept": result["kept"],
        "tokens": result["tokens"],
    }


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _anonymous_bytes(process.pid))
        time.sleep(0.2)


def _anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all below it, from /proc."""
    total, pending = 0, [pid]
    while pending:
        one = pending.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            total += next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def write_corpus(path: Path, mb: float) -> int:
    """JSON lines of `mb` megabytes; returns the bytes. One document in twenty is a near copy of an earlier one."""
    rng, written = random.Random(0), 0
    made = documents(rng)
    with path.open("wb") as file:
        number = 0
        while written < mb * 1e6:
            line = json.dumps({"id": str(number), "text": next(made)}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            written, number = written + len(line), number + 1
    return written


def documents(rng: random.Random):
    """Endless documents of some 500 to 3,000 characters."""
    files = sorted((ROOT / "configs/domains").glob("demo_*/*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    sentences = [part + "。" for text in texts for part in text.replace("\n", "").split("。") if 15 < len(part) < 150]
    # Kanji are shifted by a key of each document, so that documents differ as those of a real corpus do.
    kanji = sorted({char for sentence in sentences for char in sentence if "\u4e00" <= char <= "\u9fff"})
    recent: list[str] = []
    while True:
        if recent and rng.random() < 0.05:
            text = rng.choice(recent).replace("保険", "共済", 3)
            yield text[: rng.randrange(len(text) - 20, len(text))]
            continue
        shift = rng.randrange(len(kanji))
        table = {ord(char): kanji[(i + shift * (i % 7 == 0)) % len(kanji)] for i, char in enumerate(kanji)}
        parts = []
        for sentence in rng.sample(sentences, rng.randint(10, 50)):
            if rng.random() < 0.1:
                sentence += f"売上高は{rng.randrange(10**9, 10**11)}円、前年比{rng.random() * 10:.1f}%でした。"
            if rng.random() < 0.02:
                sentence += f"電話03-{rng.randrange(1000, 9999)}-{rng.randrange(1000, 9999)}までご連絡ください。"
            parts.append(sentence.translate(table) + ("\n" if rng.random() < 0.3 else ""))
        recent = [*recent[-50:], "".join(parts)]
        yield recent[-1]


def measure_peers(mb: float) -> dict[str, Any]:
    """Our rules and near duplicates, and theirs, one process each, on the same documents."""
    import contextlib
    import io

    try:
        import datasketch
        from hojichar import Compose, document_filters
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is missing; pip install 'swallow_jax[bench]', or use --peers=no") from None
    from swallow_jax.data import dedup, filters, privacy

    rng, texts, size = random.Random(1), [], 0
    for text in documents(rng):
        texts.append(text)
        size += len(text.encode())
        if size >= mb * 1e6:
            break
    profile = {"paragraph": {}, "document": filters.SWALLOW_V1}
    theirs = Compose(
        [
            document_filters.DocumentNormalizer(),
            document_filters.DocumentLengthFilter(min_doc_len=0, max_doc_len=10**9),
            document_filters.AcceptJapanese(lookup_size=1000),
            document_filters.DiscardRareKuten(max_average_sentence_length=10**9),
            document_filters.DiscardTooManyEndingEllipsis(threshold=1.1),
            *(document_filters.CharRepetitionRatioFilter(threshold=1.1, ngram_size=n) for n in range(2, 11)),
            document_filters.MaskPersonalInformation(),
        ]
    )

    def our_near() -> None:
        dedup.clusters(dedup.band_keys(dedup.sketches(texts, num_perm=800, seed=0), 40))

    def their_near() -> None:
        index = datasketch.MinHashLSH(num_perm=800, params=(40, 20))
        for i, text in enumerate(texts):
            sketch = datasketch.MinHash(num_perm=800, seed=1)
            sketch.update_batch([gram.encode() for gram in dedup.shingles(text)])
            index.query(sketch)
            index.insert(str(i), sketch)

    with contextlib.redirect_stdout(io.StringIO()):
        runs = {
            "rules": (lambda: [filters.clean(text, profile, privacy.TOKENS) for text in texts], lambda: list(map(theirs, texts))),
            "near": (our_near, their_near),
        }
        rates = {name: [_rate(size, call) for call in pair] for name, pair in runs.items()}
    names = {"rules": "hojichar", "near": "datasketch"}
    found: dict[str, Any] = {"peer_mb": round(size / 1e6, 2), "cores": os.cpu_count()}
    for name, (ours, other) in rates.items():
        found[f"{name}_mb_per_s"] = {"ours": round(ours, 3), names[name]: round(other, 3), "ratio": round(ours / other, 2)}
    return found


def _rate(size: int, call: Callable[[], Any]) -> float:
    """MB/s in CPU seconds of this process: a neighbour on the same core must not decide between two libraries. Best of two."""
    best = float("inf")
    for _ in range(2):
        began = time.process_time()
        call()
        best = min(best, time.process_time() - began)
    return size / 1e6 / best
