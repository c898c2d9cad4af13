"""Evaluate: ask models and baselines about a test set, score the answers, compare the arms declared in the config.

    python -m experiments.evaluate --config=configs/evaluate/tiny.py --workdir=runs/evaluate/tiny

Reads a task folder and its test set; writes `predictions.jsonl`, `scores.json` (the results form), `details.json` (confusion,
per-category figures, calibration, seconds). A killed evaluation goes on where it stopped. Config fields:

    task, test_set      task folder; the name of one of its test or dev sets
    training            conversation files that the constant and n-gram baselines learn from
    asking              mode 'labels' or 'generate', prompt, normalise, max_new_tokens
    models              a tuple of {name, kind, seed, ...}; rows of one name with several seeds are one arm. Kinds:
                        constant {metric} | keywords | ngrams {settings} | hf, run, endpoint, recorded {path, ...}
    comparisons         a tuple of {a, b, metric}, written before the run
    statistics          level, permutations, resamples, seed, bins
"""

from pathlib import Path
from typing import Any

from experiments import door

BASELINES = ("constant", "keywords", "ngrams")


def main(config: Any, workdir: Path) -> dict[str, Any]:
    from swallow_jax import report, run
    from swallow_jax.evaluate import metrics, runner
    from swallow_jax.task import load_task, read_conversations

    # The door: sections become dataclasses, every name is checked before anything is asked or paid for.
    config = config.to_dict()
    asking = run.build(runner.Asking, config["asking"], "config.asking")
    statistics = run.build(metrics.Statistics, config["statistics"], "config.statistics")
    entries, comparisons = check_models(config["models"]), check_comparisons(config["comparisons"], config["models"])
    task = load_task(config["task"])
    path = find_set(task, config["test_set"])
    conversations = read_conversations(path, task)
    if not conversations:
        raise ValueError(f"{path} holds no conversation; an evaluation needs at least one")
    training = [row for file in config["training"] for row in read_conversations(file, task)]
    local = {f"{e['name']} seed {e['seed']}": e["path"] for e in entries if e["kind"] in ("hf", "run", "recorded")}
    inputs = {"task": task.folder / "task.yaml", "test_set": path} | local
    inputs |= {f"training {number}": file for number, file in enumerate(config["training"])}
    folder = run.open_run(workdir, config, inputs=inputs, parents=sorted({e["path"] for e in entries if e["kind"] == "run"}))
    if folder.finished:
        print_tables(report, folder.folder)
        return folder.result

    # Answers, one entry after the other; what is already there is not asked again.
    ids = runner.label_ids(task)
    predictions = folder.folder / "predictions.jsonl"
    timings, about = [], {}
    with runner.PredictionLog(predictions) as log:
        for entry in entries:
            names = {"model": entry["name"], "test_set": config["test_set"], "seed": entry["seed"]}
            if not log.missing(conversations, **names):
                continue
            timing, about[f"{entry['name']} seed {entry['seed']}"] = answer(task, conversations, training, entry, names, asking, log)
            timings.append(timing)
            print(f"{entry['name']} seed {entry['seed']}: {timing['asked']} asked in {timing['seconds']:.1f} s", flush=True)

    # Scores: from the file alone, as anyone else would make them, in an order that does not depend on completion.
    order = {c["conversation_id"]: number for number, c in enumerate(conversations)}
    arm_order = {name: number for number, name in enumerate(dict.fromkeys(e["name"] for e in entries))}
    rows = metrics.read_predictions(str(predictions), ids)
    rows.sort(key=lambda row: (arm_order[row["model"]], row["seed"], order[row["conversation_id"]]))
    run.write_jsonl(predictions, rows)
    gold_of = {c["conversation_id"]: runner.gold_label(c) for c in conversations}
    arms = metrics.arms(rows, gold_of)
    scores = metrics.results(arms, ids, runner.pair_ids(conversations), comparisons, statistics)
    run.write_json(folder.folder / "scores.json", scores)
    names_of = {c.id: c.name_ja for c in task.categories}
    run.write_json(folder.folder / "details.json", {
        "task": task.id, "language": task.language, "test_set": {"name": config["test_set"], "path": str(path), "sha256": run.sha256_file(path)},
        "checked_speaker": task.speakers[0],
        "labels": [{"id": label, "text": text, "name": names_of.get(label, text)} for label, text in zip(ids, task.labels, strict=True)],
        "arms": [metrics.details(arm, ids, statistics) for arm in arms.values()], "timings": timings,
    })  # fmt: skip
    folder.note(models=about)
    print_tables(report, folder.folder)
    primary = {r["model"]: r["value"] for r in scores["scores"] if r["metric"] == "exact_category"}
    return folder.finish({"test_set": config["test_set"], "n": len(conversations), "exact_category": primary,
                          "scores": str(folder.folder / "scores.json")})  # fmt: skip


