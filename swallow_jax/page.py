"""The HTML page of a report: tables, figures, funnels, examples and the browser of conversations, in one file without network."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import browser, figures, report, run, stats, versions
from swallow_jax.figures import Html, bar, h, table
from swallow_jax.report import interval, percent

_READING = (
    "p (pairs): sign-flip permutation test over twin pairs, the primary test; Holm adjusts it for all comparisons of this "
    "evaluation. McNemar's exact test takes items for independent and knows single runs only. Detectable: the smallest "
    "difference found four times in five at this size and this much disagreement. Coverage: how often intervals made in this "
    "way hold the truth, in studies simulated from these answers."
)

_PRIMARY = {"exact_category": "Accuracy (exact category)", "exact_set": "Accuracy (all labels and no other)"}


def confusion_table(arm: Mapping[str, Any], names: Mapping[str, str], short: Mapping[str, str]) -> Html:
    """Rows: gold; columns: predicted; a cell's shade is its share of the row."""
    columns = [label for label in next(iter(arm["confusion"].values())) if label != "invalid" or arm["invalid"]]
    rows = []
    for gold, counts in arm["confusion"].items():
        total = sum(counts.values())
        cells = []
        for pred in columns:
            share = counts[pred] / total if total else 0
            kind = "right" if pred == gold else "wrong"
            cells.append(h("td", counts[pred] or "", class_=kind if counts[pred] else None, style=f"--share:{share:.2f}"))
        rows.append(h("tr", h("th", names[gold], scope="row"), *cells))
    head = h("tr", h("th", "gold \\ predicted"), *(h("th", short[label], scope="col") for label in columns))
    return h("div", h("table", h("thead", head), h("tbody", *rows), class_="confusion"), class_="wide", tabindex="0")


def recall_table(evaluation: report.Evaluation) -> Html:
    """Per-category recall of every arm with Wilson intervals, bars behind the figures."""
    arms = [arm["model"] for arm in evaluation.details["arms"]]
    names, rows = evaluation.names(), []
    for label in evaluation.details["labels"]:
        metric = "compliant_passed" if label["id"] == report.COMPLIANT else f"recall/{label['id']}"
        found = [evaluation.value(model, metric) for model in arms]
        if all(found):
            cells = [bar(r["value"], f"{percent(r['value'])} [{interval(r['ci95'])}]") for r in found]
            rows.append([f"{names[label['id']]} (n={found[0]['n']})", *cells])
    return table(["recall %", *arms], rows)


def arm_sets(evaluation: report.Evaluation) -> bool:
    """Whether all labels of an item count."""
    return any(arm.get("several_labels") for arm in evaluation.details["arms"])


def f1_table(evaluation: report.Evaluation) -> Html:
    """F1 as a bar, with precision and recall, of every arm and label."""
    arms, names, rows = evaluation.details["arms"], evaluation.names(), []
    for number, label in enumerate(evaluation.details["labels"]):
        found = [arm["categories"][number] for arm in arms]
        if any(r["support"] for r in found):
            words = [" / ".join("-" if r[k] is None else percent(r[k]) for k in ("f1", "precision", "recall")) for r in found]
            rows.append([names[label["id"]], *(bar(r["f1"], w) for r, w in zip(found, words, strict=True))])
    return table(["F1 / precision / recall %", *(arm["model"] for arm in arms)], rows)


def _reliability_parts(evaluation: report.Evaluation) -> list[Html]:
    """How sure against how right, as answered and with the temperature that dev chose."""
    plots = []
    answered = {arm["model"]: arm.get("calibration") for arm in evaluation.details["arms"]}
    for arm in evaluation.details["operating"]:
        before, after = answered[arm["model"]], arm.get("calibrated")
        if before and after:
            caption = (
                f"{arm['model']}: as answered (solid, ECE {before['ece']:.3f}, Brier {before['brier']:.3f}), with dev's "
                f"temperature (dashed, ECE {after['ece']:.3f}, Brier {after['brier']:.3f})"
            )
            curves = [("as answered", before["reliability"]), ("calibrated", after["reliability"])]
            plots.append(figures.reliability(curves, caption=caption))
    return [h("h3", "Reliability"), h("div", *plots, class_="plots")] if plots else []


