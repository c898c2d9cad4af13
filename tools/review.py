"""Decisions of a program, out to experts as a table and back in: `export` draws a sample, `import` reads what they corrected.

    python -m tools.review export --run=runs/prepare/finance --out=decisions.xlsx --rows=200 --seed=0
    python -m tools.review import --run=runs/prepare/finance --file=decisions.xlsx
    python -m tools.review import --run=checked/verdicts.jsonl --file=decisions_verdicts_sato.jsonl

Export draws half from what was kept and half from what was dropped, evenly over the rules. Experts write keep or drop (残す or
除く) into the column `expert` of every row that they judge. Import writes review.json (disagreement by rule, shown on the run's
report.html) and corrections.jsonl into the run's folder; `--config.corpus.corrections=RUN/corrections.jsonl` of the next
experiments.prepare obeys them. CSV files are UTF-8 with a mark, as Excel writes and reads them; CP932 is read too.

Of tools.check, what goes out is its page (--html) and what comes back the page's download, one reviewer's after the other's:
verdicts.gold.jsonl, verdicts.trail.jsonl (who, when, why, what was predicted) and verdicts.review.json stand beside the verdicts.
"""

import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import corpus_page, door
from swallow_jax import audit, check, run, stats
from swallow_jax.data import readers, staging
from swallow_jax.synth import review

_RUN = flags.DEFINE_string("run", None, "the run folder whose decisions are reviewed")
_OUT = flags.DEFINE_string("out", None, "export: the table to write, .csv or .xlsx")
_FILE = flags.DEFINE_string("file", None, "import: the table that came back")
_ROWS = flags.DEFINE_integer("rows", 200, "export: how many decisions")
_SEED = flags.DEFINE_integer("seed", 0, "export: of the draw")

Rows = list[dict[str, Any]]


class Kind(NamedTuple):
    """What can be reviewed: how to know its folder, what to draw from it, and what to make of the answers."""

    is_at: Callable[[Path], bool]
    columns: tuple[str, ...]
    draw: Callable[[Path, int, int], Rows]
    judge: Callable[[Path, Rows], dict[str, Any]]
    read: Callable[[Path], Rows] | None = None  # what comes back, where it is no table of `columns`


def main() -> dict[str, Any]:
    """Run the subcommand; returns what was drawn or what the experts said."""
    folder = Path(_RUN.value or "")
    if not _RUN.value or not folder.exists():
        raise ValueError(f"--run={_RUN.value}: a run folder is wanted, or a file of verdicts; --help shows an example")
    kind = next((kind for kind in KINDS.values() if kind.is_at(folder)), None)
    if kind is None:
        raise ValueError(f"{folder} holds nothing to review; known are folders of a finished {', '.join(KINDS)}")
    if COMMAND[0] == "export":
        if not _OUT.value or _ROWS.value < 1:
            raise ValueError(f"--out={_OUT.value} --rows={_ROWS.value}: a file to write and at least one row are wanted")
        rows = kind.draw(folder, _ROWS.value, _SEED.value)
        write_table(Path(_OUT.value), kind.columns, rows)
        return {"rows": len(rows), "decisions": dict(Counter(row["decision"] for row in rows)), "file": _OUT.value}
    if not _FILE.value:
        raise ValueError("--file is wanted: the table that the experts filled in")
    if not Path(_FILE.value).is_file():
        raise FileNotFoundError(f"--file={_FILE.value} does not exist; name what the experts gave back")
    rows = kind.read(Path(_FILE.value)) if kind.read else read_table(Path(_FILE.value), kind.columns)
    return kind.judge(folder, rows)


# Tables


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """CSV or Excel; nothing of a corpus runs in a spreadsheet."""
    table = [[check.spreadsheet_cell(row.get(column, "")) for column in columns] for row in rows]
    if path.suffix == ".csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\r\n").writerows([columns, *table])
        run.write_bytes(path, out.getvalue().encode("utf-8-sig"))
    elif path.suffix == ".xlsx":
        try:
            import openpyxl
        except ImportError as error:
            raise ValueError("Excel needs openpyxl; pip install 'swallow_jax[data]', or export .csv") from error
        book = openpyxl.Workbook()
        for row in [columns, *table]:
            book.active.append(list(row))
        out = io.BytesIO()
        book.save(out)
        run.write_bytes(path, out.getvalue())
    else:
        raise ValueError(f"--out={path}: .csv or .xlsx is wanted")


def read_table(path: Path, columns: Sequence[str]) -> Rows:
    """Rows of a filled table; raises ValueError naming file and row for what is no answer."""
    how = readers.How(columns={"text": "expert"} | {name: name for name in columns}, extract="whole", max_bytes=1 << 28)
    rows = []
    for row in readers.read(readers.Piece(path=path, name=path.name), how):
        if isinstance(row, readers.Failure):
            raise ValueError(f"{row.where}: {row.words}")
        rows.append({name: row[name].removeprefix("'") for name in columns} | {"where": row["where"]})
    return rows


