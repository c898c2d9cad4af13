"""Two versions of a checker side by side: which verdicts change, and what the old thresholds would do to the new model."""

from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax import report, run, stats


def version_flips(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What changes when `new` takes the place of `old`, each an {evaluation, model} of one test set; first seeds.

    `broken` and `mended` are the items whose verdict went wrong or right, `moved` those that stay wrong in another way;
    `thresholds` compares old thresholds, taken over as they are, with those the new model's own dev answers choose.
    """
    evaluations = [report.read_evaluation(side["evaluation"]) for side in (old, new)]
    sets = [e.details["test_set"] for e in evaluations]
    if sets[0]["sha256"] != sets[1]["sha256"]:
        paths = " and ".join(test["path"] for test in sets)
        raise ValueError(f"{old['model']} and {new['model']} answered different test sets, {paths}; compare them on one")
    before, after = (_first_seed(e, side["model"]) for e, side in zip(evaluations, (old, new), strict=True))
    several = evaluations[0].primary == "exact_set"

    def right(row: Mapping[str, Any]) -> bool:
        if several:
            return row["valid"] and set(row["preds"]) == set(row["golds"])
        return row["valid"] and row["pred"] == row["gold"]

    found: dict[str, Any] = {"n": len(before), "broken": [], "mended": [], "moved": []}
    for name, row in before.items():
        then, now = right(row), right(after[name])
        if then != now:
            found["mended" if now else "broken"].append((row, after[name]))
        elif (row["pred"], row.get("preds")) != (after[name]["pred"], after[name].get("preds")):
            found["moved"].append((row, after[name]))
    found["p"] = stats.mcnemar_exact(len(found["broken"]), len(found["mended"]))
    found["thresholds"] = _thresholds(evaluations, (old["model"], new["model"]), after)
    return found


def _first_seed(evaluation: report.Evaluation, model: str, file: str = "predictions.jsonl") -> dict[str, Mapping[str, Any]]:
    rows = [row for row in run.read_jsonl(evaluation.folder / file) if row["model"] == model]
    if not rows:
        known = ", ".join(arm["model"] for arm in evaluation.details["arms"])
        raise ValueError(f"model {model!r} is not in {evaluation.folder}; it has: {known}")
    return {row["conversation_id"]: row for row in rows if row["seed"] == min(r["seed"] for r in rows)}


def _thresholds(evaluations: Sequence[report.Evaluation], models: Sequence[str], after: Mapping[str, Mapping]) -> list[list[str]]:
    """Rows: share found on dev | old threshold on the new model: found, alarms | recalibrated: threshold, found, alarms."""
    points = []
    for evaluation, model in zip(evaluations, models, strict=True):
        arm = next((a for a in evaluation.details.get("operating", ()) if a["model"] == model), None)
        points.append({p["dev_recall"]: p["threshold"][0] for p in arm["thresholds"]} if arm else {})
    rows = []
    for recall in points[0]:
        if recall not in points[1]:
            continue
        cells = [f"{100 * recall:g} %"]
        for threshold in (points[0][recall], points[1][recall]):
            flagged = [(row, 1 - row["probs"][report.COMPLIANT] >= threshold) for row in after.values()]
            hits = sum(f for row, f in flagged if row["gold"] != report.COMPLIANT)
            alarms = sum(f for row, f in flagged if row["gold"] == report.COMPLIANT)
            total = sum(row["gold"] != report.COMPLIANT for row in after.values())
            cells += [f"{threshold:.4g}", f"{hits}/{total}", f"{alarms}/{len(after) - total}"]
        rows.append(cells)
    return rows


THRESHOLD_HEADER = ["found on dev", "old threshold", "found", "false alarms", "recalibrated", "found", "false alarms"]


def version_words(name: str, found: Mapping[str, Any]) -> str:
    return (
        f"{name}: of {found['n']} conversations {len(found['mended'])} became right, {len(found['broken'])} became wrong, "
        f"{len(found['moved'])} are wrong in another way (exact McNemar p = {report.p_words(found['p'])})"
    )
