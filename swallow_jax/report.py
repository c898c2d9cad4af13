"""Run and score folders -> rows of words and figures, tables for the terminal; `swallow_jax.page` makes the HTML page of them.

Percentages and percentage points (pp) are for people; files keep fractions.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run
from swallow_jax.figures import display_width

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
    browser: bool = False  # all conversations with the answers of all models, to filter and to compare
    # {name, old: {evaluation, model}, new: {evaluation, model}}: what changes when one model takes another's place
    versions: tuple = ()


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

    @property
    def primary(self) -> str:
        return self.details.get("primary", PRIMARY)

    def value(self, model: str, metric: str, test_set: str | None = None) -> dict[str, Any] | None:
        """The row of a model and metric; several sets (slices) have one metric, then `test_set` says which."""
        rows = (r for r in self.scores if r["model"] == model and r["metric"] == metric)
        return next((r for r in rows if test_set in (None, r["test_set"])), None)


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
    """model | correct | accuracy | 95 % | violation or not | macro F1 | false alarms | invalid | costs, one row an arm."""
    rows = []
    for arm in evaluation.details["arms"]:
        exact, binary = evaluation.value(arm["model"], evaluation.primary), evaluation.value(arm["model"], "binary")
        seeds = f" (mean of {len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""
        alarms = f"{arm['false_alarms']}/{arm['compliant']}" if arm["compliant"] else "-"
        right = f"{exact['correct']:.4g}/{exact['n']}"
        cost = evaluation.details.get("costs", {}).get(arm["model"], {})
        price = cost.get("price_per_1000")
        rows.append([arm["model"] + seeds, right, percent(exact["value"]), interval(exact["ci95"]),
                     percent(binary["value"]), percent(arm["macro_f1"]), alarms, f"{arm['invalid']}/{arm['answers']}",
                     _count(cost.get("seconds_per_1000")), _count(cost.get("tokens_per_1000")),
                     "-" if price is None else f"{price:.2f} {cost['currency']}"])  # fmt: skip
    return rows


ARM_HEADER = ["model", "correct", "accuracy %", "95 % interval", "violation or not %", "macro F1 %", "false alarms", "invalid",
              "s / 1,000", "tokens / 1,000", "price / 1,000"]  # fmt: skip
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
    "coverage %",
]


def comparison_rows(evaluation: Evaluation) -> list[list[str]]:
    """One row a declared comparison of right and wrong answers; bits per byte stand with the verdicts on forgetting."""
    rows = []
    for row in evaluation.paired:
        if row["b01"] is None:
            continue
        mcnemar = "-" if row["p_mcnemar"] is None else p_words(row["p_mcnemar"])
        metric = row["metric"] if "verdict" not in row else f"{row['metric']}, {row['test_set']}"
        rows.append([f"{row['a']} - {row['b']}", metric, f"{round(100 * row['diff'], 1) + 0.0:+.1f}", interval(row["ci95"]),
                     f"{round(row['b10'], 1):g} / {round(row['b01'], 1):g}", p_words(row["p_pairs"]), p_words(row["p_holm"]),
                     mcnemar, f"{100 * row['mde']:.1f}", percent(row["coverage"]) if "coverage" in row else "-"])  # fmt: skip
    return rows


NOISE_HEADER = ["model", "seeds", "mean %", "by seed %", "sd of seeds pp", "95 % of seeds (t)", "standard error of items pp"]


def noise_rows(evaluation: Evaluation) -> list[list[str]]:
    """Noise of training and noise of the choice of items, apart: one row for each arm of several seeds, primary metric.

    The standard error over items keeps the seeds and draws the pairs anew; the deviation over seeds keeps the items.
    """
    found = [evaluation.value(arm["model"], evaluation.primary) for arm in evaluation.details["arms"]]
    return [
        [row["model"], str(len(row["seeds"])), percent(row["value"]), " ".join(percent(seed["value"]) for seed in row["by_seed"]),
         percent(row["sd_seeds"]), interval(row["ci95_seeds"]), percent(row["se_items"])]
        for row in found if "by_seed" in row
    ]  # fmt: skip


def kept_sentences(evaluation: Evaluation) -> list[str]:
    """The verdicts on what an adaptation cost, one sentence for each declaration."""
    return [row["sentence"] for row in evaluation.paired if "sentence" in row]


LOAD_HEADER = ["model", "threshold", "found", "found 95 %", "false alarms", "false alarms 95 %"]


def load_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Thresholds chosen on dev, what they find on the test set, and the review load at each prevalence."""
    header, rows = list(LOAD_HEADER), []
    for arm in evaluation.details.get("operating", ()):
        for point in (arm["as_answered"], *arm["thresholds"]):
            name = f"dev finds {100 * point['dev_recall']:g} %" if "dev_recall" in point else "as answered"
            cells = [arm["model"], name, f"{point['found']}/{point['violations']}", _maybe(point["recall_ci95"]),
                     f"{point['alarms']}/{point['compliant']}", _maybe(point["alarm_ci95"])]  # fmt: skip
            for load in point.get("load", ()):
                title = f"at {100 * load['prevalence']:g} %: flagged of {arm['talks']:,} (of them violating)"
                if title not in header:
                    header.append(title)
                precision = "-" if load["precision"] is None else f"{100 * load['precision']:.1f} %"
                cells.append(f"{load['flagged']:,.0f} ({precision})")
            rows.append(cells)
    return header, rows


