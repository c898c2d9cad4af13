"""Evaluate: ask models and baselines about a test set, score the answers, compare the arms declared in the config.

    python -m experiments.evaluate --config=configs/evaluate/tiny.py --workdir=runs/evaluate/tiny

Reads a task folder and its test set; writes `predictions.jsonl`, `scores.json` (the results form), `details.json` (confusion,
per-category figures, calibration, seconds). A killed evaluation goes on where it stopped. Config fields:

    task, test_set      task folder; one of its test sets by name, or a dev set as dev:NAME
    training            conversation files that the constant and n-gram baselines learn from
    asking              mode 'labels' or 'generate', prompt, normalise, max_new_tokens
    engine              dtype, attention, slots, max_length, chunk, tokens_per_batch of the models run here (hf, run)
    models              a tuple of {name, kind, seed, ...}; rows of one name with several seeds are one arm. Kinds:
                        constant {metric} | keywords | ngrams {settings} | hf, run {path, tokenizer?} | endpoint, recorded
                        {fields of swallow_jax.generate.backends}; `asking` in an entry replaces the common one
    comparisons         a tuple of {a, b, metric}, written before the run
    statistics          level, permutations, resamples, seed, bins
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import report, run
from swallow_jax.evaluate import baselines, metrics, runner
from swallow_jax.task import Task, load_task, read_conversations


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How models in this process run (see swallow_jax.generate.backends)."""

    dtype: str
    attention: str
    slots: int
    max_length: int
    chunk: int
    tokens_per_batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The config; fields as in the docstring above."""

    task: str
    test_set: str
    training: tuple
    asking: runner.Asking
    engine: EngineSettings
    models: tuple
    comparisons: tuple
    statistics: metrics.Statistics


# What an entry of each kind must have beside name, kind and seed.
NEEDS = {
    "constant": ("metric",),
    "keywords": (),
    "ngrams": ("settings",),
    "hf": ("path",),
    "run": ("path",),
    "endpoint": ("base_url", "model"),
    "recorded": ("path",),
}


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Answer, score, compare; returns the primary metric of each model."""
    # The door: every name is checked before anything is asked or paid for.
    settings = run.build(Settings, config.to_dict(), "config")
    check(settings)
    task = load_task(settings.task)
    path = set_path(task, settings.test_set)
    check_files(settings, task, path)
    conversations = read_conversations(path, task)
    if not conversations:
        raise ValueError(f"{path} holds no conversation; an evaluation needs at least one")
    training = [row for file in settings.training for row in read_conversations(file, task)]
    inputs = {"task": task.folder / "task.yaml", "prompts": task.folder / "prompts", "test_set": path}
    inputs |= {f"training {number}": file for number, file in enumerate(settings.training)}
    inputs |= {title(e): e["path"] for e in settings.models if e["kind"] in ("hf", "run", "recorded")}
    parents = sorted({e["path"] for e in settings.models if e["kind"] == "run"})
    job = run.open_run(workdir, config.to_dict(), inputs=inputs, parents=parents)
    if job.finished:
        print_tables(job.folder)
        return job.result

    # Answers, one entry after the other; what is already there is not asked again.
    about, timings = job.manifest.get("models", {}), job.manifest.get("timings", [])
    with runner.PredictionLog(job.folder / "predictions.jsonl") as log:
        for entry in settings.models:
            names = {"model": entry["name"], "test_set": settings.test_set, "seed": entry["seed"]}
            if not log.missing(conversations, **names):
                continue
            started = time.perf_counter()
            found, about[title(entry)] = answer(settings, task, conversations, training, entry, names, log)
            timings.append(names | found | {"seconds_with_loading": time.perf_counter() - started})
            job.note(models=about, timings=timings)
            print(f"{title(entry)}: {found['asked']} asked in {found['seconds']:.1f} s", flush=True)

    # Scores: from the file alone, as anyone else would make them, in an order that does not depend on completion.
    ids = runner.label_ids(task)
    rows = metrics.read_predictions(str(job.folder / "predictions.jsonl"), ids)
    arm_order = {name: number for number, name in enumerate(dict.fromkeys(e["name"] for e in settings.models))}
    order = {c["conversation_id"]: number for number, c in enumerate(conversations)}
    arms = metrics.arms(rows, {c["conversation_id"]: runner.gold_label(c) for c in conversations})
    rows.sort(key=lambda row: (arm_order[row["model"]], row["seed"], order[row["conversation_id"]]))
    run.write_jsonl(job.folder / "predictions.jsonl", rows)
    arms = {name: arms[name] for name in arm_order}
    scores = metrics.results(arms, ids, runner.pair_ids(conversations), settings.comparisons, settings.statistics)
    run.write_json(job.folder / "scores.json", scores)
    names_of = {category.id: category.name_ja for category in task.categories}
    details = {
        "task": task.id,
        "language": task.language,
        "test_set": {"name": settings.test_set, "path": str(path), "sha256": run.sha256_file(path)},
        "labels": [{"id": i, "text": t, "name": names_of.get(i, t)} for i, t in zip(ids, task.labels, strict=True)],
        "arms": [metrics.details(arm, ids, settings.statistics) for arm in arms.values()],
        "timings": timings,
    }
    run.write_json(job.folder / "details.json", details)
    print_tables(job.folder)
    primary = {row["model"]: row["value"] for row in scores["scores"] if row["metric"] == report.PRIMARY}
    done = {"test_set": settings.test_set, "n": len(conversations), report.PRIMARY: primary}
    return job.finish(done | {"scores": str(job.folder / "scores.json")})


