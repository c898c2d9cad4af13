"""Folders become tables and one page: figures as in scores.json, everything escaped, nothing fetched."""

import html.parser
import json
import re

import pytest

from experiments import evaluate
from experiments import report as program
from swallow_jax import figures, report, run
from tests.test_evaluate import config, mini_task


@pytest.fixture
def evaluation(tmp_path):
    """A real evaluation folder of two baselines on the English miniature task."""
    evaluate.main(config(mini_task(tmp_path / "task")), tmp_path / "scores")
    return tmp_path / "scores"


def sections(evaluation, **changes):
    from configs.report import tiny

    c = tiny.get_config()
    c.evaluations = (str(evaluation),)
    c.update(changes)
    return c


class Page(html.parser.HTMLParser):
    """Collects tags, references and text; remembers tags that were closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.words, self.open, self.crossed = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_program_writes_results_and_a_page_that_needs_nothing_from_outside(evaluation, tmp_path, capsys):
    result = program.main(sections(evaluation), tmp_path / "report")
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == json.loads((evaluation / "scores.json").read_text())
    text, page = page_of(tmp_path / "report")
    assert not page.references and "url(" not in text and "@import" not in text and "script" not in page.tags
    assert not page.open and not page.crossed
    assert page.tags.count("svg") == 2  # accuracies and differences
    assert result["exact_category"] == {"constant": 0.5, "keywords": 0.75}
    printed = capsys.readouterr().out
    assert "6/8" in printed and "keywords - constant" in printed and "【It never breaks.】" in printed


def test_a_second_run_keeps_the_page_and_prints_the_same_tables(evaluation, tmp_path, capsys):
    first = program.main(sections(evaluation), tmp_path / "report")
    before, printed = (tmp_path / "report" / "index.html").stat().st_mtime_ns, capsys.readouterr().out
    assert program.main(sections(evaluation), tmp_path / "report") == first
    assert (tmp_path / "report" / "index.html").stat().st_mtime_ns == before and capsys.readouterr().out == printed


def test_the_figures_on_the_page_are_those_of_the_scores(evaluation, tmp_path):
    program.main(sections(evaluation), tmp_path / "report")
    words = page_of(tmp_path / "report")[1].words
    row = next(
        r for r in report.read_evaluation(evaluation).scores if r["model"] == "keywords" and r["metric"] == "exact_category"
    )
    assert f"{100 * row['value']:.1f} [{100 * row['ci95'][0]:.1f}, {100 * row['ci95'][1]:.1f}]" in words
    assert words[words.index("keywords") + 1 : words.index("keywords") + 3] == ["6/8", "75.0"]


def test_hostile_text_stays_text(tmp_path):
    """Model names, conversations and titles come from outside; none of them may become markup."""
    evil = '<script>alert("1")</script>'
    folder = mini_task(tmp_path / "task")
    rows = run.read_jsonl(folder / "test.jsonl")
    for row in rows:
        row["turns"][0]["text"] = evil
    run.write_jsonl(folder / "test.jsonl", rows)
    models = ({"name": evil, "kind": "keywords", "seed": 0},)
    evaluate.main(config(folder, models=models, comparisons=()), tmp_path / "scores")
    program.main(sections(tmp_path / "scores", title=evil, example_model=evil), tmp_path / "report")
    text, page = page_of(tmp_path / "report")
    assert "script" not in page.tags and text.count("<script") == 0
    assert sum(evil in word for word in page.words) >= 5


def test_examples_show_a_hit_a_miss_and_a_false_alarm_with_their_evidence(evaluation):
    predictions = run.read_jsonl(evaluation / "predictions.jsonl")
    for row in predictions:
        if (row["model"], row["conversation_id"]) == ("keywords", "c1c"):
            row["pred"] = "gift"
    run.write_jsonl(evaluation / "predictions.jsonl", predictions)
    found = {e["kind"]: e for e in report.examples(report.read_evaluation(evaluation), "keywords")}
    assert {kind: e["row"]["conversation_id"] for kind, e in found.items()} == {"hit": "c0v", "miss": "c2v", "false alarm": "c1c"}
    assert found["miss"]["marks"] == {1: ["No accident, ever."]}
    assert found["false alarm"]["marks"] == {1: ["Please read report 1."]}  # where it differs from its twin


def test_examples_come_from_the_first_seed_that_has_one_then_from_another_model_and_never_from_an_invalid_answer(evaluation):
    everyone = run.read_jsonl(evaluation / "predictions.jsonl")
    predictions = [row for row in everyone if row["model"] == "keywords"]
    later = [row | {"seed": 1, "pred": "gift" if row["gold"] == "compliant" else row["gold"]} for row in predictions]
    for row in predictions:
        if row["conversation_id"] == "c0c":
            row.update(pred="invalid", valid=False)
    run.write_jsonl(evaluation / "predictions.jsonl", later + predictions)
    hit, _, alarm = report.examples(report.read_evaluation(evaluation), "keywords")
    assert (hit["row"]["seed"], alarm["row"]["seed"]) == (0, 1), "only the second seed raised an alarm"

    others = [row | {"model": "constant", "pred": "gift"} for row in predictions if row["gold"] == "compliant"]
    run.write_jsonl(evaluation / "predictions.jsonl", [*predictions, *(row | {"valid": True} for row in others)])
    shown = report.read_evaluation(evaluation)
    alarm = report.examples(shown, "keywords")[2]
    assert alarm["row"]["model"] == "constant"
    assert report.example_words(alarm, shown.names()).startswith("false alarm (constant; none by keywords): ")


def test_the_surest_example_is_shown_and_a_kind_that_did_not_occur_is_said_so(evaluation):
    predictions = run.read_jsonl(evaluation / "predictions.jsonl")
    for row in predictions:
        row["probs"] = {"lie": 0.0, "gift": 0.0, "compliant": 0.0} | {
            row["pred"]: 0.9 if row["conversation_id"] == "c1v" else 0.5
        }
    run.write_jsonl(evaluation / "predictions.jsonl", predictions)
    shown = report.read_evaluation(evaluation)
    hit, _, alarm = report.examples(shown, "keywords")
    assert hit["row"]["conversation_id"] == "c1v"
    assert report.example_words(hit, shown.names()) == "hit: c1v, gold a Bribe, predicted a Bribe (90 %)"
    assert report.example_words(alarm, shown.names()) == "false alarm: none on this test set"


@pytest.mark.parametrize(
    ("quotes", "parts"),
    [
        (["bc"], [(False, "a"), (True, "bc"), (False, "a"), (True, "bc")]),  # wherever it occurs
        (["ca", "ab"], [(True, "abcab"), (False, "c")]),  # overlapping quotes join
        ([], [(False, "abcabc")]),
        (["zz"], [(False, "abcabc")]),
    ],
)
def test_quotes_are_marked_where_they_stand(quotes, parts):
    assert report.mark_parts("abcabc", quotes) == parts


def finished(folder, **result):
    job = run.open_run(folder, {}, inputs={})
    job.finish(result)
    return {"name": folder.name, "folder": str(folder)}


def test_funnels_contamination_curves_and_minutes_come_from_the_run_folders(evaluation, tmp_path, capsys):
    prepare = finished(tmp_path / "corpus", documents_in=10, kept=7, dropped_by_reason={"contaminated": 2, "short": 1})
    synthesis = finished(
        tmp_path / "talks", generated=8, contamination=0, rejected_by_reason={"contamination": 3},
        by_backend={"recorded": {"requested": 9, "generated": 8, "accepted": 5, "rejected_by_reason": {"contamination": 3}}},
    )  # fmt: skip
    cpt = finished(tmp_path / "cpt", tokens=12345)
    run.write_jsonl(
        tmp_path / "cpt" / "metrics.jsonl",
        [{"step": s, "loss": 4.0 - s / 100, **({"heldout_loss": 4.1 - s / 100} if s % 50 == 0 else {})} for s in range(1, 201)],
    )
    c = sections(
        evaluation, data=(prepare, synthesis), training=(cpt,), stages=(prepare, cpt), limits=("It is small.",), own_data="run me"
    )
    program.main(c, tmp_path / "report")
    text, page = page_of(tmp_path / "report")
    assert report.contamination_rows([(e["name"], report.run_result(e["folder"])) for e in (prepare, synthesis)]) == [
        ["corpus", "10", "2", "-"], ["talks", "8", "3", "0"]]  # fmt: skip
    for words in ("dropped: short", "talks: teacher recorded", "rejected: contamination", "12,345", "It is small.", "run me"):
        assert words in page.words
    assert "held-out 3.600 → 2.100" in text
    assert not page.open and not page.crossed
    assert "12,345" in capsys.readouterr().out


def test_the_published_figures_stand_apart_as_a_quotation(evaluation, tmp_path, capsys):
    from configs.report import demo

    program.main(sections(evaluation, quotation=demo.PUBLISHED), tmp_path / "report")
    text, _ = page_of(tmp_path / "report")
    quoted = text[text.index("<blockquote>") : text.index("</blockquote>")]
    assert all(
        words in quoted for words in ("178/344", "51.7", "264/344", "76.7", "286/344", "83.1", "297/344", "86.3", "46.5 to 57.0")
    )
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {row["model"] for row in results["scores"]} == {"constant", "keywords"}
    assert "another test set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluations": ()}, "config.evaluations is empty"),
        ({"example_model": "gpt"}, "'gpt' is in none of the evaluations"),
        ({"evaluations": ("nowhere",)}, "nowhere/scores.json does not exist; run experiments.evaluate"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(evaluation, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        program.main(sections(evaluation, **changes), tmp_path / "report")
    assert not (tmp_path / "report" / "index.html").exists()


def test_an_unfinished_stage_is_refused_by_name(evaluation, tmp_path):
    run.open_run(tmp_path / "cpt", {}, inputs={})
    entry = {"name": "CPT", "folder": str(tmp_path / "cpt")}
    with pytest.raises(ValueError, match="cpt is not finished"):
        program.main(sections(evaluation, stages=(entry,)), tmp_path / "report")


def test_columns_align_where_japanese_is_two_wide():
    table = report.text_table(["model", "n"], [["虚偽", "1"], ["base", "20"]]).splitlines()
    assert table == ["model   n", "---------", "虚偽    1", "base   20"]


def test_forest_plots_place_value_and_interval_on_one_scale():
    svg = figures.forest([("a", 50.0, 25.0, 75.0)], low=0, high=100, caption="c")
    assert 'cx="200.0"' in svg and 'x1="104.0" x2="296.0"' in svg


def test_long_names_are_cut_to_what_fits_and_kept_whole_in_the_title():
    svg = figures.forest([("モデル" * 20, 50.0, 25.0, 75.0)], low=0, high=100, caption="c")
    assert f"<title>{'モデル' * 20}</title>" in svg and ">" + "モデル" * 6 + "モデ…<" in svg


def test_a_flat_curve_and_a_single_point_still_draw():
    assert "<polyline" in figures.curves("flat", [{"step": s, "loss": 2.0} for s in (1, 2, 3)])
    assert "<polyline" in figures.curves("one", [{"step": 1, "loss": 2.0}])


def test_every_report_config_loads():
    from configs.report import demo, test_v1, tiny

    for c in (tiny.get_config(), demo.get_config(), test_v1.get_config()):
        run.build(report.Sections, c.to_dict(), "config")
