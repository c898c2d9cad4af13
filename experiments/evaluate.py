"""Evaluate: ask models and baselines about a test set, score the answers, compare the arms declared in the config.

    python -m experiments.evaluate --config=configs/evaluate/tiny.py --workdir=runs/evaluate/tiny

Reads a task folder and its test set; writes `predictions.jsonl`, `scores.json` (the results form), `details.json` (confusion,
per-category figures, calibration, thresholds, costs). A killed evaluation goes on where it stopped. Config fields:

    task, test_set      task folder; one of its test sets by name, or a dev set as dev:NAME
    training            conversation files that the constant and n-gram baselines learn from
    asking              mode 'labels' or 'generate', prompt, normalise, max_new_tokens; most_labels?, window?, shots?
    engine              dtype, attention, slots, max_length, chunk, tokens_per_batch of the models run here (hf, run)
    models              a tuple of {name, kind, seed, ...}; rows of one name with several seeds are one arm. Kinds:
                        constant {metric} | keywords | ngrams {settings} | hf, run {path, tokenizer?} | endpoint, recorded
                        {fields of swallow_jax.generate.backends}; `asking` in an entry replaces the common one, `price` adds
                        what tokens or hours cost (swallow_jax.evaluate.operating.Price)
    comparisons         a tuple of {a, b, metric}, written before the run
    statistics          level, permutations, resamples, seed, bins, simulations
    operating           None, or dev_set, recalls, prevalences, talks: thresholds and calibration from the dev set alone
    questions, slices   None, or four-choice questions (swallow_jax.evaluate.knowledge); files of documents for bits per byte
    kept                a tuple of {before, after, test_set, metric, margin}: what an adaptation may cost, with a printed verdict
    robustness          None, or material, kinds, seed, asr_rate, filler_rate: how many verdicts flip on disturbed transcripts
    ranking             a tuple of {metric, test_set, better}: one table of the models by mean rank, for choosing a base
"""

