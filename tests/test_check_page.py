"""The review page in a real browser: ten thousand talks, by keyboard and mouse, on a phone, under attack, and back to gold.

    python -m tests.test_check_page notebooks/check_desktop.png notebooks/check_phone.png

takes the two pictures of the README. Verdicts here are test_v1's gold labels, changed by chance: no model's work.
"""

import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest

from swallow_jax import audit, check, run, verdict_page
from swallow_jax.evaluate import runner
from swallow_jax.task import load_task
from tests import chromium

ROOT = Path(__file__).parents[1]
TASK = ROOT / "configs" / "tasks" / "insurance_sales_compliance"
EVIL = "</script><img src=x onerror=alert(1)><svg onload=alert(2)>javascript:alert(3)&quot;'\"${alert(4)}"


def evil_task(folder):
    """The insurance task whose names, rules and notes are attacks."""
    import yaml

    shutil.copytree(TASK, folder)
    raw = yaml.safe_load((folder / "task.yaml").read_text(encoding="utf-8"))
    raw["categories"][1] |= {"name_ja": EVIL, "name_en": "en " + EVIL, "definition": EVIL}
    raw["categories"][1]["legal_basis"] = [{"text": EVIL, "source": EVIL, "effective_from": "2020-01-01", "note": EVIL}]
    raw["categories"][1]["required_items"] = [EVIL, "待ち期間"]
    raw["notes"] = [EVIL]
    (folder / "task.yaml").write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    return load_task(folder)


def row_of(task, talk, rng):
    """A prediction row in the form of a written verdict with probabilities: gold, but for every sixth."""
    labels = talk["labels"] if rng.random() < 0.83 else rng.choice([[], ["coercion"], ["incomplete_explanation"]])
    top = labels[0] if labels else "compliant"
    probs = {label: 0.1 * rng.random() / 8 for label in runner.label_ids(task)}
    probs[top] += 0.5 + 0.5 * rng.random()
    probs["compliant"] += 0.5 * rng.random() ** 2
    top = max(probs, key=probs.get)
    labels = labels if top != "compliant" else []
    total = sum(probs.values())
    evidence = [e for e in talk["evidence"] if e["category"] in labels]
    missing = talk["missing_items"] if labels == talk["labels"] else []
    said = [{"item": item, "status": "explained"} for item in talk["missing_items"] if item not in missing]
    why = [{"category": label, "rationale": talk["meta"]["rationale"]} for label in labels if labels == talk["labels"]]
    raw = json.dumps({"violations": why, "required_items": said}, ensure_ascii=False)
    return {"pred": top, "probs": {k: v / total for k, v in probs.items()}, "valid": True, "raw": raw, "evidence": evidence,
            "missing_items": missing}  # fmt: skip


def make(folder, task, count, *, evil=False):
    """A finished check of `count` talks, as tools.check leaves it: (page, verdict file, verdicts)."""
    rng = random.Random(0)
    gold = run.read_jsonl(TASK / "test_v1.jsonl")
    rng.shuffle(gold)
    talks, rows = [], {}
    for n in range(count):
        talk = gold[n % len(gold)] | {"conversation_id": f"call-{n + 1:05d}", "date": f"2026-{1 + n % 11:02d}-15"}
        if evil and n == 0:
            turns = [{"speaker": turn["speaker"], "text": EVIL} for turn in talk["turns"]]
            found = {"evidence": [{"category": "incomplete_explanation", "turn": 0, "quote": EVIL}], "missing_items": [EVIL]}
            talk |= {"conversation_id": EVIL, "turns": turns, "labels": ["incomplete_explanation"], **found}
            rows[EVIL] = row_of(task, talk, random.Random(1)) | found | {"pred": "incomplete_explanation"}
            rows[EVIL]["probs"] = {label: float(label == "incomplete_explanation") for label in runner.label_ids(task)}
            why = {"violations": [{"category": "incomplete_explanation", "rationale": EVIL}],
                   "required_items": [{"item": EVIL, "status": "explained"}]}  # fmt: skip
            rows[EVIL]["raw"] = json.dumps(why)
        else:
            rows[talk["conversation_id"]] = row_of(task, talk, rng)
        talks.append({k: talk[k] for k in ("conversation_id", "turns", "date")})
    file = folder / "calls.jsonl"
    run.write_jsonl(file, talks)
    intake = check.Intake(columns={}, speakers={}, mask=(), date=None)
    read = {c["conversation_id"]: c for c in check.read_transcripts(file, task, intake).conversations}
    point = check.chance_point(None)
    verdicts = [check.verdict(task, c, rows[name], point=point, told=(), model="demo@0") for name, c in read.items()]
    for found in verdicts:
        if found["verdict"] == "no_violation" and audit.drawn(found["input_sha256"], 0.05, 0):
            found["audit"] = True
    run.write_jsonl(folder / "v.jsonl", verdicts)
    made_of = {"input": {"path": str(file), "sha256": run.sha256_file(file)}, "audit": {"rate": 0.05, "seed": 0},
               "task": {"path": str(task.folder), "sha256": task.spec_sha256},
               "intake": {"columns": {}, "speakers": {}, "mask": [], "date": None}}  # fmt: skip
    run.write_json(folder / "v.manifest.json", {"format_version": 1, "made_of": made_of, "result": {}})
    page = folder / "page.html"
    run.write_text(page, verdict_page.build(task, verdicts, read, key="k", name=EVIL if evil else "2026-11", checked=count))
    return page, folder / "v.jsonl", verdicts