def answer(
    task: Any, conversations: list, training: list, entry: dict[str, Any], names: dict[str, Any], asking: Any, log: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let one entry answer what the log lacks; returns its timing and what it is (for the manifest)."""
    import time

    from swallow_jax import run
    from swallow_jax.evaluate import baselines, runner

    started = time.perf_counter()
    if entry["kind"] not in BASELINES:
        from swallow_jax.generate import backends

        section = {key: value for key, value in entry.items() if key not in ("name", "seed")}
        backend = backends.open_backend(section)
        timing = runner.evaluate(task, conversations, backend, asking=asking, out=log, **names)
        return timing | {"seconds_with_loading": time.perf_counter() - started}, backend.describe()
    if entry["kind"] == "constant":
        baseline = baselines.constant(task, training, metric=entry["metric"])
    elif entry["kind"] == "keywords":
        baseline = baselines.keywords(task)
    else:
        settings = run.build(baselines.NgramSettings, entry["settings"], f"config.models {entry['name']!r} settings")
        baseline = baselines.ngrams(task, training, settings=settings, seed=entry["seed"])
    asked = baselines.evaluate(baseline, conversations, out=log, **names)
    seconds = time.perf_counter() - started
    timing = {"model": entry["name"], "seed": entry["seed"], "asked": asked, "kept": len(conversations) - asked, "seconds": seconds}
    return timing, baseline.about


def check_models(models: tuple) -> list[dict[str, Any]]:
    """Every entry has what its kind needs, and no name stands twice with one seed."""
    needs = {"constant": {"metric"}, "keywords": set(), "ngrams": {"settings"}}
    seen = set()
    for number, entry in enumerate(models):
        where = f"config.models[{number}]"
        for field in ("name", "kind", "seed"):
            if field not in entry:
                raise ValueError(f"{where}: missing field {field}; an entry is {{name, kind, seed, ...}}")
        if entry["kind"] not in (*BASELINES, "hf", "run", "endpoint", "recorded"):
            raise ValueError(f"{where}: kind {entry['kind']!r} is unknown; use {', '.join(BASELINES)}, hf, run, endpoint or recorded")
        for field in needs.get(entry["kind"], {"path"}):
            if field not in entry:
                raise ValueError(f"{where}: kind {entry['kind']!r} needs the field {field}")
        if (entry["name"], entry["seed"]) in seen:
            raise ValueError(f"{where}: {entry['name']!r} with seed {entry['seed']} stands twice; give it another seed or name")
        seen.add((entry["name"], entry["seed"]))
    if not seen:
        raise ValueError("config.models is empty; name at least one model or baseline")
    return list(models)


def check_comparisons(comparisons: tuple, models: tuple) -> list[dict[str, str]]:
    """Declared comparisons name models of this config and metrics that exist."""
    from swallow_jax.evaluate import metrics

    names = {entry["name"] for entry in models}
    for number, entry in enumerate(comparisons):
        where = f"config.comparisons[{number}]"
        if set(entry) != {"a", "b", "metric"}:
            raise ValueError(f"{where}: has {sorted(entry)}; a comparison is {{a, b, metric}}")
        for side in ("a", "b"):
            if entry[side] not in names:
                raise ValueError(f"{where}: {entry[side]!r} is no model of this config; there are {', '.join(sorted(names))}")
        metrics.metric(entry["metric"])
    return list(comparisons)


def find_set(task: Any, name: str) -> Path:
    sets = task.test_sets | task.dev_sets
    if name not in sets:
        raise ValueError(f"config.test_set: task {task.id} has no set {name!r}; it has: {', '.join(sets)}")
    return sets[name]


def print_tables(report: Any, folder: Path) -> None:
    evaluation = report.read_evaluation(folder)
    print(report.arms_text([evaluation]))
    print(report.comparisons_text([evaluation]), flush=True)


if __name__ == "__main__":
    door.launch(main, __doc__)
