"""The checker: transcripts of several kinds in, verdicts by contract out, decisions back as gold, the field estimated."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from swallow_jax import audit, check, run, stats, verdict_page
from swallow_jax.evaluate import runner
from swallow_jax.task import conversation_problem, load_task
from tests.test_report import Page

ROOT = Path(__file__).parent.parent
TASK = "configs/tasks/insurance_sales_compliance"
PLAIN = check.Intake(columns={}, speakers={}, mask=(), date=None)
SECRET = "証券番号は12345678で、電話は090-1234-5678です"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def task():
    return load_task(ROOT / TASK)


def talk(name, *turns, **more):
    return {"conversation_id": name, "turns": [{"speaker": s, "text": t} for s, t in turns], **more}


TALKS = [
    talk("a", ("募集人", "必ず増えます。"), ("お客様", "そうですか。")),
    talk("b", ("募集人", "ご説明します。"), ("お客様", "お願い\nします。"), date="2026-03-01"),
]


def written(folder, kind):
    """TALKS as one of the files that people have."""
    turns = [
        {"conversation_id": t["conversation_id"], "speaker": x["speaker"], "text": x["text"], "date": t.get("date", "")}
        for t in TALKS
        for x in t["turns"]
    ]
    path = folder / f"calls_{kind}.{kind.split('_')[0]}"
    if kind == "jsonl":
        run.write_jsonl(path, TALKS)
    elif kind == "jsonl_turns":
        run.write_jsonl(path, [{k: v for k, v in row.items() if v} for row in turns])
    elif kind == "csv":  # as Excel saves it in Japan, with a line break inside a cell
        with path.open("w", encoding="cp932", newline="") as file:
            writer = csv.DictWriter(file, turns[0])
            writer.writeheader()
            writer.writerows(turns)
    elif kind == "xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        for row in ([*turns[0]], *(list(row.values()) for row in turns)):
            book.active.append(row)
        book.save(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl_turns", "csv", "xlsx"])
def test_every_kind_of_file_gives_the_same_conversations(kind, task, tmp_path):
    read = check.read_transcripts(written(tmp_path, kind), task, PLAIN)
    assert read.problems == []
    wanted = [t | {"labels": [], "evidence": [], "missing_items": []} for t in TALKS]
    assert read.conversations == wanted
    assert [check.fingerprint(c) for c in read.conversations] == [check.fingerprint(c) for c in wanted]


def test_a_talk_in_one_cell_and_the_files_own_names(task, tmp_path):
    path = tmp_path / "calls.csv"
    cells = '7,オペレーター：必ず増えます。\n8,"オペレーター: こんにちは。\n顧客: はい。"\n'
    path.write_text(f"通話ID,内容\n{cells}", encoding="utf-8")
    intake = dataclasses.replace(
        PLAIN, columns={"conversation_id": "通話ID", "text": "内容"}, speakers={"オペレーター": "募集人", "顧客": "お客様"}
    )
    read = check.read_transcripts(path, task, intake)
    assert read.problems == [] and [c["conversation_id"] for c in read.conversations] == ["7", "8"]
    assert read.conversations[1]["turns"] == talk("8", ("募集人", "こんにちは。"), ("お客様", "はい。"))["turns"]


def test_missing_speakers_are_named_by_line_and_no_words_are_repeated(task, tmp_path):
    table, lines, cells = tmp_path / "t.csv", tmp_path / "l.jsonl", tmp_path / "c.csv"
    table.write_text(
        f"conversation_id,speaker,text\n1,募集人,はい\n1,,{SECRET}\n2,田中,{SECRET}\n3,お客様,はい\n", encoding="utf-8"
    )
    run.write_jsonl(lines, [talk("x", ("募集人", "はい"), ("", SECRET)), talk("x", ("募集人", SECRET)), {"text": {"a": SECRET}}])
    cells.write_text(f"conversation_id,text\n1,{SECRET}\n", encoding="utf-8")
    bare = tmp_path / "bare.csv"
    bare.write_text(f"1,募集人,{SECRET}\n", encoding="utf-8")
    read = check.read_transcripts(table, task, PLAIN)
    assert [c["conversation_id"] for c in read.conversations] == ["3"]  # a talk with a hole is not judged by its rest
    assert [p.split(": ")[0] for p in read.problems] == [f"{table}:3", f"{table}:4"]
    assert "no speaker" in read.problems[0] and "a speaker unknown to the task" in read.problems[1]
    problems = [p for file in (table, lines, cells, bare) for p in check.read_transcripts(file, task, PLAIN).problems]
    assert f"{lines}:1: turn 2: no speaker" in "\n".join(problems)
    assert f"{lines}:2: conversation_id was already used at {lines}:1" in "\n".join(problems)
    assert f"{cells}:2: turn 1: no speaker" in "\n".join(problems)
    assert not any(word in "\n".join(problems) for word in ("証券", "090", "12345678", "田中")) and len(problems) == 7


def test_personal_data_are_masked_at_the_door(task, tmp_path):
    path = tmp_path / "c.jsonl"
    run.write_jsonl(path, [talk("x", ("お客様", "電話は０９０－１２３４－５６７８です"), ("募集人", "はい"))])
    read = check.read_transcripts(path, task, dataclasses.replace(PLAIN, mask=("phone",)))
    assert read.conversations[0]["turns"][0]["text"] == "電話は<PHONE>です" and read.masked == {"phone": 1}
    with pytest.raises(ValueError, match="mask: 'shoe size' is unknown; known: email"):
        dataclasses.replace(PLAIN, mask=("shoe size",))


# Verdicts


def scored(task, **given):
    """A row of labels mode: probabilities of the categories given, the rest for compliant."""
    probs = {label: given.get(label, 0.0) for label in runner.label_ids(task)}
    probs["compliant"] = 1 - sum(given.values())
    best = max(probs, key=probs.get)
    return {"pred": best, "probs": probs, "valid": True, "raw": best}


AS_ANSWERED = check.chance_point(None)


def judged(task, row, point=AS_ANSWERED, told=(), **more):
    return check.verdict(task, TALKS[0] | more, row, point=point, told=told, model="m")


def test_a_verdict_holds_what_the_contract_says(task):
    told = [{"category": "coercion", "turn": 0, "quote": "必ず", "drop": 0.5}]
    found = judged(task, scored(task, coercion=0.9), told=told)
    assert found | {"input_sha256": "", "violations": []} == {
        "conversation_id": "a", "verdict": "violation", "score": 0.9, "violations": [], "required_items": [], "model": "m",
        "taxonomy": "insurance_ja_v1", "input_sha256": ""}  # fmt: skip
    (violation,) = found["violations"]
    assert violation["category"] == "coercion" and violation["evidence"] == told and violation["score"] == 0.9
    basis = task.category("coercion").legal_basis[0]
    assert violation["legal_basis"] == [{"text": basis.text, "source": basis.source, "effective_from": "1996-04-01"}]


def test_a_written_verdict_keeps_its_reasons_and_never_its_own_law(task):
    said, unsaid = "予定利率の引下げ", "無保険期間"
    finding = {"category": "improper_switching", "rationale": "R", "legal_basis": "made up", "missing_items": [unsaid]}
    answer = {"violations": [finding], "required_items": [{"item": said, "status": "explained"}]}
    raw = json.dumps({"verdict": "violation"} | answer)
    found = judged(
        task, {"pred": "improper_switching", "valid": True, "raw": raw, "evidence": [], "missing_items": [unsaid]}
    )  # fmt: skip
    assert found["score"] is None and found["violations"][0]["rationale"] == "R"
    items = [(item["item"], item["status"], item["turn"]) for item in found["required_items"]]
    assert items == [(said, "explained", None), (unsaid, "missing", None)]
    assert "made up" not in json.dumps(found)


@pytest.mark.parametrize(("date", "rules"), [("2026-03-01", 1), ("2026-07-01", 2), (None, 2), ("1990-01-01", 0)])
def test_the_rules_are_those_in_force_on_the_day(task, date, rules):
    found = check.in_force(task.category("special_benefit"), date)
    assert len(found) == rules and all("effective_from" in basis for basis in found)


def test_what_needs_a_person(task):
    low = scored(task, coercion=0.3)
    at = check.Point(threshold=0.25, temperature=1.0, fitted=0.5, prevalence=None)
    assert judged(task, low)["verdict"] == "no_violation" and judged(task, low)["violations"] == []
    assert judged(task, low, at)["verdict"] == "needs_review"  # above the threshold, though the answer itself is compliant
    assert judged(task, low, at)["violations"][0]["category"] == "coercion"
    high = check.Point(threshold=0.95, temperature=1.0, fitted=0.5, prevalence=None)
    assert judged(task, scored(task, coercion=0.9), high)["verdict"] == "no_violation"
    invalid = {"pred": "invalid", "valid": False, "raw": "?"}
    assert judged(task, invalid)["verdict"] == "needs_review" and judged(task, invalid)["score"] is None
    omitted = scored(task, incomplete_explanation=0.9) | {"windows": 2}
    assert judged(task, omitted)["verdict"] == "needs_review"  # what one window lacks another may say
    assert judged(task, scored(task, coercion=0.9) | {"windows": 2})["verdict"] == "violation"


def test_a_prevalence_moves_probabilities_as_bayes_does_and_keeps_the_order(task):
    point = check.Point(threshold=None, temperature=1.0, fitted=0.5, prevalence=0.01)
    # Of 10,000 talks 100 violate; a score of 0.9 at even odds means a likelihood ratio of 9: 100 * 9 against 9,900.
    assert point.shown(0.9) == pytest.approx(900 / (900 + 9900))
    assert point.shown(0.5) == pytest.approx(0.01) and point.shown(0.0) == 0 and point.shown(1.0) == 1
    chance = check.chance_point(0.01)
    assert check.flagged(scored(task, coercion=0.991), chance) and not check.flagged(scored(task, coercion=0.98), chance)
    with pytest.raises(ValueError, match=r"prevalence is 5\.0; write the share"):
        check.chance_point(5.0)


def test_an_operating_point_finds_the_share_of_violations_it_was_asked_for(task):
    rng = np.random.default_rng(0)
    talks, rows = [], {}
    for n in range(200):
        labels = ["coercion"] if n % 2 else []
        p = float(1 / (1 + math.exp(-(rng.normal() + (1.5 if labels else -1.5)))))
        talks.append(talk(f"t{n}", ("募集人", "はい"), labels=labels))
        rows[f"t{n}"] = scored(task, coercion=p)
    found = check.calibrate(task, talks, rows, 0.9)
    point = check.Point(threshold=found["threshold"], temperature=found["temperature"], fitted=0.5, prevalence=None)
    hits = sum(check.flagged(rows[t["conversation_id"]], point) for t in talks if t["labels"])
    assert hits == 90 == 100 * found["recall"] and found["recall_ci95"] == list(stats.wilson(90, 100))
    assert found["temperature"] != 1.0 and 0 < found["alarm"] < 0.2
    with pytest.raises(ValueError, match="0 of 100 conversations violate"):
        check.calibrate(task, [t for t in talks if not t["labels"]], rows, 0.9)


def test_the_table_runs_nothing_and_begins_with_the_surest(task):
    evil = "=HYPERLINK(1)"
    told = [{"category": "coercion", "turn": 0, "quote": evil}]
    found = [judged(task, scored(task)) | {"audit": True}, judged(task, scored(task, coercion=0.6)),
             judged(task, scored(task, coercion=0.9), told=told) | {"conversation_id": evil}]  # fmt: skip
    rows = list(csv.DictReader(check.table(task, found).decode("utf-8-sig").splitlines()))
    assert [r["score"] for r in rows] == ["0.9", "0.6", "0.0"] and rows[2]["audit"] == "yes"
    assert rows[0]["conversation_id"] == f"'{evil}" and rows[0]["categories"] == task.category("coercion").name_ja


# With the demo's base


@pytest.fixture(scope="module")
def base():
    from experiments import evaluate

    engine = evaluate.EngineSettings(
        dtype="float32", attention="rows", slots=2, max_length=256, chunk=4, tokens_per_batch=1024
    )  # fmt: skip
    return evaluate.open_model({"name": "base", "kind": "hf", "path": str(ROOT / "configs/base")}, engine, Path())


ASKING = runner.Asking(mode="labels", prompt=None, normalise="sum", max_new_tokens=8)


def short(count):
    return [talk(f"s{n}", ("募集人", f"必ず{n}倍に増えます。"), ("お客様", "はい。"), labels=[], evidence=[], missing_items=[])
            for n in range(count)]  # fmt: skip


class Broken:
    """A backend that dies after so many answers, as a kill would."""

    def __init__(self, backend, answers):
        self.backend, self.left, self.name, self.tokenizer = backend, answers, backend.name, backend.tokenizer

    def score(self, requests):
        for result in self.backend.score(requests):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield result


def test_a_cut_check_goes_on_to_the_same_bytes(task, base, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_BLOCK", 4)
    talks = short(10)
    straight = check.ask(task, talks, base, asking=ASKING, log=tmp_path / "a", what="v")
    for answers in (0, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            check.ask(task, talks, Broken(base, answers), asking=ASKING, log=tmp_path / "b", what="v")
    with (tmp_path / "b").open("a") as file:
        file.write('{"conversation_id": "s9", "torn')
    counted = Broken(base, 100)
    assert check.ask(task, talks, counted, asking=ASKING, log=tmp_path / "b", what="v") == straight
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert counted.left == 100 - 6  # one whole block was kept, the one that was cut is asked anew


def test_evidence_is_the_turn_without_which_the_category_is_least_likely(task, base, tmp_path):
    said = ("募集人", "必ず増えます。"), ("お客様", "はい。"), ("募集人", "本日の天気は晴れです。")
    mixed = talk("m", *said, labels=[], evidence=[], missing_items=[])
    rows = check.ask(task, [mixed], base, asking=ASKING, log=tmp_path / "s", what="v")
    found = check.grounds(task, [(mixed, rows["m"])], base, asking=ASKING, most=1, log=tmp_path / "g")["m"]
    category = check.named(task, rows["m"])[0]
    without = {}
    for place in (0, 2):  # the customer's turns are nobody's conduct
        rest = mixed | {"conversation_id": f"r{place}", "turns": [t for n, t in enumerate(mixed["turns"]) if n != place]}
        without[place] = check.ask(task, [rest], base, asking=ASKING, log=tmp_path / f"r{place}", what="v")[f"r{place}"]["probs"]
    best = min(without, key=lambda place: without[place][category])
    drop = rows["m"]["probs"][category] - without[best][category]
    wanted = [{"category": category, "turn": best, "quote": mixed["turns"][best]["text"], "drop": round(drop, 4)}]
    assert found == (wanted if drop > 0 else [])
    assert check.grounds(task, [(mixed, rows["m"])], base, asking=ASKING, most=0, log=tmp_path / "n") == {"m": []}


def test_a_long_talk_is_asked_about_in_windows(task, base, tmp_path):
    turns = [("募集人", f"{n}番目のご説明です。") for n in range(40)]
    long = talk("long", *turns, labels=[], evidence=[], missing_items=[])
    asking = dataclasses.replace(ASKING, window=check.window_of(8, 136, 1))
    row = check.ask(task, [long], base, asking=asking, log=tmp_path / "s", what="v")["long"]
    assert row["windows"] > 2 and row["probs"]
    with pytest.raises(ValueError, match="leaves no room"):
        check.window_of(200, 200, 1)


# The program


def tool(name, *arguments, before=(), **more):
    command = [*before, sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **more)


def calls(path):
    talks = [talk(f"c{n}", ("募集人", f"{n}：{SECRET}"), ("お客様", "<script>alert(1)</script>")) for n in range(4)]
    run.write_jsonl(path, talks)
    return path


def arguments(folder, *more):
    return ("--model=configs/base", f"--task={TASK}", f"--input={folder / 'calls.jsonl'}", f"--output={folder / 'out/v.jsonl'}",
            f"--html={folder / 'out/page.html'}", "--audit_rate=1", "--max_length=256", "--tokens_per_batch=1024",
            "--evidence_turns=1", *more)  # fmt: skip


def test_the_program_needs_no_network_and_prints_no_words(task, tmp_path):
    """`unshare -n`: a namespace that has no interface but a loopback that is down; root, or a kernel that lends it, can."""
    calls(tmp_path / "calls.jsonl")
    alone = ("unshare", "-n") if os.geteuid() == 0 else ("unshare", "-rn")
    reach = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    reached = subprocess.run([*alone, sys.executable, "-c", reach], capture_output=True, text=True, check=False)
    assert "Network is unreachable" in reached.stderr, reached.stderr  # else this proves nothing
    done = tool("check", *arguments(tmp_path, "--mask=all"), before=alone)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["conversations"] == 4 and result["masked"] == {"phone": 4, "policy_number": 4}
    assert not any(word in done.stdout + done.stderr for word in ("証券", "12345678", "alert"))
    verdicts = run.read_jsonl(tmp_path / "out/v.jsonl")
    assert [v["conversation_id"] for v in verdicts] == ["c0", "c1", "c2", "c3"]
    for v in verdicts:
        assert 0 <= v["score"] <= 1 and v["model"].startswith("base@")
        assert (v["verdict"] == "no_violation") == bool(v.get("audit"))
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"v.jsonl", "v.csv", "v.manifest.json", "page.html"}
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir()).decode()
    assert "12345678" not in everything and "090-1234" not in everything and "\\u003cPOLICY\\u003e" in everything
    page = Page((tmp_path / "out/page.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    # Again: nothing is asked, nothing changes; another way of asking is refused.
    before = (tmp_path / "out/v.jsonl").read_bytes()
    again = tool("check", *arguments(tmp_path, "--mask=all"))
    assert again.returncode == 0 and (tmp_path / "out/v.jsonl").read_bytes() == before
    other = tool("check", *arguments(tmp_path, "--mask=all", "--evidence_turns=0"))
    assert other.returncode == 1 and "was begun with another evidence_turns" in other.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--input=", "--input missing"),
        ("--calibrate=p.json", "or --calibrate=point.json with --recall"),
        ("--prevalence=3", "prevalence is 3.0"),
        ("--speakers=x", "'x' is no pair"),
    ],
)
def test_wrong_commands_are_one_sentence(tmp_path, more, words):
    calls(tmp_path / "calls.jsonl")
    done = tool("check", *arguments(tmp_path, more))
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.proof
def test_a_killed_program_ends_like_the_straight_one(tmp_path):
    """SIGKILL at three times of a check of three blocks of short talks; the same command goes on."""
    talks = [talk(f"k{n}", ("募集人", f"{n}年で{n % 7}倍に必ず増えます。"), ("お客様", "はい。")) for n in range(1100)]
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        run.write_jsonl(tmp_path / name / "calls.jsonl", talks)
    done = tool("check", *arguments(tmp_path / "straight"))
    assert done.returncode == 0, done.stderr
    kills = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-m", "tools.check", *arguments(tmp_path / "killed")], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        log = tmp_path / "killed/out/.v.jsonl.scores"
        seen = log.stat().st_size if log.exists() else 0
        while process.poll() is None and kills < 3 and (not log.exists() or log.stat().st_size < seen + 60_000):
            time.sleep(0.05)
        if process.poll() is None and kills < 3:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert process.returncode == 0 and kills == 3
    for name in ("v.jsonl", "v.csv"):
        assert (tmp_path / "killed/out" / name).read_bytes() == (tmp_path / "straight/out" / name).read_bytes()


# Audit, and decisions back


def test_the_audit_sample_follows_from_the_hash_alone():
    names = [run.sha256_json(n) for n in range(20_000)]
    drawn = {name for name in names if audit.drawn(name, 0.02, 0)}
    low, high = stats.wilson(len(drawn), len(names), 0.999)
    assert low < 0.02 < high and drawn == {n for n in reversed(names) if audit.drawn("".join([*n]), 0.02, 0)}
    assert drawn <= {name for name in names if audit.drawn(name, 0.05, 0)}  # a larger rate adds, and takes nothing away
    assert drawn != {name for name in names if audit.drawn(name, 0.02, 1)}
    assert not any(audit.drawn(n, 0.0, 0) for n in names[:99]) and all(audit.drawn(n, 1.0, 0) for n in names[:99])


@pytest.mark.parametrize(("population", "n"), [(40, 10), (200, 20), (200, 199), (7, 7)])
def test_the_hypergeometric_interval_holds_its_level_for_every_truth(population, n):
    """Exact coverage, all outcomes weighed by their probability, beside a simulated one for a truth in the middle."""
    from math import comb

    intervals = [stats.hypergeometric_interval(k, n, population) for k in range(n + 1)]
    for truth in range(population + 1):
        coverage = sum(
            comb(truth, k) * comb(population - truth, n - k) / comb(population, n)
            for k in range(n + 1)
            if k <= truth and n - k <= population - truth and intervals[k][0] <= truth <= intervals[k][1]
        )
        assert coverage >= 0.95 - 1e-9, truth
    if n == population:
        assert intervals == [(k, k) for k in range(n + 1)]
    with pytest.raises(ValueError, match="needs 0 <= k <= n"):
        stats.hypergeometric_interval(3, 2, 9)


def month(rng, talks=2000, prevalence=0.03, recall=0.7, alarm=0.05, rate=0.1):
    """A month of calls whose truth is known: verdicts, and truths by id."""
    truth = {f"m{n}": bool(rng.random() < prevalence) for n in range(talks)}
    verdicts = []
    for name, violates in truth.items():
        found = rng.random() < (recall if violates else alarm)
        verdicts.append({"conversation_id": name, "verdict": "violation" if found else "no_violation"})
        if not found and rng.random() < rate:
            verdicts[-1]["audit"] = True
    return verdicts, truth


def queue(verdicts, truth):
    """What people say who read all that is flagged or audited, and are right."""
    return {v["conversation_id"]: truth[v["conversation_id"]] for v in verdicts if v["verdict"] == "violation" or "audit" in v}


def test_recall_and_prevalence_in_the_field_hold_the_truth():
    rng = np.random.default_rng(0)
    held, studies = {"recall": 0, "prevalence": 0}, 150
    for _ in range(studies):
        verdicts, truth = month(rng)
        found = audit.field(verdicts, queue(verdicts, truth), {"rate": 0.1})
        flagged = {v["conversation_id"] for v in verdicts if v["verdict"] == "violation"}
        true = {"prevalence": sum(truth.values()) / len(truth), "recall": sum(truth[n] for n in flagged) / sum(truth.values())}
        for name in held:
            low, high = found[f"{name}_ci95"]
            assert low <= found[name] <= high
            held[name] += low - 1e-12 <= true[name] <= high + 1e-12
    for name in held:
        assert stats.wilson(held[name], studies, 0.99)[1] >= 0.95, held


def test_nothing_is_estimated_while_flagged_or_audited_ones_are_undecided():
    verdicts, truth = month(np.random.default_rng(1), talks=300)
    read = queue(verdicts, truth)
    last = read.popitem()
    found = audit.field(verdicts, read, {"rate": 0.1})
    assert found["recall"] is None and "undecided" in found["note"]
    assert audit.field(verdicts, read | dict([last]), {"rate": 0.1})["recall"] is not None
    unaudited = [{k: v for k, v in row.items() if k != "audit"} for row in verdicts]
    assert "set --audit_rate" in audit.field(unaudited, read | dict([last]), {"rate": 0.0})["note"]


@pytest.fixture
def checked(task, tmp_path):
    """A finished check of four talks, as tools.check leaves it: two found, one of them wrongly, two passed and audited."""
    path = tmp_path / "calls.jsonl"
    run.write_jsonl(path, [talk(f"c{n}", ("募集人", f"必ず{n}倍です。"), ("お客様", "はい。")) for n in range(4)])
    talks = check.read_transcripts(path, task, PLAIN).conversations
    verdicts = []
    for n, one in enumerate(talks):
        told = [{"category": "coercion", "turn": 0, "quote": "必ず", "drop": 0.1}] if n < 2 else []
        row = scored(task, coercion=0.9 - n / 10) if n < 2 else scored(task, coercion=0.1)
        verdicts.append(check.verdict(task, one, row, point=AS_ANSWERED, told=told, model="m@1"))
        if n >= 2:
            verdicts[-1]["audit"] = True
    out = tmp_path / "v.jsonl"
    run.write_jsonl(out, verdicts)
    made_of = {"input": {"path": str(path), "sha256": run.sha256_file(path)}, "task": {"path": TASK, "sha256": task.spec_sha256},
               "intake": dataclasses.asdict(PLAIN), "audit": {"rate": 1.0, "seed": 0}}  # fmt: skip
    run.write_json(tmp_path / "v.manifest.json", {"format_version": 1, "made_of": made_of, "result": {}})
    return out, verdicts


def decision(verdict, kind, *, who="佐藤", at="2026-11-22T10:00:00.000Z", reason="理由", **more):
    return {"conversation_id": verdict["conversation_id"], "input_sha256": verdict["input_sha256"], "decision": kind,
            "reason": reason, "reviewer": who, "decided_at": at, **more}  # fmt: skip


def test_decisions_become_gold_with_a_trail(task, checked, tmp_path):
    out, verdicts = checked
    quote = [{"category": "misleading_statement", "turn": 0, "quote": "必ず3倍"}]
    lines = [
        decision(verdicts[0], "accept"), decision(verdicts[1], "reject"), decision(verdicts[2], "accept"),
        decision(verdicts[3], "correct", labels=["misleading_statement"], evidence=quote, missing_items=[]),
    ]  # fmt: skip
    file = tmp_path / "decisions_v_sato.jsonl"
    run.write_jsonl(file, lines)
    done = tool("review", "import", f"--run={out}", f"--file={file}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["reviewed"], result["accept"], result["reject"], result["correct"]) == (4, 2, 1, 1)
    gold = run.read_jsonl(tmp_path / "v.gold.jsonl")
    assert [g["labels"] for g in gold] == [["coercion"], [], [], ["misleading_statement"]]
    assert gold[0]["evidence"] == [{"category": "coercion", "turn": 0, "quote": "必ず"}] and gold[3]["evidence"] == quote
    assert all(conversation_problem(g, task) is None for g in gold)
    review = gold[1]["meta"]["review"]
    assert review["reviewer"] == "佐藤" and review["decided_at"] == "2026-11-22T10:00:00.000Z" and review["reason"] == "理由"
    assert review["predicted"] == {"verdict": "violation", "score": 0.8, "audit": False, "labels": ["coercion"]}
    assert review["model"] == "m@1" and review["imported_from"] == file.name
    # One of two found is true, one of two passed is not: recall 1 of 2, by counting everything.
    assert result["field"]["recall"] == 0.5 and result["field"]["prevalence_ci95"] == [0.5, 0.5]
    # The same file again adds nothing; a later decision of another person counts, and the difference is told.
    assert audit.judge(out, audit.read_decisions(file))["reviewed"] == 4
    run.write_jsonl(file, [decision(verdicts[0], "reject", who="鈴木", at="2026-11-22T19:00:00+09:00", reason="no"),
                           decision(verdicts[1], "reject", who="鈴木", at="2026-11-22T20:00:00+09:00", reason="no")])  # fmt: skip
    result = audit.judge(out, audit.read_decisions(file))
    assert (result["read_by_several"], result["of_these_agreed"], result["reviewers"]) == (2, 1, ["佐藤", "鈴木"])
    assert len(run.read_jsonl(tmp_path / "v.trail.jsonl")) == 6
    assert run.read_jsonl(tmp_path / "v.gold.jsonl")[1]["meta"]["review"]["reviewer"] == "鈴木"
    done = tool("review", "export", f"--run={out}", f"--out={tmp_path / 't.csv'}")
    assert done.returncode == 1 and "decided on the review page" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversation_id": "nobody"}, "'nobody' is not among the verdicts"),
        ({"input_sha256": "0"}, "decided on another text"),
        ({"decision": "maybe"}, "decision 'maybe' is unknown"),
        ({"reviewer": " "}, "says who decided"),
        ({"decided_at": "yesterday"}, "a time with its zone is wanted"),
        ({"decided_at": "2026-11-22T10:00:00"}, "a time with its zone is wanted"),
        ({"reason": None}, "'reason' is missing"),
        ({"decision": "correct", "labels": ["lie"]}, "label 'lie' is no category"),
        ({"decision": "correct", "labels": ["coercion", "special_benefit"]}, "this task has one answer"),
        ({"decision": "correct", "labels": ["coercion"],
          "evidence": [{"category": "coercion", "turn": 0, "quote": SECRET}]}, "stands in no turn"),
    ],
)  # fmt: skip
def test_a_decision_that_fits_nothing_is_named_by_its_line(checked, tmp_path, change, words):
    out, verdicts = checked
    file = tmp_path / "d.jsonl"
    run.write_jsonl(file, [decision(verdicts[0], "accept"), decision(verdicts[1], "accept") | change])
    with pytest.raises(ValueError, match=words) as raised:
        audit.judge(out, audit.read_decisions(file))
    assert str(raised.value).startswith(f"{file}:2: ") and "証券" not in str(raised.value)
    assert not (tmp_path / "v.gold.jsonl").exists()


def test_gold_is_made_of_the_very_transcripts_that_were_checked(checked, tmp_path):
    out, _ = checked
    with (tmp_path / "calls.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="is gone or has changed"):
        audit.judge(out, [])
    shutil.copy(tmp_path / "v.manifest.json", tmp_path / "m")
    manifest = json.loads((tmp_path / "m").read_text())
    run.write_json(tmp_path / "v.manifest.json", {k: v for k, v in manifest.items() if k != "result"})
    with pytest.raises(ValueError, match="the check is not finished"):
        audit.judge(out, [])
    assert audit.is_at(out) and not audit.is_at(tmp_path)


def test_what_people_said_stays_data_in_the_page(task):
    evil = "</script><script>alert(1)</script>\u2028"
    one = talk(evil, ("募集人", evil), ("お客様", "はい"), date=evil)
    told = [{"category": "coercion", "turn": 0, "quote": evil}]
    found = check.verdict(task, one, scored(task, coercion=0.9), point=AS_ANSWERED, told=told, model=evil)
    markup = verdict_page.build(task, [found], {evil: one}, key="k", name=evil, checked=1)
    page = Page(markup)
    assert page.tags.count("script") == 2 and "\u2028" not in markup
    data = json.loads(markup.split('id="data">')[1].split("</script>")[0])
    assert data["items"][0]["turns"][0] == [0, evil] and data["items"][0]["found"][0]["quotes"] == [[0, evil, None]]
    assert "connect-src" not in markup and "default-src &#x27;none&#x27;" in markup
    for words in data["words"].values():
        assert set(words) == set(data["words"]["en"]) and len(words["keys"]) == len(data["words"]["en"]["keys"])