def answer(
    settings: Settings,
    task: Task,
    conversations: list,
    training: list,
    entry: dict[str, Any],
    names: dict[str, Any],
    log: runner.PredictionLog,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let one entry answer what the log lacks; returns counts and seconds, and what the entry is (for the manifest)."""
    if entry["kind"] in ("hf", "run", "endpoint", "recorded"):
        asking = settings.asking
        if "asking" in entry:
            asking = run.build(runner.Asking, entry["asking"], f"config.models {entry['name']!r} asking")
        backend = open_model(entry, settings.engine, log.path.parent)
        return runner.evaluate(task, conversations, backend, asking=asking, out=log, **names), backend.describe()
    if entry["kind"] == "constant":
        baseline = baselines.constant(task, training, metric=entry["metric"])
    elif entry["kind"] == "keywords":
        baseline = baselines.keywords(task)
    else:
        numbers = run.build(baselines.NgramSettings, entry["settings"], f"config.models {entry['name']!r} settings")
        baseline = baselines.ngrams(task, training, settings=numbers, seed=entry["seed"])
    return baselines.evaluate(baseline, conversations, out=log, **names), baseline.about


def open_model(entry: dict[str, Any], engine: EngineSettings, folder: Path) -> Any:
    """The backend of an entry. What an endpoint answered is kept in the run folder, ready to be replayed as kind recorded."""
    from swallow_jax.generate import backends

    if entry["kind"] in ("endpoint", "recorded"):
        backend = backends.open_backend({key: value for key, value in entry.items() if key not in ("seed", "asking")})
        if entry["kind"] == "recorded":
            return backend
        spelling = re.sub(r"[^\w.-]+", "_", f"{entry['name']}_{entry['seed']}")
        return backends.record(backend, folder / f"responses_{spelling}.jsonl")
    from swallow_jax import checkpoint, llama, text

    params, shape = checkpoint.open_model(entry["path"])
    sizes = dataclasses.asdict(engine)
    compute = llama.Compute(dtype=sizes.pop("dtype"), attention=sizes.pop("attention"), remat="none", scan_layers=False)
    # A GGUF file carries its tokenizer; of a run it stands in its model folder.
    beside = entry["path"] if Path(entry["path"]).is_file() else checkpoint.model_folder(entry["path"])
    tokenizer = text.load_tokenizer(entry.get("tokenizer", beside))
    return backends.JaxBackend(params, shape, tokenizer, compute=compute, name=entry["name"], source=entry["path"], **sizes)


def check(settings: Settings) -> None:
    """Entries have what their kind needs, no name stands twice with one seed, comparisons name what exists."""
    seen = set()
    for number, entry in enumerate(settings.models):
        where = f"config.models[{number}]"
        for field in ("name", "kind", "seed"):
            if field not in entry:
                raise ValueError(f"{where}: missing field {field}; an entry is {{name, kind, seed, ...}}")
        if entry["kind"] not in NEEDS:
            raise ValueError(f"{where}: kind {entry['kind']!r} is unknown; known: {', '.join(NEEDS)}")
        for field in NEEDS[entry["kind"]]:
            if field not in entry:
                raise ValueError(f"{where}: kind {entry['kind']!r} needs the field {field}")
        if title(entry) in seen:
            raise ValueError(f"{where}: {title(entry)!r} stands twice; give it another seed or name")
        seen.add(title(entry))
    if not seen:
        raise ValueError("config.models is empty; name at least one model or baseline")
    names = dict.fromkeys(entry["name"] for entry in settings.models)
    for number, entry in enumerate(settings.comparisons):
        where = f"config.comparisons[{number}]"
        if set(entry) != {"a", "b", "metric"}:
            raise ValueError(f"{where}: has {sorted(entry)}; a comparison is {{a, b, metric}}")
        for side in ("a", "b"):
            if entry[side] not in names:
                raise ValueError(f"{where}: {entry[side]!r} is no model of this config; there are {', '.join(names)}")
        metrics.metric(entry["metric"])


def check_files(settings: Settings, task: Task, test_set: Path) -> None:
    """The files and folders that the config and the task name exist; the error says where the name stands."""
    wanted = [(f"config.test_set (named in {task.folder / 'task.yaml'})", test_set)]
    wanted += [("config.training", file) for file in settings.training]
    wanted += [(f"config.models {title(e)!r}", e["path"]) for e in settings.models if e["kind"] in ("hf", "run", "recorded")]
    for name, path in wanted:
        if not Path(path).exists():
            raise FileNotFoundError(f"{name}: {path} does not exist; make it first, or correct the path")


def title(entry: dict[str, Any]) -> str:
    return f"{entry['name']} seed {entry['seed']}"


def set_path(task: Task, name: str) -> Path:
    """The file of a test set by its name, of a dev set by `dev:NAME`: a task may use one name for both."""
    sets = task.test_sets | {f"dev:{dev}": path for dev, path in task.dev_sets.items()}
    if name not in sets:
        raise ValueError(f"config.test_set: task {task.id} has no set {name!r}; it has: {', '.join(sets)}")
    return sets[name]


def print_tables(folder: Path) -> None:
    evaluation = report.read_evaluation(folder)
    print(report.arms_text([evaluation]))
    print(report.comparisons_text([evaluation]), flush=True)


if __name__ == "__main__":
    door.launch(main, __doc__)