FLIP_HEADER = ["model", "disturbance", "flipped", "rate %", "95 % interval", "violations lost", "alarms raised", "right"]


def flip_rows(evaluation: Evaluation) -> list[list[str]]:
    return [
        [row["model"], row["kind"], f"{row['flipped']}/{row['n']}", percent(row["rate"]), interval(row["ci95"]),
         f"{row['lost']}/{row['flagged']}", f"{row['raised']}/{row['passed']}", f"{row['right_before']} → {row['right_after']}"]
        for row in evaluation.details.get("robustness", ())
    ]  # fmt: skip


def knowledge_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Models by question sets and slices: accuracy in %, bits per byte, tokens per character."""
    shown = [row for row in evaluation.scores if row["metric"] in ("choice_accuracy", "bits_per_byte")]
    columns = list(dict.fromkeys((row["metric"], row["test_set"]) for row in shown))
    header = ["model", *(f"{test_set}, {'%' if metric == 'choice_accuracy' else 'bits a byte'}" for metric, test_set in columns)]
    rows = []
    for model in dict.fromkeys(row["model"] for row in shown):
        found = [evaluation.value(model, metric, test_set) for metric, test_set in columns]
        cells = ["-" if r is None else _figure(r) for r in found]
        rows.append([model, *cells])
    return header, rows


def ranking_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The models of one evaluation by their mean rank over config.ranking (equal values share a rank), with what they cost."""
    declared = evaluation.details.get("ranking", [])
    models = [arm["model"] for arm in evaluation.details["arms"]]
    values = {m: [_ranked_value(evaluation, m, entry) for entry in declared] for m in models}
    ranks: dict[str, list[float]] = {m: [] for m in models}
    for number, entry in enumerate(declared):
        sign = -1 if entry["better"] == "higher" else 1
        known = [sign * values[m][number] for m in models if values[m][number] is not None]
        for m in models:
            value = values[m][number]
            place = len(models) if value is None else 1 + sum(v < sign * value for v in known)
            ranks[m].append(place)
    order = sorted(models, key=lambda m: (sum(ranks[m]), models.index(m)))
    header = ["model", "mean rank", *(_ranked_name(entry) for entry in declared), "tokens a character", "weights GB", "licence"]
    rows = []
    for m in order:
        about = next((a for name, a in evaluation.details["models"].items() if name.rsplit(" seed ", 1)[0] == m), {})
        ratios = [r["tokens_per_character"] for r in evaluation.scores if r["model"] == m and "tokens_per_character" in r]
        size = about.get("weights_bytes")
        figures = ["-" if v is None else f"{v:.4g}" for v in values[m]]
        rows.append([m, f"{sum(ranks[m]) / len(declared):.2f}", *figures, f"{sum(ratios) / len(ratios):.2f}" if ratios else "-",
                     f"{size / 1e9:.2f}" if size else "-", str(about.get("licence") or "-")])  # fmt: skip
    return header, rows


def _ranked_name(entry: Mapping[str, str]) -> str:
    return ", ".join(filter(None, [entry["metric"], entry.get("test_set", "")]))