def _browser(evaluation: report.Evaluation, number: int) -> Html:
    """All conversations of an evaluation with every run's answers; several seeds of an arm stand as runs of their own."""
    conversations = run.read_jsonl(evaluation.details["test_set"]["path"])
    runs: dict[str, dict[str, Mapping[str, Any]]] = {}
    seeds = {arm["model"]: arm["seeds"] for arm in evaluation.details["arms"]}
    for row in run.read_jsonl(evaluation.folder / "predictions.jsonl"):
        name = row["model"] if len(seeds[row["model"]]) == 1 else f"{row['model']}, seed {row['seed']}"
        runs.setdefault(name, {})[row["conversation_id"]] = row
    names = evaluation.names()
    labels = [{"id": label["id"], "name": names[label["id"]]} for label in evaluation.details["labels"]]
    marked = [report.marks(c, conversations) for c in conversations]
    content = browser.data(labels, conversations, marked, runs, arm_sets(evaluation))
    title = f"Conversations of {evaluation.details['test_set']['name']}"
    return browser.section(title, content, evaluation.details["language"], number)


def _version_parts(entry: Mapping[str, Any], evaluations: Sequence[report.Evaluation]) -> list[Html]:
    found = versions.version_flips(entry["old"], entry["new"])
    names = {key: name for evaluation in evaluations for key, name in evaluation.names().items()}

    def items(kind: str) -> Html:
        rows = [
            [old["conversation_id"], *(names.get(x, x) for x in (old["gold"], old["pred"], new["pred"]))]
            for old, new in found[kind]
        ]
        words = f"{kind}: {len(rows)}"
        return h("details", h("summary", words), table(["conversation", "gold", "old", "new"], rows))

    parts = [h("h2", f"Two versions: {entry['name']}"), h("p", versions.version_words(entry["name"], found))]
    parts += [items(kind) for kind in ("broken", "mended", "moved")]
    if found["thresholds"]:
        note = "The old thresholds on the new model, and those that the new model's own dev answers choose."
        parts += [table(versions.THRESHOLD_HEADER, found["thresholds"]), h("p", note, class_="small")]
    return parts


def example_block(example: Mapping[str, Any], names: Mapping[str, str], language: str) -> Html:
    turns = []
    for number, turn in enumerate(example["conversation"]["turns"] if example["conversation"] else ()):
        parts = report.mark_parts(turn["text"], example["marks"].get(number, []))
        said = [h("mark", part) if flag else part for flag, part in parts]
        turns.append(h("p", h("b", turn["speaker"]), " ", *said))
    return h("article", h("h3", report.example_words(example, names)), h("div", *turns, lang=language))