def choose(tab, control, value):
    """Set a filter and wait for a frame; returns (rows shown, milliseconds with layout)."""
    return tuple(tab.js(f"""(async () => {{
        const node = document.querySelector('[data-control={control}]');
        const before = performance.now();
        node.value = {json.dumps(value)};
        node.dispatchEvent(new Event('input', {{bubbles: true}}));
        document.querySelector('.list').offsetHeight;
        const spent = performance.now() - before;
        return [+document.querySelector('output').value.split(' / ')[0].replaceAll(',', ''), spent];
    }})()"""))  # fmt: skip


def text(tab, selector):
    return tab.js(f"(document.querySelector({selector!r}) || {{}}).textContent")


def type_words(tab, words):
    tab.call("Input.insertText", text=words)


def press(tab, key):
    codes = {"Escape": 27, "ArrowDown": 40, "End": 35, "Home": 36}
    if len(key) == 1:
        tab.press(key, ord(key.upper()), text=key)
    elif key == "Enter":
        tab.press(key, 13, text="\r")
    else:
        tab.press(key, codes[key])


def decisions_in(tab):
    return tab.js("Object.keys(localStorage).filter(k => k.startsWith('swallow_check/k/')).length")


@pytest.mark.proof
def test_ten_thousand_conversations_in_chromium(tmp_path):
    assert chromium.BINARY, "this proof needs chromium"
    task = load_task(TASK)
    page, out, verdicts = make(tmp_path, task, 10_000)
    with chromium.browser(tmp_path / "profile") as tab:
        tab.size(1280, 860)
        tab.open(page.as_uri())
        assert choose(tab, "words", "")[0] == 10_000
        # Filters count what the verdicts say, and answer at once.
        of = {name: sum(v["verdict"] == name for v in verdicts) for name in ("violation", "no_violation")}
        of["audit"] = sum(bool(v.get("audit")) for v in verdicts)
        spent = []
        for control, value, wanted in (
            ("kind", "violation", of["violation"]), ("kind", "audit", of["audit"]), ("kind", "no_violation", of["no_violation"]),
            ("kind", "all", 10_000), ("category", "2", sum("disclosure_obstruction" in str(v["violations"]) for v in verdicts)),
            ("category", "", 10_000), ("words", "がん保険", None), ("words", "が", None), ("words", "no such words", 0),
            ("words", "call-07777", 1), ("words", "", 10_000), ("order", "file", 10_000), ("order", "score", 10_000),
            ("status", "open", 10_000), ("status", "all", 10_000),
        ):  # fmt: skip
            shown, milliseconds = choose(tab, control, value)
            assert wanted is None or shown == wanted, (control, value, shown)
            spent.append((milliseconds, control, value))
        print(f"filters over 10,000: median {statistics.median(spent)[0]:.0f} ms, most {max(spent)}")
        assert max(spent)[0] <= 200, spent
        # Only rows in sight exist, at the beginning and at the end, and the queue begins with the surest.
        assert tab.js("document.querySelectorAll('.list li').length") < 40
        scores = [v["score"] for v in verdicts if v["verdict"] == "violation"]
        assert text(tab, ".list li .num") == f"{100 * max(scores):.1f} %"
        tab.js("document.querySelector('.list').focus()")
        press(tab, "End")
        assert tab.js("document.querySelector('.list [aria-selected=true]').getAttribute('aria-posinset')") == "10000"
        assert tab.js("document.querySelectorAll('.list li').length") < 40
        press(tab, "Home")

        # By keyboard alone. Nobody decides namelessly, and a rejection says why.
        tab.js("document.activeElement.blur()")
        press(tab, "a")
        assert decisions_in(tab) == 0 and tab.js("document.activeElement.dataset.control") == "reviewer"
        type_words(tab, "佐藤 花子")
        press(tab, "Escape")
        queue = sorted(verdicts, key=check.urgency)
        press(tab, "a")
        assert decisions_in(tab) == 1 and text(tab, ".talk h2") == queue[1]["conversation_id"]
        press(tab, "r")
        assert decisions_in(tab) == 1 and tab.js("document.activeElement.dataset.control") == "reason"
        type_words(tab, "商品の説明であり断定ではない")
        press(tab, "Enter")
        assert decisions_in(tab) == 2 and text(tab, ".talk h2") == queue[2]["conversation_id"]
        # A correction: another category by arrows, a turn as evidence by its button, the reason, Enter.
        press(tab, "Escape")
        press(tab, "c")
        first = tab.js("document.activeElement.dataset.label")
        assert first == queue[2]["violations"][0]["category"]
        press(tab, "ArrowDown")
        second = tab.js("document.querySelector('.fix input:checked').dataset.label")
        assert second and second != first
        while tab.js("document.querySelectorAll('.fix li button').length"):
            tab.js("document.querySelector('.fix li button').focus()")
            press(tab, "Enter")
        tab.js("document.querySelector('[data-turn=\"1\"] button').focus()")
        press(tab, "Enter")
        tab.js("document.querySelector('[data-control=reason]').focus()")
        press(tab, "Enter")
        assert decisions_in(tab) == 2  # without a reason it waits
        type_words(tab, "区分の誤り")
        press(tab, "Enter")
        assert decisions_in(tab) == 3
        # An audited one: no finding to reject, only to confirm.
        choose(tab, "kind", "audit")
        audited = text(tab, ".talk h2")
        assert "抽出監査" in text(tab, ".card")
        press(tab, "Escape")
        press(tab, "r")
        assert decisions_in(tab) == 3
        press(tab, "a")
        assert decisions_in(tab) == 4
        # Undo by key; the mouse decides it again.
        choose(tab, "words", audited)
        tab.click(".list li")
        press(tab, "u")
        assert decisions_in(tab) == 3 and text(tab, ".talk h2") == audited
        tab.click("[data-act=A]")
        assert decisions_in(tab) == 4
        choose(tab, "words", "")
        choose(tab, "kind", "all")
        assert choose(tab, "status", "done")[0] == 4 and choose(tab, "status", "reject")[0] == 1
        choose(tab, "status", "all")

        # They survive a reload, and come out as a file that becomes gold.
        tab.js("localStorage.setItem('swallow_check/k/x', '{broken')")  # a store may hold anything
        tab.call("Page.reload")
        time.sleep(0.5)
        deadline = time.monotonic() + 60
        while tab.js("document.readyState") != "complete":
            assert time.monotonic() < deadline
        assert tab.js("document.querySelector('progress').value") == 4
        assert tab.js("document.querySelector('[data-control=reviewer]').value") == "佐藤 花子"
        tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down"))
        tab.click("[data-act=download]")
        while not list((tmp_path / "down").glob("*.jsonl")):
            assert time.monotonic() < deadline, "nothing was downloaded"
            time.sleep(0.1)
        (file,) = (tmp_path / "down").glob("*.jsonl")
        assert file.name == "decisions_2026-11_佐藤_花子.jsonl"
        result = audit.judge(out, audit.read_decisions(file))
        assert (result["accept"], result["reject"], result["correct"], result["reviewers"]) == (2, 1, 1, ["佐藤 花子"])
        assert "undecided" in result["field"]["note"] and result["field"]["conversations"] == 10_000
        rows = {g["conversation_id"]: g for g in run.read_jsonl(tmp_path / "v.gold.jsonl")}
        accepted, rejected, corrected = (rows[queue[n]["conversation_id"]] for n in range(3))
        assert accepted["labels"] == [v["category"] for v in queue[0]["violations"]]
        assert rejected["labels"] == [] and rejected["meta"]["review"]["reason"] == "商品の説明であり断定ではない"
        assert corrected["labels"] == [second]
        said = corrected["turns"][1]["text"]
        assert corrected["evidence"] == [{"category": second, "turn": 1, "quote": said}]
        assert rows[audited]["labels"] == [] and rows[audited]["meta"]["review"]["predicted"]["audit"] is True

        # English, a phone in the dark: nothing is wider than the screen, list and talk take turns.
        press(tab, "l")
        assert tab.js("document.documentElement.lang") == "en" and "Verdicts to review" in text(tab, "h1")
        tab.size(390, 844, phone=True, dark=True)
        assert tab.js("document.documentElement.scrollWidth") <= 390
        assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert tab.js("getComputedStyle(document.querySelector('.talk')).display") == "none"
        tab.click(".list li:nth-child(2)")
        assert tab.js("getComputedStyle(document.querySelector('.talk')).display") == "flex"
        assert tab.js("document.documentElement.scrollWidth") <= 390
        assert tab.js("document.querySelector('.decide button').getBoundingClientRect().bottom") <= 844
        tab.click(".back")
        assert tab.js("getComputedStyle(document.querySelector('.list')).display") != "none"
        assert not tab.complaints, tab.complaints
        assert {url for url in tab.requests if not url.startswith("blob:")} == {page.as_uri()}


