"""Chat samples to packed rows: read, held against the test sets, rendered with the chat template, packed without splitting."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from swallow_jax import run, text
from swallow_jax.data import corpus, filters, packing, shards


class Report:
    """What became of every sample: in = kept + dropped, each drop counted under its first reason."""

    def __init__(self):
        self.dropped: Counter = Counter()
        self.sources: dict[str, Counter] = {}
        self.licences: list[dict] = []
        self.dropped_rows: list[dict] = []

    def drop(self, row: dict) -> None:
        self.dropped[row["reasons"][0]] += 1
        self.sources[row["source"]][f"dropped: {row['reasons'][0]}"] += 1
        self.dropped_rows.append({field: row[field] for field in ("id", "source", "reasons")})


def read(paths: Iterable[Path], report: Report) -> Iterator[dict]:
    """Samples with `text` (all their contents) and no reason against them yet."""
    licences: dict[str, str] = {}
    for path in paths:
        for number, row in enumerate(run.iter_jsonl(path), 1):
            if not row.get("id") or not isinstance(row.get("messages"), list):
                raise ValueError(f'{path}: sample {number} is no chat sample {{"id", "messages": [{{"role", "content"}}]}}')
            source = row.get("source") or path.stem
            licences[source] = row.get("licence") or "not stated"
            report.sources.setdefault(source, Counter()).update(documents_in=1)
            content = "\n".join(message["content"] for message in row["messages"])
            yield row | {"source": source, "text": content, "reasons": []}
    report.licences = [{"source": source, "licence": licence} for source, licence in licences.items()]


def decontaminate(rows: list[dict], test_files: tuple[Path, ...], contamination: corpus.Contamination | None) -> list[dict]:
    """Adds the reason "contaminated" where a row carries a protected utterance, in part or nearly; lists each find."""
    if not test_files:
        return []
    items, index = corpus.protected(test_files, contamination)
    found = []
    for hit in index.hits([row["text"] for row in rows]):
        row, item = rows[hit.train], items[hit.protected]
        if "contaminated" not in row["reasons"]:
            row["reasons"].insert(0, "contaminated")
        found.append(
            {"id": row["id"], "conversation_id": item["conversation_id"], "turn": item["turn"]}
            | {"ngram": hit.overlap, "jaccard": round(hit.jaccard, 3)}
        )
    return found


def write(
    folder: Path, part: list[dict], tokenizer: text.Tokenizer, report: Report, *, train_on: str, too_long: str, **shape: int
) -> None:
    """Tokenise, pack (`shape`: row_length, rows_per_shard) and store one split, and count what each source contributes."""
    contributed: dict[str, Counter] = {}
    samples = [tokenizer.chat_sample(_messages(row), train_on=train_on) for row in part]
    packed, left_out = packing.pack_samples(samples, row_length=shape["row_length"], pad_id=tokenizer.pad_id, too_long=too_long)
    for i in sorted(left_out):
        report.drop(part[i] | {"reasons": ["too_long"]})
    for i in sorted(set(range(len(part))) - set(left_out)):
        row, length = part[i], len(samples[i][0])
        contributed.setdefault(row["source"], Counter()).update(documents=1, tokens=length)
        characters, japanese = len(row["text"]), int(filters.japanese_letters(row["text"]))
        report.sources[row["source"]].update(kept=1, characters=characters, japanese_characters=japanese, tokens=length)
    with shards.ShardWriter(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        **shape,
    ) as writer:
        writer.write(packed)
        for source, counts in contributed.items():
            writer.add_source(source, **counts)


def _messages(row: dict) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
