"""Run and score folders -> tables for the terminal, `results.json`, and one self-contained HTML page.

Percentages and percentage points (pp) are for people; files keep fractions.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import figures, run, stats
from swallow_jax.figures import Html, bar, display_width, h, table

_READING = (
    "p (pairs): sign-flip permutation test over twin pairs, the primary test; Holm adjusts it for all comparisons of this "
    "table. McNemar's exact test takes items for independent and knows single runs only. Detectable: the smallest difference "
    "found four times in five at this size and this much disagreement."
)
COMPLIANT = "compliant"  # label id of "no violation" in prediction rows
PRIMARY = "exact_category"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """What the page shows; an empty field leaves its section out. Folders are those the programs wrote."""

    title: str
    introduction: str
    evaluations: tuple  # folders of experiments.evaluate
    example_model: str  # whose hit, miss and false alarm are shown; "" for none
    training: tuple  # {name, folder} of experiments.cpt and .sft
    data: tuple  # {name, folder} of experiments.prepare and .synthesize: funnels, and what overlapped the test set
    stages: tuple  # {name, folder}: minutes by stage, from the manifests
    quotation: dict  # {source, note, rows: ({model, correct, n}, ...)}; {} for none
    limits: tuple  # sentences: what these models cannot show
    own_data: str  # the command for the reader's own conversations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One folder of experiments.evaluate."""

    folder: Path
    scores: list[dict[str, Any]]
    paired: list[dict[str, Any]]
    details: dict[str, Any]

    def names(self) -> dict[str, str]:
        """Label id -> the name people read."""
        return {label["id"]: label["name"] for label in self.details["labels"]} | {"invalid": "invalid"}

    def value(self, model: str, metric: str) -> dict[str, Any] | None:
        return next((r for r in self.scores if r["model"] == model and r["metric"] == metric), None)


def read_evaluation(folder: str | Path) -> Evaluation:
    """The scores of a finished evaluation; FileNotFoundError says what to run where there are none."""
    folder = Path(folder)
    parts = {}
    for name in ("scores.json", "details.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; run experiments.evaluate with --workdir={folder} first")
        parts[name] = _json(folder / name)
    return Evaluation(folder=folder, scores=parts["scores.json"]["scores"], paired=parts["scores.json"]["paired"],
                      details=parts["details.json"])  # fmt: skip


def results(evaluations: Sequence[Evaluation]) -> dict[str, list]:
    """design.md's results form over all evaluations."""
    return {
        "scores": [row for evaluation in evaluations for row in evaluation.scores],
        "paired": [row for evaluation in evaluations for row in evaluation.paired],
    }


# Rows of words and figures, shared by the terminal and the page.


def arm_rows(evaluation: Evaluation) -> list[list[str]]:
    """model | correct | accuracy | 95 % | violation or not | false alarms | invalid, one row an arm."""
    rows = []
    for arm in evaluation.details["arms"]:
        exact, binary = evaluation.value(arm["model"], PRIMARY), evaluation.value(arm["model"], "binary")
        seeds = f" (mean of {len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""
        alarms = f"{arm['false_alarms']}/{arm['compliant']}" if arm["compliant"] else "-"
        right = f"{exact['correct']:.4g}/{exact['n']}"
        rows.append([arm["model"] + seeds, right, _percent(exact["value"]), _range(exact["ci95"]),
                     _percent(binary["value"]), alarms, f"{arm['invalid']}/{arm['answers']}"])  # fmt: skip
    return rows


ARM_HEADER = ["model", "correct", "accuracy %", "95 % interval", "violation or not %", "false alarms", "invalid"]
PAIRED_HEADER = [
    "a - b",
    "metric",
    "pp",
    "95 % interval",
    "a only / b only",
    "p (pairs)",
    "p (Holm)",
    "p (McNemar)",
    "detectable pp",
]


def comparison_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for row in evaluation.paired:
        mcnemar = "-" if row["p_mcnemar"] is None else _p(row["p_mcnemar"])
        rows.append([f"{row['a']} - {row['b']}", row["metric"], f"{round(100 * row['diff'], 1) + 0.0:+.1f}", _range(row["ci95"]),
                     f"{round(row['b10'], 1):g} / {round(row['b01'], 1):g}", _p(row["p_pairs"]), _p(row["p_holm"]), mcnemar,
                     f"{100 * row['mde']:.1f}"])  # fmt: skip
    return rows