def page(
    sections: report.Sections, evaluations: Sequence[report.Evaluation], shown: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    """The whole page; `shown[e]` are the examples of evaluation e (maybe none)."""
    body = [h("h1", sections.title), h("p", sections.introduction) if sections.introduction else Html()]
    for number, (evaluation, found) in enumerate(zip(evaluations, shown, strict=True)):
        body += _evaluation_parts(evaluation, found)
        if sections.browser:
            body.append(_browser(evaluation, number))
    for entry in sections.versions:
        body += _version_parts(entry, evaluations)
    if sections.quotation:
        body += _quotation_parts(sections.quotation)
    if sections.training:
        body.append(h("h2", "Training"))
        body += [figures.curves(t["name"], run.read_jsonl(Path(t["folder"]) / "metrics.jsonl")) for t in sections.training]
    if sections.data:
        data = [(entry["name"], report.run_result(entry["folder"])) for entry in sections.data]
        body += [h("h2", "Data: what went in, what was kept")]
        for name, steps in (funnel for entry in data for funnel in report.funnels(*entry)):
            most = max((count for _, count in steps), default=0)
            rows = [(step, bar(count / most if most else 0, f"{count:,}")) for step, count in steps]
            body += [h("h3", name), table(["step", "count"], rows)]
        body += [
            h("h2", "Contamination: overlap of training text with the test set"),
            table(report.CONTAMINATION_HEADER, report.contamination_rows(data)),
        ]
    if sections.stages:
        stages = report.stage_rows(sections.stages)
        most = max(minutes for _, minutes, _ in stages) or 1
        rows = [(name, bar(minutes / most, f"{minutes:.1f}"), tokens) for name, minutes, tokens in stages]
        body += [h("h2", "Minutes by stage"), table(["stage", "minutes", "tokens"], rows)]
    if sections.limits:
        body += [h("h2", "What these models cannot show"), h("ul", *(h("li", sentence) for sentence in sections.limits))]
    if sections.own_data:
        body += [h("h2", "Your own conversations"), h("pre", h("code", sections.own_data), tabindex="0")]
    if not sections.browser:
        return figures.document(sections.title, body)
    return figures.document(sections.title, [*body, browser.script()], style=browser.STYLE, scripts=(browser.script_hash(),))


def _evaluation_parts(evaluation: report.Evaluation, found: Sequence[Mapping[str, Any]]) -> list[Html]:
    details, names = evaluation.details, evaluation.names()
    short = {label["id"]: label["text"] for label in details["labels"]} | {"invalid": "invalid"}
    exact = [evaluation.value(arm["model"], evaluation.primary) for arm in details["arms"]]
    points = [(r["model"], *(100 * v for v in (r["value"], *r["ci95"]))) for r in exact]
    test = details["test_set"]
    parts = [
        h("h2", f"Evaluation: {details['task']}, test set {test['name']} ({exact[0]['n']} conversations)"),
        table(report.ARM_HEADER, report.arm_rows(evaluation)),
        figures.forest(points, low=0, high=100, caption=f"{_PRIMARY[evaluation.primary]} in % with 95 % intervals"),
    ]
    compared = [row for row in evaluation.paired if row["b01"] is not None]
    if compared:
        ends = [100 * end for row in compared for end in row["ci95"]]
        reach = max(10.0, math.ceil(max(map(abs, ends)) / 10) * 10)
        points = [(f"{r['a']} - {r['b']}", *(100 * v for v in (r["diff"], *r["ci95"]))) for r in compared]
        parts += [
            h("h3", "Comparisons declared before the run"), table(report.PAIRED_HEADER, report.comparison_rows(evaluation)),
            figures.forest(points, low=-reach, high=reach, caption="Differences in pp with 95 % intervals", zero=True),
            h("p", _READING, class_="small"),
        ]  # fmt: skip
    if not arm_sets(evaluation):
        parts += [h("h3", "Recall by category"), recall_table(evaluation)]
    parts += [h("h3", "Precision, recall and F1 by category"), f1_table(evaluation)]
    if rows := report.noise_rows(evaluation):
        parts += [h("h3", "Noise of seeds and of items, apart"), table(report.NOISE_HEADER, rows)]
    header, rows = report.load_rows(evaluation)
    if rows:
        note = "Thresholds and calibration come from the dev set alone; figures are those of the test set."
        parts += [h("h3", "Thresholds chosen on the dev set, and the work they mean"), table(header, rows)]
        parts.append(h("p", note, class_="small"))
        parts += _reliability_parts(evaluation)
    header, rows = report.knowledge_rows(evaluation)
    if rows:
        parts += [h("h3", "Knowledge and language: questions, bits per byte"), table(header, rows)]
    if sentences := report.kept_sentences(evaluation):
        parts.append(h("h3", "What the adaptation cost, by margins stated before the run"))
        parts.append(h("ul", *(h("li", sentence) for sentence in sentences)))
    if rows := report.flip_rows(evaluation):
        parts += [h("h3", "Robustness: verdicts that flip on disturbed transcripts"), table(report.FLIP_HEADER, rows)]
    if evaluation.details.get("ranking"):
        parts += [h("h3", "Choosing a base: mean rank over the declared figures"), table(*report.ranking_rows(evaluation))]
    parts.append(h("h3", "Confusion"))
    for arm in details["arms"]:
        seeds = f" (sum of {len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""
        parts.append(h("details", h("summary", arm["model"] + seeds), confusion_table(arm, names, short)))
    if found:
        parts.append(h("h3", f"A hit, a miss and a false alarm of {next((e['row']['model'] for e in found if e['row']), '')}"))
        parts += [example_block(example, names, details["language"]) for example in found]
    parts.append(h("p", f"Test set {test['path']}, SHA-256 {test['sha256']}; scores in {evaluation.folder}.", class_="small"))
    return parts


def _quotation_parts(quotation: Mapping[str, Any]) -> list[Html]:
    rows = [
        [row["model"], f"{row['correct']}/{row['n']}", percent(row["correct"] / row["n"]),
         interval(stats.wilson(row["correct"], row["n"]))]
        for row in quotation["rows"]
    ]  # fmt: skip
    quoted = h(
        "blockquote", table(["model", "correct", "accuracy %", "95 % (Wilson)"], rows), h("p", f"Source: {quotation['source']}")
    )
    return [h("h2", "Quotation: the published result on another test set"), h("p", quotation["note"]), quoted]
