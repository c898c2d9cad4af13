"""The page in a real browser: 344 conversations with six models' answers, by mouse, by keyboard, on a phone, in the dark."""

import json
import random
import shutil
from pathlib import Path

import pytest

from experiments import evaluate
from experiments import report as program
from swallow_jax import browser, run
from swallow_jax.evaluate import runner
from swallow_jax.generate import backends
from swallow_jax.synth import sft
from swallow_jax.task import load_task, read_conversations
from tests import chromium
from tests.test_report import Page

TASK = Path(__file__).parents[1] / "configs" / "tasks" / "insurance_sales_compliance"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def recorded_model(task, items, path, wrong, *, evil=False):
    """A file of recorded verdicts with quotes: right but for a share `wrong` of the conversations, the same for each name."""
    rows, asking = [], runner.Asking(mode="generate", prompt=None, normalise="sum", max_new_tokens=64)
    for number, item in enumerate(items):
        draw = random.Random(f"{wrong}/{item['conversation_id']}").random()
        said = {**item, "labels": [], "evidence": [], "missing_items": []} if draw < wrong / 2 else item
        text = json.dumps(sft.verdict(task, said, explains=False), ensure_ascii=False)
        if wrong / 2 <= draw < wrong:
            text = EVIL if evil and number % 2 else json.dumps(
                {"verdict": "violation", "violations": [{"category": "special_benefit"}]})  # fmt: skip
        request = backends.Request(messages=tuple(task.prompt(item)), prompt=None, max_new_tokens=asking.max_new_tokens,
                                   temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=())  # fmt: skip
        rows.append({"key": request.key, "text": text, "prompt_tokens": 900, "completion_tokens": len(text) // 2})
    run.write_jsonl(path, rows)
    asking = {"mode": "generate", "prompt": None, "normalise": "sum", "max_new_tokens": 64}
    return {"kind": "recorded", "seed": 0, "path": str(path), "missing": "raise", "asking": asking}


def big_report(folder):
    """test_v1 with six models, of which one is named like an attack; returns the page."""
    from configs.evaluate import tiny
    from configs.report import demo
    from configs.report import tiny as tiny_report

    shutil.copytree(TASK, folder / "task")
    text = (folder / "task" / "task.yaml").read_text(encoding="utf-8")
    if "v1: test_v1.jsonl" not in text:
        text = text.replace("  demo: test_demo.jsonl", "  demo: test_demo.jsonl\n  v1: test_v1.jsonl")
    (folder / "task" / "task.yaml").write_text(text, encoding="utf-8")
    task = load_task(folder / "task")
    items = read_conversations(task.test_sets["v1"], task)
    c = tiny.get_config()
    c.task, c.test_set, c.training = str(folder / "task"), "v1", (str(TASK / "dev_v1.jsonl"),)
    c.statistics.update({"permutations": 1000, "resamples": 500, "simulations": 0})
    shares = {"60 % changed": 0.6, "30 % changed": 0.3, "20 % changed": 0.2, EVIL: 0.4}
    c.models = (
        *c.models,
        *({"name": name, **recorded_model(task, items, folder / f"{number}.jsonl", wrong, evil=name == EVIL)}
          for number, (name, wrong) in enumerate(shares.items())),
    )  # fmt: skip
    c.comparisons = ({"a": "20 % changed", "b": "30 % changed", "metric": "exact_category"},)
    evaluate.main(c, folder / "scores")
    page = tiny_report.get_config()
    page.evaluations, page.example_model, page.browser = (str(folder / "scores"),), "20 % changed", True
    page.title = "test_v1 and its gold labels, changed by chance"
    page.quotation = demo.PUBLISHED
    page.versions = ({"name": "20 for 30", "old": {"evaluation": str(folder / "scores"), "model": "30 % changed"},
                      "new": {"evaluation": str(folder / "scores"), "model": "20 % changed"}},)  # fmt: skip
    program.main(page, folder / "report")
    return folder / "report" / "index.html"


def test_what_people_and_models_wrote_stays_data():
    """Nothing of it can end the script that holds it, and the page allows one script alone."""
    conversation = {"conversation_id": EVIL, "pair_id": None, "labels": ["lie"], "evidence": [], "missing_items": [EVIL],
                    "turns": [{"speaker": EVIL, "text": EVIL + "\u2028"}], "meta": {"rationale": EVIL}}  # fmt: skip
    row = {"pred": "invalid", "valid": False, "raw": EVIL}
    labels = [{"id": "lie", "name": EVIL}, {"id": "compliant", "name": "fine"}]
    content = browser.data(labels, [conversation], [{0: [EVIL]}], {EVIL: {EVIL: row}}, False)
    markup = str(browser.section(EVIL, content, "en", 0))
    page = Page(markup)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    inert = markup[markup.index('json">') + 6 : markup.index("</script>")]
    assert json.loads(inert) == content and "\u2028" not in inert


def test_answers_name_labels_by_number_and_carry_what_was_quoted():
    conversation = {"conversation_id": "c", "pair_id": "p", "labels": ["lie", "gift"], "evidence": [], "missing_items": [],
                    "turns": [{"speaker": "S", "text": "yes"}]}  # fmt: skip
    labels = [{"id": i, "name": i} for i in ("lie", "gift", "compliant")]
    row = {"pred": "gift", "valid": True, "raw": "", "probs": {"gift": 0.6}, "evidence": [{"turn": 0, "quote": "yes"}]}
    clean = {"pred": "compliant", "valid": True, "raw": ""}
    content = browser.data(labels, [conversation], [{}], {"a": {"c": row}, "b": {"c": clean}}, True)
    assert content["items"][0]["gold"] == [0, 1]
    assert content["answers"] == [[{"pred": [1], "sure": 60, "quotes": [[0, "yes"]]}], [{"pred": [2]}]]


@pytest.mark.proof
def test_six_models_on_344_conversations_in_chromium(tmp_path):
    assert chromium.BINARY, "this proof needs chromium"
    page = big_report(tmp_path)
    with chromium.browser(tmp_path / "profile") as tab:
        tab.size(1280, 900)
        tab.open(page.as_uri())
        shown = "document.querySelector('output').value"
        assert tab.js(shown) == "344 of 344"
        assert tab.js("document.querySelectorAll('select[data-control=a] option').length") == 6

        def choose(control, value):
            tab.js(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
                   f"(document.querySelector('[data-control={control}]'))")  # fmt: skip
            return int(tab.js(shown).split()[0])

        # Filters count what the scores count.
        rows = run.read_jsonl(tmp_path / "scores" / "predictions.jsonl")
        of = {name: [r for r in rows if r["model"] == name] for name in ("30 % changed", "20 % changed", EVIL)}
        choose("a", "4")
        right = [r["pred"] == r["gold"] for r in of["20 % changed"]]
        assert choose("outcome", "right") == sum(right)
        missed = sum(r["gold"] != "compliant" and r["pred"] == "compliant" for r in of["20 % changed"])
        assert choose("outcome", "missed") == missed > 0
        first = [r["pred"] == r["gold"] for r in of["30 % changed"]]
        choose("b", "3")
        assert choose("outcome", "broken") == sum(a and not b for a, b in zip(right, first, strict=True))
        choose("outcome", "all")
        assert choose("gold", "0") in (24, 25)
        assert tab.js("new Set([...document.querySelectorAll('.list small')].map(e => e.textContent.split(' → ')[0])).size") <= 3
        choose("gold", "")
        assert choose("words", "がん保険") < 344
        assert choose("words", "no such words") == 0 and "No conversation" in tab.js(
            "document.querySelector('.detail').textContent"
        )
        choose("words", "")

        # A click opens a conversation; evidence is marked, both verdicts stand beside the gold label.
        choose("outcome", "missed")
        tab.click(".list li:nth-child(2) button")
        name = tab.js("document.querySelector('.list [aria-current=true]').firstChild.textContent")
        assert tab.js("document.querySelector('.detail h3').textContent") == name
        conversation = next(r for r in run.read_jsonl(TASK / "test_v1.jsonl") if r["conversation_id"] == name)
        marked = tab.js("[...document.querySelectorAll('.detail mark')].map(e => e.textContent).join('')")
        assert all(item["quote"] in marked for item in conversation["evidence"])
        assert tab.js("[...document.querySelectorAll('.detail th')].map(e => e.textContent)") == [
            "Gold", "A: 20 % changed", "B: 30 % changed"]  # fmt: skip
        choose("outcome", "all")

        # By keyboard alone: Tab reaches the controls and the list, arrows walk it, Enter goes to the conversation.
        tab.js("document.querySelector('[data-control=words]').focus()")
        reached = []
        for _ in range(5):
            tab.press("Tab", 9)
            reached.append(tab.js("document.activeElement.dataset.step || (document.activeElement.dataset.item && 'item')"))
        assert reached[:3] == ["-1", "1", "item"]
        tab.js("document.querySelector('.list [aria-current=true]').focus()")
        tab.press("Home", 36)
        for _ in range(3):
            tab.press("ArrowDown", 40)
        assert tab.js("document.querySelector('.detail h3').textContent") == "v1-0004"
        assert tab.js("document.activeElement.dataset.item") == "3"
        tab.press("Enter", 13)
        assert tab.js("document.activeElement.className") == "detail"
        twin = tab.js("document.querySelector('.detail button').textContent")
        tab.click(".detail button")
        assert tab.js("document.querySelector('.detail h3').textContent") in twin

        # An attack stays text: no alert, no image, no third script.
        choose("a", "5")
        assert choose("outcome", "invalid") > 0
        assert EVIL in tab.js("document.querySelector('.detail').textContent")
        assert tab.js("document.images.length") == 0 and tab.js("document.scripts.length") == 2
        choose("outcome", "all")

        # No control is wider than a phone; dark follows the reader's setting.
        choose("a", "4")
        choose("outcome", "missed")
        tab.js("document.querySelector('.browser').scrollIntoView()")
        tab.picture(tmp_path / "desktop.png")
        tab.size(390, 844, phone=True, dark=True)
        assert tab.js("document.documentElement.scrollWidth") <= 390
        assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        tab.js("document.querySelector('.browser').scrollIntoView()")
        tab.picture(tmp_path / "phone.png")
        assert not tab.complaints, tab.complaints
        assert tab.requests == [page.as_uri()]