def stage_rows(stages: Iterable[Mapping[str, str]]) -> list[tuple[str, float, str]]:
    """(stage, minutes, tokens) of each finished folder, from its manifest."""
    rows = []
    for stage in stages:
        result = run_result(stage["folder"])
        tokens = result.get("tokens")
        minutes = _json(Path(stage["folder"]) / "manifest.json")["seconds"] / 60
        rows.append((stage["name"], minutes, f"{tokens:,}" if isinstance(tokens, int) else ""))
    return rows


def funnels(name: str, result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(heading, [(step, count)]) from the result of a prepare run, or one for each teacher of a synthesize run."""
    if "by_backend" not in result:
        lost = [(f"dropped: {reason}", count) for reason, count in result["dropped_by_reason"].items()]
        return [(name, [("read", result["documents_in"]), *lost, ("kept", result["kept"])])]
    found = []
    for teacher, counts in result["by_backend"].items():
        lost = [(f"rejected: {reason}", count) for reason, count in counts["rejected_by_reason"].items()]
        steps = [("requested", counts["requested"]), ("answered", counts["generated"]), *lost, ("accepted", counts["accepted"])]
        found.append((f"{name}: teacher {teacher}", steps))
    return found


CONTAMINATION_HEADER = ["stage", "checked", "removed for overlap with the test set", "overlaps left"]


def contamination_rows(data: Iterable[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    """What each stage found of the test set in its texts; "-" where a stage does not look twice."""
    rows = []
    for name, result in data:
        if "by_backend" in result:
            removed = result["rejected_by_reason"].get("contamination", 0)
            rows.append([name, f"{result['generated']:,}", f"{removed:,}", f"{result['contamination']:,}"])
        else:
            removed = result["dropped_by_reason"].get("contaminated", 0)
            rows.append([name, f"{result['documents_in']:,}", f"{removed:,}", "-"])
    return rows


def examples(evaluation: Evaluation, model: str) -> list[dict[str, Any]]:
    """One hit, one miss and one false alarm of the model's first seed, the surest of each where it gives probabilities.

    Each has `kind`, `row`, `conversation` and `marks` (turn -> strings to highlight): the gold quotes, or, on a compliant
    conversation, the lines in which it differs from its violating twin. A kind that did not occur has `row` None.
    """
    rows = [r for r in run.read_jsonl(evaluation.folder / "predictions.jsonl") if r["model"] == model]
    if not rows:
        known = ", ".join(arm["model"] for arm in evaluation.details["arms"])
        raise ValueError(f"example_model {model!r} is not in {evaluation.folder}; it has: {known}")
    rows = [r for r in rows if r["seed"] == min(r["seed"] for r in rows) and r["valid"]]
    conversations = run.read_jsonl(evaluation.details["test_set"]["path"])
    by_id = {c["conversation_id"]: c for c in conversations}
    kinds = {
        "hit": lambda r: r["gold"] != COMPLIANT and r["pred"] == r["gold"],
        "miss": lambda r: r["gold"] != COMPLIANT and r["pred"] == COMPLIANT,
        "false alarm": lambda r: r["gold"] == COMPLIANT and r["pred"] != COMPLIANT,
    }
    found = []
    for kind, fits in kinds.items():
        row = max((r for r in rows if fits(r)), key=lambda r: r.get("probs", {}).get(r["pred"], 0.0), default=None)
        conversation = by_id[row["conversation_id"]] if row else None
        marks = _marks(conversation, conversations) if row else {}
        found.append({"kind": kind, "row": row, "conversation": conversation, "marks": marks})
    return found


def _marks(conversation: Mapping[str, Any], conversations: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    marks: dict[int, list[str]] = {}
    for item in conversation["evidence"]:
        marks.setdefault(item["turn"], []).append(item["quote"])
    if not conversation["labels"] and conversation.get("pair_id"):
        twins = [c for c in conversations if c.get("pair_id") == conversation["pair_id"] and c["labels"]]
        theirs = {turn["text"] for twin in twins for turn in twin["turns"]}
        marks = {n: [turn["text"]] for n, turn in enumerate(conversation["turns"]) if twins and turn["text"] not in theirs}
    return marks


def example_words(example: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The sentence above an example: what is true, what was said, how sure."""
    row, conversation = example["row"], example["conversation"]
    if row is None:
        return f"{example['kind']}: none on this test set"
    sure = f" ({100 * row['probs'][row['pred']]:.0f} %)" if row.get("probs") else ""
    missing = "; left unsaid: " + "、".join(conversation["missing_items"]) if conversation["missing_items"] else ""
    shown = "" if conversation["labels"] else "; marked: where it differs from its violating twin"
    verdict = f"gold {names[row['gold']]}, predicted {names[row['pred']]}{sure}"
    return f"{example['kind']}: {row['conversation_id']}, {verdict}{missing}{shown}"


def mark_parts(text: str, quotes: Sequence[str]) -> list[tuple[bool, str]]:
    """Split a turn into (marked, part) runs; quotes may overlap or occur more than once."""
    marked = [False] * len(text)
    for quote in quotes:
        start = text.find(quote)
        while quote and start >= 0:
            marked[start : start + len(quote)] = [True] * len(quote)
            start = text.find(quote, start + 1)
    parts: list[tuple[bool, str]] = []
    for flag, character in zip(marked, text, strict=True):
        if parts and parts[-1][0] == flag:
            parts[-1] = (flag, parts[-1][1] + character)
        else:
            parts.append((flag, character))
    return parts


# The terminal.


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right; wide characters count as two."""
    table = [list(header), *[list(map(str, row)) for row in rows]]
    widths = [max(display_width(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = [row[0] + " " * (widths[0] - display_width(row[0]))]
        cells += [" " * (width - display_width(cell)) + cell for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(display_width, lines)), *lines[1:]])


def arms_text(evaluations: Sequence[Evaluation]) -> str:
    return "\n".join(
        f"\n{e.details['task']}, test set {e.details['test_set']['name']}\n{text_table(ARM_HEADER, arm_rows(e))}"
        for e in evaluations
    )


def comparisons_text(evaluations: Sequence[Evaluation]) -> str:
    return "\n".join(
        "\n" + text_table(PAIRED_HEADER, comparison_rows(e)) if e.paired else "\nno comparison was declared" for e in evaluations
    )


def examples_text(found: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The three examples with their marked lines in 【】; whole conversations stand on the page."""
    lines = []
    for example in found:
        lines.append("\n" + example_words(example, names))
        for number, quotes in sorted(example["marks"].items()):
            turn = example["conversation"]["turns"][number]
            shown = "".join(f"【{part}】" if flag else part for flag, part in mark_parts(turn["text"], quotes))
            lines.append(f"  turn {number} {turn['speaker']}: {shown}")
    return "\n".join(lines)


# The page.


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


def recall_table(evaluation: Evaluation) -> Html:
    """Per-category recall of every arm with Wilson intervals, bars behind the figures."""
    arms = [arm["model"] for arm in evaluation.details["arms"]]
    names, rows = evaluation.names(), []
    for label in evaluation.details["labels"]:
        metric = "compliant_passed" if label["id"] == COMPLIANT else f"recall/{label['id']}"
        found = [evaluation.value(model, metric) for model in arms]
        if all(found):
            cells = [bar(r["value"], f"{_percent(r['value'])} [{_range(r['ci95'])}]") for r in found]
            rows.append([f"{names[label['id']]} (n={found[0]['n']})", *cells])
    return table(["recall %", *arms], rows)


def example_block(example: Mapping[str, Any], names: Mapping[str, str], language: str) -> Html:
    turns = []
    for number, turn in enumerate(example["conversation"]["turns"] if example["conversation"] else ()):
        parts = mark_parts(turn["text"], example["marks"].get(number, []))
        said = [h("mark", part) if flag else part for flag, part in parts]
        turns.append(h("p", h("b", turn["speaker"]), " ", *said))
    return h("article", h("h3", example_words(example, names)), h("div", *turns, lang=language))


def page(sections: Sections, evaluations: Sequence[Evaluation], shown: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The whole page; `shown[e]` are the examples of evaluation e (maybe none)."""
    body = [h("h1", sections.title), h("p", sections.introduction) if sections.introduction else Html()]
    for evaluation, found in zip(evaluations, shown, strict=True):
        body += _evaluation_parts(evaluation, found)
    if sections.quotation:
        body += _quotation_parts(sections.quotation)
    if sections.training:
        body.append(h("h2", "Training"))
        body += [figures.curves(t["name"], run.read_jsonl(Path(t["folder"]) / "metrics.jsonl")) for t in sections.training]
    if sections.data:
        data = [(entry["name"], run_result(entry["folder"])) for entry in sections.data]
        body += [h("h2", "Data: what went in, what was kept")]
        for name, steps in (funnel for entry in data for funnel in funnels(*entry)):
            most = max((count for _, count in steps), default=0)
            rows = [(step, bar(count / most if most else 0, f"{count:,}")) for step, count in steps]
            body += [h("h3", name), table(["step", "count"], rows)]
        body += [
            h("h2", "Contamination: overlap of training text with the test set"),
            table(CONTAMINATION_HEADER, contamination_rows(data)),
        ]
    if sections.stages:
        stages = stage_rows(sections.stages)
        most = max(minutes for _, minutes, _ in stages) or 1
        rows = [(name, bar(minutes / most, f"{minutes:.1f}"), tokens) for name, minutes, tokens in stages]
        body += [h("h2", "Minutes by stage"), table(["stage", "minutes", "tokens"], rows)]
    if sections.limits:
        body += [h("h2", "What these models cannot show"), h("ul", *(h("li", sentence) for sentence in sections.limits))]
    if sections.own_data:
        body += [h("h2", "Your own conversations"), h("pre", h("code", sections.own_data), tabindex="0")]
    return figures.document(sections.title, body)


def _evaluation_parts(evaluation: Evaluation, found: Sequence[Mapping[str, Any]]) -> list[Html]:
    details, names = evaluation.details, evaluation.names()
    short = {label["id"]: label["text"] for label in details["labels"]} | {"invalid": "invalid"}
    exact = [evaluation.value(arm["model"], PRIMARY) for arm in details["arms"]]
    points = [(r["model"], *(100 * v for v in (r["value"], *r["ci95"]))) for r in exact]
    test = details["test_set"]
    parts = [
        h("h2", f"Evaluation: {details['task']}, test set {test['name']} ({exact[0]['n']} conversations)"),
        table(ARM_HEADER, arm_rows(evaluation)),
        figures.forest(points, low=0, high=100, caption="Accuracy (exact category) in % with 95 % intervals"),
    ]
    if evaluation.paired:
        ends = [100 * end for row in evaluation.paired for end in row["ci95"]]
        reach = max(10.0, math.ceil(max(map(abs, ends)) / 10) * 10)
        points = [(f"{r['a']} - {r['b']}", *(100 * v for v in (r["diff"], *r["ci95"]))) for r in evaluation.paired]
        parts += [
            h("h3", "Comparisons declared before the run"), table(PAIRED_HEADER, comparison_rows(evaluation)),
            figures.forest(points, low=-reach, high=reach, caption="Differences in pp with 95 % intervals", zero=True),
            h("p", _READING, class_="small"),
        ]  # fmt: skip
    parts += [h("h3", "Recall by category"), recall_table(evaluation), h("h3", "Confusion")]
    for arm in details["arms"]:
        seeds = f" (sum of {len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""
        parts.append(h("details", h("summary", arm["model"] + seeds), confusion_table(arm, names, short)))
    if found:
        parts.append(h("h3", f"A hit, a miss and a false alarm of {next((e['row']['model'] for e in found if e['row']), '')}"))
        parts += [example_block(example, names, details["language"]) for example in found]
    parts.append(h("p", f"Test set {test['path']}, SHA-256 {test['sha256']}; scores in {evaluation.folder}.", class_="small"))
    return parts


def _quotation_parts(quotation: Mapping[str, Any]) -> list[Html]:
    rows = []
    for row in quotation["rows"]:
        interval = _range(stats.wilson(row["correct"], row["n"]))
        rows.append([row["model"], f"{row['correct']}/{row['n']}", _percent(row["correct"] / row["n"]), interval])
    quoted = h(
        "blockquote", table(["model", "correct", "accuracy %", "95 % (Wilson)"], rows), h("p", f"Source: {quotation['source']}")
    )
    return [h("h2", "Quotation: the published result on another test set"), h("p", quotation["note"]), quoted]


# Small words.


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the program that writes it, or take it out of the report's config")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); run the program that writes it again") from None


def run_result(folder: str | Path) -> dict[str, Any]:
    """The result of a finished run folder."""
    manifest = _json(Path(folder) / "manifest.json")
    if "result" not in manifest:
        raise ValueError(f"{folder} is not finished; run its program again, it goes on where it stopped")
    return manifest["result"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(ends: Sequence[float]) -> str:
    return "{:.1f} to {:.1f}".format(*(round(100 * end, 1) + 0.0 for end in ends))


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