_ANSWERS = {"keep": "keep", "drop": "drop", "残す": "keep", "除く": "drop"}


def answers(rows: Rows) -> Rows:
    """The rows that an expert judged, with `expert` as keep or drop."""
    judged = []
    for row in rows:
        word = row["expert"].strip().lower()
        if word and word not in _ANSWERS:
            raise ValueError(f"{row['where']}: expert={row['expert']!r}; write {', '.join(_ANSWERS)}, or leave it empty")
        if word:
            judged.append(row | {"expert": _ANSWERS[word]})
    return judged


# Verdicts


def no_table(verdicts: Path, count: int, seed: int) -> Rows:
    raise ValueError(f"{verdicts}: verdicts are decided on the review page; the same tools.check with --html=PAGE writes it")


# Corpora


def draw_documents(folder: Path, count: int, seed: int) -> Rows:
    """Half kept, half dropped; the dropped ones evenly over first reasons, the kept ones over sources; by hash of their ids."""
    strata: dict[tuple[str, str], list] = {}
    for row in staging.read_documents(folder):
        stratum = ("drop", row["reasons"][0]) if row["reasons"] else ("keep", row["source"])
        rank = hashlib.sha256(f"{seed}:{row['source']}:{row['id']}".encode()).hexdigest()
        drawn = strata.setdefault(stratum, [])
        drawn.append((rank, row))
        if len(drawn) > 2 * count:  # a corpus may be large: only the smallest ranks can be drawn
            drawn[:] = sorted(drawn, key=lambda item: item[0])[:count]
    for drawn in strata.values():
        drawn.sort(key=lambda item: item[0])
    sides = {side: [drawn for (own, _), drawn in sorted(strata.items()) if own == side] for side in ("keep", "drop")}
    chosen = {side: _evenly(groups, count) for side, groups in sides.items()}
    half = {"keep": count - min(count // 2, len(chosen["drop"])), "drop": count - min(count - count // 2, len(chosen["keep"]))}
    rows = [row for side in ("keep", "drop") for row in chosen[side][: half[side]]]
    return [_shown(row) for row in rows]


def _evenly(groups: list[list], count: int) -> list[dict[str, Any]]:
    """One of each group in turn until there are `count`."""
    turns = (group[i][1] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group))
    return [row for _, row in zip(range(count), turns, strict=False)]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    values = {name: verdict["value"] for name, verdict in row["verdicts"].items() if not verdict["passes"]}
    return {
        "source": row["source"],
        "id": row["id"],
        "sector": row.get("sector", ""),
        "decision": "drop" if row["reasons"] else "keep",
        "reasons": "; ".join(row["reasons"]),
        "values": "; ".join(f"{name}={value}" for name, value in values.items()),
        "text": row["text"][:2000],
        "expert": "",
        "comment": "",
    }


def judge_documents(folder: Path, rows: Rows) -> dict[str, Any]:
    """Disagreement by rule, into review.json and the page; the corrections for the next run."""
    judged = answers(rows)
    if not judged:
        raise ValueError("no row has an answer in its column `expert`; fill in keep or drop")
    reviewed, disagreed = Counter(), Counter()
    for row in judged:
        rule = row["reasons"].split("; ")[0] if row["decision"] == "drop" else "kept"
        reviewed[rule] += 1
        disagreed[rule] += row["expert"] != row["decision"]
    result = {
        "reviewed": len(judged),
        "disagreed": disagreed.total(),
        "share": disagreed.total() / len(judged),
        "ci95": list(stats.wilson(disagreed.total(), len(judged))),
        "by_rule": [{"rule": rule, "reviewed": n, "disagreed": disagreed[rule]} for rule, n in sorted(reviewed.items())],
    }
    corrections = [
        {"source": row["source"], "id": row["id"], "decision": row["expert"], "comment": row["comment"]}
        for row in judged
        if row["expert"] != row["decision"]
    ]
    run.write_jsonl(folder / "corrections.jsonl", corrections)
    run.write_json(folder / "review.json", result)
    corpus_page.write(folder)
    return result


KINDS = {
    "experiments.prepare": Kind(
        is_at=lambda folder: (folder / "documents").is_dir() and (folder / "report.json").is_file(),
        columns=("source", "id", "sector", "decision", "reasons", "values", "text", "expert", "comment"),
        draw=draw_documents,
        judge=judge_documents,
    ),
    "experiments.synthesize": Kind(is_at=review.is_at, columns=review.COLUMNS, draw=review.draw, judge=review.judge),
    "tools.check": Kind(is_at=audit.is_at, columns=(), draw=no_table, judge=audit.judge, read=audit.read_decisions),
}
COMMAND: list[str] = []

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("export", "import"):
        COMMAND.append(sys.argv.pop(1))
    elif not any(arg in ("--help", "-h") for arg in sys.argv[1:]):
        given = sys.argv[1] if len(sys.argv) > 1 else "no command"
        print(f"error: {given}: export or import is wanted; --help shows an example", file=sys.stderr)
        sys.exit(1)
    door.tool(main, __doc__)
