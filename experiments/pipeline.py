"""The chain: run the stages of one config in order, each into its own folder, and go on where a kill stopped it.

    python -m experiments.pipeline --config=configs/pipeline/demo.py --workdir=runs/demo

A stage is {name, program, config, overrides?}: a program of experiments/, the config it runs with and fields to change in it
("optim.learning_rate": 1e-3); its folder is WORKDIR/name. A finished stage with the same config and inputs is skipped; one whose
inputs have changed stops the pipeline and names them. A config that takes `runs`, the folder where the stages before it wrote,
is given WORKDIR. All files that no stage makes are looked for before the first stage starts; `downloads` in the config says of
those that must be fetched what they are, under which licence, and from where. --until=NAME stops after a stage.
"""

import importlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from swallow_jax import run

PROGRAMS = ("prepare", "cpt", "synthesize", "sft", "evaluate", "report")
TRAINING = ("cpt", "sft")  # run on all processes of a job
TEXT = ("prepare", "report")  # run on its first process; what remains holds a model and runs in one process
WHERE = ("mesh", "hosts", "checkpoint")  # sections that a run may go on without (experiments.cpt)


def main(config: Any, workdir: Path, until: str = "") -> dict[str, Any]:
    """Run all stages, or those up to `until`; returns the number of stages, the seconds they took this time, the last result."""
    from swallow_jax import hosts

    # Every name, every config and every file is checked before the first stage starts.
    stages = [dict(stage) for stage in config.stages]
    configs = load(stages, workdir)
    if until:
        names = [stage["name"] for stage in stages]
        if until not in names:
            raise ValueError(f"--until={until}: no such stage; there are {', '.join(names)}")
        stages, configs = stages[: names.index(until) + 1], configs[: names.index(until) + 1]
    missing = absent(stages, configs, workdir)
    if missing:
        raise FileNotFoundError(absence(missing, config.get("downloads", ())))
    hosts.start(config.get("hosts"))
    processes = _processes()
    if processes > 1 and (others := [s["name"] for s in stages if s["program"] not in (*TRAINING, *TEXT)]):
        raise ValueError(
            f"{', '.join(others)} run in one process, this job has {processes}; give the training stages to it by their own "
            "commands (python -m experiments.cpt ... --workdir=RUNS/STAGE), and the pipeline finds them finished"
        )
    alone = processes == 1 or hosts.first()

    # A chain may grow: stages that are done are kept, so its own config is written anew, while each stage checks its own.
    if alone:
        run.write_json(workdir / "config.json", config.to_dict())
    results, seconds = {}, {}
    for number, (stage, settings) in enumerate(zip(stages, configs, strict=True), 1):
        if alone:
            print(f"\n== {number}/{len(stages)} {stage['name']}: experiments.{stage['program']} {stage['config']}", flush=True)
        began = time.perf_counter()
        if alone or stage["program"] in TRAINING:
            program = importlib.import_module(f"experiments.{stage['program']}")
            results[stage["name"]] = program.main(settings, workdir / stage["name"])
        else:
            results[stage["name"]] = _others_result(workdir / stage["name"])
        seconds[stage["name"]] = round(time.perf_counter() - began, 1)
        if alone:
            print(f"-- {stage['name']}: {seconds[stage['name']]} s", flush=True)
    files = {stage["name"]: workdir / stage["name"] / "manifest.json" for stage in stages}
    made = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    manifest = {
        "format_version": run.FORMAT_VERSION,
        "stages": {name: run.sha256_path(workdir / name) for name in made},
        "configs": {stage["name"]: settled(settings) for stage, settings in zip(stages, configs, strict=True)},
        "licences": sorted({licence for stage in made.values() for licence in stage["licences"]}),
        "result": results,
        "seconds": {name: stage["seconds"] for name, stage in made.items()},
    }
    if alone:
        run.write_json(workdir / "manifest.json", manifest)
    return {"stages": len(stages), "seconds": round(sum(seconds.values()), 1), "last": results[stages[-1]["name"]]}


def load(stages: Sequence[Mapping[str, Any]], workdir: Path) -> list[Any]:
    """The config of each stage with its overrides; ValueError for a stage that is none."""
    for stage in stages:
        if not {"name", "program", "config"} <= set(stage) <= {"name", "program", "config", "overrides"}:
            raise ValueError(f"a stage is {{name, program, config}}, perhaps with overrides, not {dict(stage)}")
        if stage["program"] not in PROGRAMS:
            raise ValueError(f"stage {stage['name']}: unknown program {stage['program']!r}; known: {', '.join(PROGRAMS)}")
    if len({stage["name"] for stage in stages}) < len(stages):
        raise ValueError(f"two stages have one name: {[stage['name'] for stage in stages]}")
    configs = []
    for stage in stages:
        settings = door.load_config(stage["config"], runs=str(workdir))
        try:
            configs.append(door.override(settings, stage.get("overrides", {})))
        except ValueError as error:
            raise ValueError(f"stage {stage['name']}: {error}") from None
    return configs