def _ranked_value(evaluation: Evaluation, model: str, entry: Mapping[str, str]) -> float | None:
    if entry["metric"] in ("seconds_per_1000", "price_per_1000", "tokens_per_1000"):
        return evaluation.details["costs"].get(model, {}).get(entry["metric"])
    row = evaluation.value(model, entry["metric"], entry.get("test_set") or None)
    return None if row is None else row["value"]


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
    """One hit, one miss and one false alarm of the model's, the surest of each where it gives probabilities.

    They come from its first seed; a kind that did not occur there from another seed, or from another model, which is named.
    Each has `kind`, `row`, `conversation` and `marks` (turn -> strings to highlight): the gold quotes, or, on a compliant
    conversation, the lines in which it differs from its violating twin. A kind that did not occur has `row` None.
    """
    everyone = run.read_jsonl(evaluation.folder / "predictions.jsonl")
    rows = [r for r in everyone if r["model"] == model]
    if not rows:
        known = ", ".join(arm["model"] for arm in evaluation.details["arms"])
        raise ValueError(f"example_model {model!r} is not in {evaluation.folder}; it has: {known}")
    others = [arm["model"] for arm in reversed(evaluation.details["arms"]) if arm["model"] != model]
    # In order of preference: this model's seeds, then the other models, the last of the table first.
    choices = [[r for r in rows if r["seed"] == seed and r["valid"]] for seed in sorted({r["seed"] for r in rows})]
    choices += [[r for r in everyone if r["model"] == other and r["valid"]] for other in others]
    conversations = run.read_jsonl(evaluation.details["test_set"]["path"])
    by_id = {c["conversation_id"]: c for c in conversations}
    kinds = {
        "hit": lambda r: r["gold"] != COMPLIANT and r["pred"] == r["gold"],
        "miss": lambda r: r["gold"] != COMPLIANT and r["pred"] == COMPLIANT,
        "false alarm": lambda r: r["gold"] == COMPLIANT and r["pred"] != COMPLIANT,
    }
    found = []
    for kind, fits in kinds.items():
        fitting = next(filter(None, ([r for r in choice if fits(r)] for choice in choices)), [])
        row = max(fitting, key=lambda r: r.get("probs", {}).get(r["pred"], 0.0), default=None)
        conversation = by_id[row["conversation_id"]] if row else None
        marked = marks(conversation, conversations) if row else {}
        asked = row is None or row["model"] == model
        by = "" if asked else f" ({row['model']}; none by {model})"
        found.append({"kind": kind, "row": row, "conversation": conversation, "marks": marked, "by": by})
    return found


def marks(conversation: Mapping[str, Any], conversations: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Turn -> what to highlight: the gold quotes, or, on a compliant twin, the turns in which it differs from the other."""
    found: dict[int, list[str]] = {}
    for item in conversation["evidence"]:
        found.setdefault(item["turn"], []).append(item["quote"])
    if not conversation["labels"] and conversation.get("pair_id"):
        twins = [c for c in conversations if c.get("pair_id") == conversation["pair_id"] and c["labels"]]
        theirs = {turn["text"] for twin in twins for turn in twin["turns"]}
        found = {n: [turn["text"]] for n, turn in enumerate(conversation["turns"]) if twins and turn["text"] not in theirs}
    return found


def example_words(example: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The sentence above an example: what is true, what was said, how sure."""
    row, conversation = example["row"], example["conversation"]
    if row is None:
        return f"{example['kind']}: none on this test set"
    sure = f" ({100 * row['probs'][row['pred']]:.0f} %)" if row.get("probs") else ""
    missing = "; left unsaid: " + "、".join(conversation["missing_items"]) if conversation["missing_items"] else ""
    shown = "" if conversation["labels"] else "; marked: where it differs from its violating twin"
    verdict = f"gold {names[row['gold']]}, predicted {names[row['pred']]}{sure}"
    return f"{example['kind']}{example['by']}: {row['conversation_id']}, {verdict}{missing}{shown}"


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


def more_text(evaluation: Evaluation) -> str:
    """What the two tables leave out: noise, thresholds, knowledge and forgetting, flip rates, the ranking; "" for none."""
    parts = []
    if rows := noise_rows(evaluation):
        parts.append(text_table(NOISE_HEADER, rows))
    header, rows = load_rows(evaluation)
    if rows:
        parts.append(text_table(header, rows))
    header, rows = knowledge_rows(evaluation)
    if rows:
        parts.append(text_table(header, rows))
    parts += kept_sentences(evaluation)
    if rows := flip_rows(evaluation):
        parts.append(text_table(FLIP_HEADER, rows))
    if evaluation.details.get("ranking"):
        parts.append(text_table(*ranking_rows(evaluation)))
    return "".join(f"\n{part}\n" for part in parts)


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


def _figure(row: Mapping[str, Any]) -> str:
    if row["metric"] == "choice_accuracy":
        return f"{percent(row['value'])} [{interval(row['ci95'])}]"
    return "{:.3f} [{:.3f} to {:.3f}]".format(row["value"], *row["ci95"])


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _maybe(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else interval(ends)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(ends: Sequence[float]) -> str:
    return "{:.1f} to {:.1f}".format(*(round(100 * end, 1) + 0.0 for end in ends))


def p_words(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