import dataclasses
import functools
import re
import time
from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import report, run
from swallow_jax.evaluate import baselines, knowledge, metrics, operating, robustness, runner
from swallow_jax.evaluate.operating import Operating
from swallow_jax.evaluate.robustness import Robustness
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
    operating: Operating | None = None
    questions: knowledge.Questions | None = None
    slices: tuple = ()
    kept: tuple = ()
    robustness: Robustness | None = None
    ranking: tuple = ()


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
MODELS = ("hf", "run", "endpoint", "recorded")  # the others are baselines, which answer no questions


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Answer, score, compare; returns the primary metric of each model."""
    # The door: every name is checked before anything is asked or paid for.
    settings = run.build(Settings, config.to_dict(), "config")
    check(settings)
    task = load_task(settings.task)
    path = set_path(task, settings.test_set)
    files = input_files(settings, task, path)
    for name, file in files.items():
        if not Path(file).exists():
            raise FileNotFoundError(f"{name}: {file} does not exist; make it first, or correct the path")
    conversations = read_conversations(path, task)
    if not conversations:
        raise ValueError(f"{path} holds no conversation; an evaluation needs at least one")
    training = [row for file in settings.training for row in read_conversations(file, task)]
    work = workload(settings, task, conversations)
    inputs = {"task": task.folder / "task.yaml", "prompts": task.folder / "prompts", "test_set": path}
    inputs |= {name: file for name, file in files.items() if name != "config.test_set"}
    parents = sorted({e["path"] for e in settings.models if e["kind"] == "run"})
    job = run.open_run(workdir, config.to_dict(), inputs=inputs, parents=parents)
    if job.finished:
        print_tables(job.folder)
        return job.result

    # Answers, one model after the other; what is already there is not asked again.
    about, timings = job.manifest.get("models", {}), job.manifest.get("timings", [])
    for entry in settings.models:
        subject = Subject(settings, task, training, entry, job.folder)
        for piece in work:
            names = {"model": entry["name"], "test_set": piece.test_set, "seed": entry["seed"]}
            with runner.PredictionLog(job.folder / piece.file) as log:
                if (piece.kind != "task" and not scores(settings, entry)) or not log.missing(piece.items, **names):
                    continue
                started = time.perf_counter()
                counts = subject.answer(piece, names, log)
            about[title(entry)] = subject.describe()
            counts |= {"replayed": entry["kind"] == "recorded", "seconds_with_loading": time.perf_counter() - started}
            timings.append(names | counts)
            job.note(models=about, timings=timings)
            print(f"{title(entry)}: {counts['asked']} of {piece.test_set} asked in {counts['seconds']:.1f} s", flush=True)

    # Scores: from the files alone, as anyone else would make them, in an order that does not depend on completion.
    ids, pairs, several = runner.label_ids(task), runner.pair_ids(conversations), task.label_policy == "multi"
    arms = {piece.test_set: read_arms(job.folder, piece, settings, ids) for piece in work if piece.kind == "task"}
    main_arms = arms[settings.test_set]
    found = metrics.results(main_arms, ids, pairs, settings.comparisons, settings.statistics)
    known = knowledge.tables([row for piece in work if piece.kind != "task" for row in ordered(job.folder, piece, settings)])
    found["scores"] += knowledge.scores(known, settings.statistics)
    found["paired"] = metrics.adjusted([*found["paired"], *knowledge.kept(known, declared(settings), settings.statistics)])
    run.write_json(job.folder / "scores.json", found)
    names_of = {category.id: category.name_ja if task.language == "ja" else category.name_en for category in task.categories}
    main_timings = [t for t in timings if t["test_set"] == settings.test_set]
    prices = {e["name"]: run.build(operating.Price, e["price"], "config.models price") for e in settings.models if "price" in e}
    details = {
        "task": task.id,
        "language": task.language,
        "primary": "exact_set" if several else report.PRIMARY,
        "test_set": {"name": settings.test_set, "path": str(path), "sha256": run.sha256_file(path)},
        "labels": [{"id": i, "text": t, "name": names_of.get(i, t)} for i, t in zip(ids, task.labels, strict=True)],
        "arms": [metrics.details(arm, ids, settings.statistics, several=several) for arm in main_arms.values()],
        "costs": {name: operating.cost([t for t in main_timings if t["model"] == name], prices.get(name)) for name in main_arms},
        "timings": timings,
        "models": about,
        "ranking": list(settings.ranking),
    }
    if settings.operating:
        dev = arms[settings.operating.dev_set]
        details["operating"] = [
            operating.points(dev[name], arm, ids, several, settings.operating, settings.statistics)
            for name, arm in main_arms.items()
        ]
    if settings.robustness:
        material = robustness.read_material(settings.robustness.material)
        details["robustness"] = [
            {"model": name} | robustness.flips(
                [row for seed in arm.rows for row in seed],
                [row for seed in arms[f"{settings.test_set}, {kind}"][name].rows for row in seed],
                kind, material, settings.statistics.level,
            )
            for name, arm in main_arms.items() for kind in settings.robustness.kinds
        ]  # fmt: skip
    run.write_json(job.folder / "details.json", details)
    print_tables(job.folder)
    primary = {row["model"]: row["value"] for row in found["scores"] if row["metric"] == details["primary"]}
    done = {"test_set": settings.test_set, "n": len(conversations), details["primary"]: primary}
    if settings.kept:
        done["kept"] = {f"{row['test_set']} {row['metric']}": row["verdict"] for row in found["paired"] if "verdict" in row}
    return job.finish(done | {"scores": str(job.folder / "scores.json")})


@dataclasses.dataclass(frozen=True)
class Piece:
    """Items that every model answers, and the file their rows go to."""

    kind: str  # 'task', 'questions', 'slice'
    test_set: str
    file: str
    items: list


def workload(settings: Settings, task: Task, conversations: list) -> list[Piece]:
    """The test set, the dev set, disturbed copies of the test set, questions and slices, as far as the config asks for them."""
    work = [Piece("task", settings.test_set, "predictions.jsonl", conversations)]
    if settings.operating:
        dev = settings.operating.dev_set
        work.append(Piece("task", dev, "dev_predictions.jsonl", read_conversations(set_path(task, dev), task)))
    if settings.robustness:
        material = robustness.read_material(settings.robustness.material)
        for kind in settings.robustness.kinds:
            rows = robustness.perturbed(conversations, kind, task.speakers[0], material, settings.robustness)
            work.append(Piece("task", f"{settings.test_set}, {kind}", f"predictions_{kind}.jsonl", rows))
    for file in settings.questions.files if settings.questions else ():
        work.append(Piece("questions", knowledge.set_name(file), "questions.jsonl", knowledge.read_questions(file)))
    for file in settings.slices:
        work.append(Piece("slice", Path(file).stem, "slices.jsonl", knowledge.read_slice(file)))
    return work


class Subject:
    """One entry of config.models; opened when it is first asked."""

    def __init__(self, settings: Settings, task: Task, training: list, entry: dict[str, Any], folder: Path):
        self.settings, self.task, self.training, self.entry, self.folder = settings, task, training, entry, folder

    @functools.cached_property
    def backend(self) -> Any:
        return open_model(self.entry, self.settings.engine, self.folder)

    @functools.cached_property
    def baseline(self) -> baselines.Baseline:
        if self.entry["kind"] == "constant":
            return baselines.constant(self.task, self.training, metric=self.entry["metric"])
        if self.entry["kind"] == "keywords":
            return baselines.keywords(self.task)
        numbers = run.build(baselines.NgramSettings, self.entry["settings"], f"config.models {self.entry['name']!r} settings")
        return baselines.ngrams(self.task, self.training, settings=numbers, seed=self.entry["seed"])

    def answer(self, piece: Piece, names: dict[str, Any], log: runner.PredictionLog) -> dict[str, Any]:
        """Answer what the log lacks; returns counts and seconds."""
        if self.entry["kind"] not in MODELS:
            several = self.task.label_policy == "multi"
            return baselines.evaluate(self.baseline, piece.items, out=log, several=several, **names)
        if piece.kind == "task":
            asking = self.settings.asking
            if "asking" in self.entry:
                asking = run.build(runner.Asking, self.entry["asking"], f"config.models {self.entry['name']!r} asking")
            return runner.evaluate(self.task, piece.items, self.backend, asking=asking, out=log, **names)
        started, left = time.perf_counter(), log.missing(piece.items, **names)
        if piece.kind == "questions":
            rows = knowledge.ask_questions(left, self.backend, self.settings.questions)
        else:
            rows = knowledge.read_aloud(left, self.backend)
        for row in rows:
            log.append(names | row)
        return {"asked": len(left), "kept": len(piece.items) - len(left), "seconds": time.perf_counter() - started}

    def describe(self) -> dict[str, Any]:
        if self.entry["kind"] not in MODELS:
            return self.baseline.about
        facts = dict(self.backend.describe())
        folder = Path(self.entry.get("path", ""))
        if self.entry["kind"] in ("hf", "run") and folder.is_dir():
            facts["weights_bytes"] = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) or None
            facts["licence"] = facts.get("licence") or ", ".join(run.card_licences(folder)) or None
        return facts


def scores(settings: Settings, entry: dict[str, Any]) -> bool:
    """Whether an entry gives log-probabilities of closed answers, as questions and slices need them; chat endpoints do not."""
    return entry["kind"] in MODELS and entry.get("asking", {}).get("mode", settings.asking.mode) == "labels"


def ordered(folder: Path, piece: Piece, settings: Settings) -> list[dict[str, Any]]:
    """The rows of a piece in the config's and its items' order."""
    order = {item["conversation_id"]: number for number, item in enumerate(piece.items)}
    models = {name: number for number, name in enumerate(dict.fromkeys(e["name"] for e in settings.models))}
    file = folder / piece.file
    rows = [row for row in run.read_jsonl(file) if row["test_set"] == piece.test_set] if file.is_file() else []
    return sorted(rows, key=lambda row: (models[row["model"]], row["seed"], order[row["conversation_id"]]))


def read_arms(folder: Path, piece: Piece, settings: Settings, ids: list[str]) -> dict[str, metrics.Arm]:
    """Check a predictions file, put it in order, and group it by model beside what the set says of each item."""
    metrics.read_predictions(str(folder / piece.file), ids)
    gold = {c["conversation_id"]: runner.gold_label(c) for c in piece.items}
    metrics.arms(run.read_jsonl(folder / piece.file), gold)
    rows = ordered(folder, piece, settings)
    run.write_jsonl(folder / piece.file, rows)
    arms = metrics.arms(metrics.with_gold(rows, piece.items), gold)
    return {name: arms[name] for name in dict.fromkeys(e["name"] for e in settings.models)}


def open_model(entry: dict[str, Any], engine: EngineSettings, folder: Path) -> Any:
    """The backend of an entry. What an endpoint answered is kept in the run folder, ready to be replayed as kind recorded."""
    from swallow_jax.generate import backends

    if entry["kind"] in ("endpoint", "recorded"):
        backend = backends.open_backend({key: value for key, value in entry.items() if key not in ("seed", "asking", "price")})
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
    if settings.operating and settings.operating.dev_set == settings.test_set:
        raise ValueError(
            f"config.operating.dev_set is the test set itself, {settings.test_set!r}; thresholds come from another set"
        )
    for number, entry in enumerate(declared(settings)):
        for name in (entry.before, entry.after):
            if name not in names:
                raise ValueError(f"config.kept[{number}]: {name!r} is no model of this config; there are {', '.join(names)}")


def declared(settings: Settings) -> list[knowledge.Kept]:
    return [run.build(knowledge.Kept, entry, f"config.kept[{number}]") for number, entry in enumerate(settings.kept)]


def input_files(settings: Settings, task: Task, test_set: Path) -> dict[str, str | Path]:
    """Where the config names a file or folder -> which; all are looked for before anything is asked."""
    files = {"config.test_set": test_set}
    files |= {f"config.training[{number}]": file for number, file in enumerate(settings.training)}
    askings = {"config.asking": settings.asking.shots}
    askings |= {f"config.models {title(e)!r} asking": e["asking"].get("shots") for e in settings.models if "asking" in e}
    files |= {f"{where}.shots": file for where, file in askings.items() if file}
    files |= {f"config.models {title(e)!r}": e["path"] for e in settings.models if e["kind"] in ("hf", "run", "recorded")}
    if settings.operating:
        files["config.operating.dev_set"] = set_path(task, settings.operating.dev_set)
    if settings.questions:
        files |= {f"config.questions.files[{number}]": file for number, file in enumerate(settings.questions.files)}
    files |= {f"config.slices[{number}]": file for number, file in enumerate(settings.slices)}
    if settings.robustness:
        files["config.robustness.material"] = settings.robustness.material
    return files


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
    print(report.more_text(evaluation), flush=True)


if __name__ == "__main__":
    door.launch(main, __doc__)