@pytest.mark.proof
def test_attacks_in_every_field_stay_text(tmp_path):
    assert chromium.BINARY, "this proof needs chromium"
    page, out, _ = make(tmp_path, evil_task(tmp_path / "task"), 12, evil=True)
    with chromium.browser(tmp_path / "profile") as tab:
        tab.size(1280, 860)
        tab.open(page.as_uri())
        assert text(tab, ".talk h2") == EVIL  # the surest
        whole = "document.querySelector('.talk').textContent.split('onerror').length - 1"
        # Heading, category, definition, reason given, what was left unsaid, quote, rule and its note, and every turn.
        turns = tab.js("document.querySelectorAll('.turns li').length")
        assert tab.js(whole) >= 8 + turns and EVIL in text(tab, ".list .name") and EVIL in text(tab, "h1")
        assert tab.js("document.querySelectorAll('mark').length") == 1
        for key in ("l", "?"):
            press(tab, key)
            assert "onerror" in text(tab, "dialog" if key == "?" else ".card")
        press(tab, "Escape")
        tab.js("document.querySelector('[data-control=reviewer]').focus()")
        type_words(tab, EVIL)
        press(tab, "Escape")
        press(tab, "r")
        type_words(tab, EVIL)
        press(tab, "Enter")
        choose(tab, "words", EVIL.lower()[:30])
        press(tab, "Escape")
        assert "rejected" in text(tab, ".talk .heads") and EVIL in text(tab, ".past")
        press(tab, "c")
        assert EVIL in text(tab, ".fix")
        press(tab, "Escape")
        assert tab.js("document.images.length + document.querySelectorAll('svg, iframe').length") == 0
        assert tab.js("document.scripts.length") == 2 and not tab.complaints, tab.complaints
        tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down"))
        tab.click("[data-act=download]")
        deadline = time.monotonic() + 30
        while not list((tmp_path / "down").glob("*.jsonl")):
            assert time.monotonic() < deadline, "nothing was downloaded"
            time.sleep(0.1)
        (file,) = (tmp_path / "down").glob("*.jsonl")
        assert audit.judge(out, audit.read_decisions(file))["reviewers"] == [EVIL]
        assert [g["labels"] for g in run.read_jsonl(tmp_path / "v.gold.jsonl")] == [[]]


def main(desktop: str, phone: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, chromium.browser(Path(folder) / "profile") as tab:
        page, _, _ = make(Path(folder), load_task(TASK), 1200)
        tab.size(1280, 860)
        tab.open(page.as_uri())
        tab.js("document.querySelector('[data-control=reviewer]').focus()")
        type_words(tab, "佐藤 花子")
        press(tab, "Escape")
        for _ in range(3):
            press(tab, "a")
        # One with a thing left unsaid and a turn that shows it.
        shown = tab.js("(i => i.id)(items.find((i, n) => n > 9 && i.found[0]?.missing.length && i.found[0].quotes.length))")
        tab.js(f"go(items.findIndex(i => i.id === {shown!r}))")
        press(tab, "e")
        tab.picture(Path(desktop))
        tab.size(390, 844, phone=True, dark=True)
        tab.click(".list [aria-selected=true]")
        tab.js("document.querySelector('.scroll').scrollTop = 0")
        tab.picture(Path(phone))


if __name__ == "__main__":
    main(*sys.argv[1:])
