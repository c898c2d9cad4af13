"""Report: run and score folders -> tables here, `results.json`, and one self-contained `index.html`.

    python -m experiments.report --config=configs/report/demo.py --workdir=runs/demo/report

Reads the folders its config names and writes only its own. The page needs no network; open `index.html` in any browser. Config
fields: title, introduction, evaluations, example_model, training, data, stages, quotation, limits, own_data, browser, versions
(see swallow_jax.report.Sections); an empty one leaves its section out.

    python -m experiments.report --lineage="runs/demo/report#base + SFT"
    python -m experiments.report --remake=runs/demo/cpt

--lineage prints the tree behind a run folder, or behind one model's rows of its table, down to the documents, and what has
changed since. --remake runs a folder's program again beside it, from its own config and the same inputs, and compares hashes.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import lineage, page, report, run, versions


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Print the tables and write the page; returns where it is and the primary figures."""
    config = config.to_dict()
    sections = run.build(report.Sections, config, "config")
    if not sections.evaluations:
        raise ValueError("config.evaluations is empty; name at least one folder of experiments.evaluate")
    evaluations = [report.read_evaluation(folder) for folder in sections.evaluations]
    folders = [*sections.evaluations, *(entry["folder"] for entry in (*sections.training, *sections.data, *sections.stages))]
    inputs = {f"folder {folder}": folder for folder in dict.fromkeys(map(str, folders))}
    job = run.open_run(workdir, config, inputs=inputs, parents=sections.evaluations)

    # Examples come from the evaluations in which the model took part.
    shown = [
        report.examples(e, sections.example_model)
        if sections.example_model in (arm["model"] for arm in e.details["arms"])
        else []
        for e in evaluations
    ]
    if sections.example_model and not any(shown):
        raise ValueError(
            f"config.example_model: {sections.example_model!r} is in none of the evaluations; name one of their models"
        )
    if not job.finished:
        run.write_json(job.folder / "results.json", report.results(evaluations))
        run.write_text(job.folder / "index.html", page.page(sections, evaluations, shown))
        primary = {row["model"]: row["value"] for e in evaluations for row in e.scores if row["metric"] == report.PRIMARY}
        job.finish({"page": str(job.folder / "index.html"), "results": str(job.folder / "results.json"), report.PRIMARY: primary})

    print(report.arms_text(evaluations))
    print(report.comparisons_text(evaluations))
    for evaluation, found in zip(evaluations, shown, strict=True):
        print(report.more_text(evaluation), end="")
        print(report.examples_text(found, evaluation.names()))
    for entry in sections.versions:
        found = versions.version_flips(entry["old"], entry["new"])
        print("\n" + versions.version_words(entry["name"], found))
        if found["thresholds"]:
            print(report.text_table(versions.THRESHOLD_HEADER, found["thresholds"]))
    if sections.data:
        data = [(entry["name"], report.run_result(entry["folder"])) for entry in sections.data]
        print("\n" + report.text_table(report.CONTAMINATION_HEADER, report.contamination_rows(data)))
    if sections.stages:
        rows = [(name, f"{minutes:.1f}", tokens) for name, minutes, tokens in report.stage_rows(sections.stages)]
        print("\n" + report.text_table(["stage", "minutes", "tokens"], rows))
    if sections.quotation:
        rows = [
            (row["model"], f"{row['correct']}/{row['n']}", f"{100 * row['correct'] / row['n']:.1f}")
            for row in sections.quotation["rows"]
        ]
        print(f"\nQuotation, another test set: {sections.quotation['source']}")
        print(report.text_table(["model", "correct", "accuracy %"], rows))
    for sentence in sections.limits:
        print(f"\n- {sentence}" if sentence == sections.limits[0] else f"- {sentence}")
    if sections.own_data:
        print(f"\nYour own conversations:\n  {sections.own_data}")
    return job.result


def trace(given: str) -> dict[str, Any]:
    """Print the tree behind FOLDER or FOLDER#MODEL; returns its counts, and which inputs have changed or are gone."""
    folder, model = lineage.split_row(given)
    tree = lineage.trace(folder, model)
    print("\n".join(lineage.lines(tree, model)), flush=True)
    return lineage.summary(tree)


def remake(folder: str) -> dict[str, Any]:
    """Run a folder's program once more and compare; returns {"equal", "compared", "differs", ...}."""
    from ml_collections import ConfigDict

    def make(program: str, config: dict[str, Any], workdir: Path) -> None:
        if program == "prepare":  # how many processes did the work is no part of what was made, and not in config.json
            config["engine"] = door.load_config("configs/prepare/tiny.py").engine.to_dict()
        importlib.import_module(f"experiments.{program}").main(ConfigDict(config).lock(), workdir)

    return lineage.remake(folder, make)


if __name__ == "__main__":
    if any(argument.lstrip("-").startswith(("lineage", "remake")) for argument in sys.argv[1:]):
        from absl import flags

        tree = flags.DEFINE_string("lineage", None, "FOLDER or FOLDER#MODEL whose tree is printed")
        again = flags.DEFINE_string("remake", None, "run folder to make once more and compare")
        door.tool(lambda: trace(tree.value) if tree.value else remake(again.value), __doc__)
    else:
        door.launch(main, __doc__)
