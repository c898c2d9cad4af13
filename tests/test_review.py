"""Decisions out to experts and back: what they say reaches the report and the next run."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import prepare
from swallow_jax import run
from tests.test_corpus import config, document

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def review(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.review", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("review"), random.Random(0)
    rows = [{"id": f"good{i}", "text": document(rng)} for i in range(20)]
    rows += [{"id": f"short{i}", "text": f"=SUM(A{i}) 短い文"} for i in range(12)]
    rows += [{"id": f"copy{i}", "text": rows[0]["text"]} for i in range(3)]
    profile = {"all": {"paragraph": {}, "document": {"letters": {"min": 50}}}}
    import os

    before = Path.cwd()
    os.chdir(ROOT)
    made = config(place, {"a.jsonl": rows}, profiles=profile)
    prepare.main(made, place / "run")
    os.chdir(before)
    return place / "run", made


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_a_sample_goes_out_and_the_corrections_change_report_and_next_run(prepared, tmp_path, suffix):
    folder, made = prepared
    table = tmp_path / f"decisions{suffix}"
    done = review("export", f"--run={folder}", f"--out={table}", "--rows=20")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    assert printed["decisions"] == {"keep": 10, "drop": 10}
    rows = _read(table)
    reasons = [row["reasons"] for row in rows if row["decision"] == "drop"]
    assert reasons.count("exact_duplicate") == 3 and reasons.count("letters") == 7  # evenly, as far as there are any
    assert all(row["text"].startswith("'=SUM") for row in rows if row["reasons"] == "letters")  # no formula
    for row in rows:
        row["expert"] = {"keep": "残す", "drop": "drop"}[row["decision"]]
    wrong = [row for row in rows if row["reasons"] == "letters"][:2]
    for row in wrong:
        row["expert"] = "keep"
    rows[0]["expert"] = "除く"
    _write(table, rows)
    done = review("import", f"--run={folder}", f"--file={table}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["reviewed"], result["disagreed"]) == (20, 3)
    assert {row["rule"]: row["disagreed"] for row in result["by_rule"]} == {"kept": 1, "letters": 2, "exact_duplicate": 0}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "disagreed with 3 decisions" in page and "letters" in page
    made.corpus.corrections = str(folder / "corrections.jsonl")
    prepare.main(made, tmp_path / "next")
    dropped = {row["id"]: row["reasons"] for row in run.iter_jsonl(tmp_path / "next/dropped.jsonl")}
    assert dropped[rows[0]["id"]][0] == "expert"
    assert not {row["id"] for row in wrong} & set(dropped)


def _read(path):
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    import openpyxl

    header, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    return [dict(zip(header, ["" if cell is None else cell for cell in row], strict=True)) for row in rows]


def _write(path, rows):
    """As Excel saves it in Japan: CSV in CP932."""
    if path.suffix == ".csv":
        with path.open("w", encoding="cp932", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return
    import openpyxl

    book = openpyxl.Workbook()
    for row in ([*rows[0]], *[list(row.values()) for row in rows]):
        book.active.append(row)
    book.save(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export",), "a run folder is wanted"),
        (("export", "--run=tests"), "holds nothing to review"),
        (("look",), "export or import is wanted"),
        (("import", "--run={run}"), "--file is wanted"),
        (("export", "--run={run}", "--out=a.txt"), ".csv or .xlsx"),
    ],
)
def test_wrong_commands_are_one_sentence(prepared, arguments, words):
    done = review(*(argument.format(run=prepared[0]) for argument in arguments))
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_an_answer_that_is_none_is_named_with_its_row(prepared, tmp_path):
    table = tmp_path / "d.csv"
    review("export", f"--run={prepared[0]}", f"--out={table}", "--rows=4")
    rows = _read(table)
    rows[1]["expert"] = "maybe"
    _write(table, rows)
    done = review("import", f"--run={prepared[0]}", f"--file={table}")
    assert done.returncode == 1 and "d.csv:3: expert='maybe'" in done.stderr