def settled(settings: Any) -> str:
    """SHA-256 of a resolved config, less the sections that say where it runs and what it keeps."""
    return run.sha256_json({name: value for name, value in settings.to_dict().items() if name not in WHERE})


# What must be there before the first stage.


def absent(
    stages: Sequence[Mapping[str, Any]], configs: Sequence[Any], workdir: Path, made: Iterable[Path] = ()
) -> list[tuple[str, str]]:
    """(stage, path) of each input that does not exist and lies in no folder of an earlier stage or of `made`."""
    folders, found = [*made], []
    for stage, settings in zip(stages, configs, strict=True):
        for path in dict.fromkeys(map(str, inputs(stage["program"], settings))):
            if not Path(path).exists() and not any(Path(path).is_relative_to(folder) for folder in folders):
                found.append((stage["name"], path))
        folders.append(workdir / stage["name"])
    return found


def absence(missing: Sequence[tuple[str, str]], downloads: Iterable[Mapping[str, str]]) -> str:
    """One sentence a path: what it is, its licence and where to get it, as far as the config's `downloads` know."""
    known = {entry["path"]: entry for entry in downloads}
    wanted: dict[str, list[str]] = {}
    for stage, path in missing:
        above = next((place for place in known if Path(path).is_relative_to(place)), path)
        wanted.setdefault(above, []).append(stage)
    lines = []
    for path, stages in wanted.items():
        who = f"(for {', '.join(dict.fromkeys(stages))})"
        if path in known:
            entry = known[path]
            lines.append(f"{path} {who}: {entry['what']}, licence {entry['licence']}; get it by {entry['get']}")
        else:
            lines.append(f"{path} {who} does not exist and no earlier stage makes it; correct the path in that stage's config")
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} things are missing, nothing was started:\n" + "\n".join(f"  {line}" for line in lines)


def inputs(program: str, config: Any) -> list[str | Path]:
    """The files and folders that a program reads with this config."""
    return [path for path in _INPUTS[program](config) if path]


def _prepare_inputs(config: Any) -> list[str | Path]:
    from swallow_jax.data import documents

    found = [config.tokenizer]
    if config.corpus:
        found += [*config.corpus.domains, config.corpus.corrections]
        for folder in config.corpus.domains:
            if not Path(folder).is_dir():
                continue
            domain = documents.load_domain(folder)
            for source in domain.sources:
                base, pattern = (Path(folder), source.path) if source.path else (Path(config.corpus.root), source.place)
                if next(base.glob(pattern.lstrip("/")), None) is None:
                    found.append(base / pattern.lstrip("/"))  # a pattern that matches nothing is a path that does not exist
    return found


def _training_inputs(config: Any) -> list[str | Path]:
    return [config.init] if config.init else [config.tokenizer]


def _cpt_inputs(config: Any) -> list[str | Path]:
    if config.data.prepare:  # the program makes its own shards
        return [config.init]
    shards = [*(folder for folder, _ in config.data.mixture), config.data.heldout]
    return [*_training_inputs(config), *(Path(folder) / "index.json" for folder in shards)]


def _sft_inputs(config: Any) -> list[str | Path]:
    shards = [Path(folder) / "index.json" for folder, _ in config.data.replay]
    return [*_training_inputs(config), config.data.samples, config.data.heldout_samples, *shards]


def _synthesize_inputs(config: Any) -> list[str | Path]:
    backends = [teacher["backend"] for teacher in config.teachers.to_dict().values()]
    backends += [config.verifier.backend.to_dict()] if config.verifier else []
    personas = (config.plan.personas or "").rpartition(":")[0]
    return [config.task, personas, *(backend.get("path") for backend in backends if backend["kind"] != "endpoint")]


def _evaluate_inputs(config: Any) -> list[str | Path]:
    from experiments import evaluate
    from swallow_jax.task import load_task

    settings = run.build(evaluate.Settings, config.to_dict(), "config")
    evaluate.check(settings)
    task = load_task(settings.task)
    return list(evaluate.input_files(settings, task, evaluate.set_path(task, settings.test_set)).values())


def _report_inputs(config: Any) -> list[str | Path]:
    return [*config.evaluations, *(entry["folder"] for entry in (*config.training, *config.data, *config.stages))]


_INPUTS = {
    "prepare": _prepare_inputs,
    "cpt": _cpt_inputs,
    "sft": _sft_inputs,
    "synthesize": _synthesize_inputs,
    "evaluate": _evaluate_inputs,
    "report": _report_inputs,
}


def _processes() -> int:
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def _others_result(folder: Path) -> dict[str, Any]:
    """What the first process makes of a stage, as soon as it is there; all processes see one disk."""
    while True:
        manifest = folder / "manifest.json"
        if manifest.is_file() and "result" in (found := json.loads(manifest.read_text(encoding="utf-8"))):
            return found["result"]
        time.sleep(2)


if __name__ == "__main__":
    _UNTIL = flags.DEFINE_string("until", "", "stop after this stage")
    door.launch(lambda config, workdir: main(config, workdir, _UNTIL.value), __doc__)
