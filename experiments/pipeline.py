"""The chain: run the stages of one config in order, each into its own folder, and go on where a kill stopped it.

    python -m experiments.pipeline --config=configs/pipeline/demo.py --workdir=runs/demo

A stage is {name, program, config}: a program of experiments/ and the config it runs with; its folder is WORKDIR/name. A finished
stage with the same config and inputs is skipped; one whose inputs have changed stops the pipeline and names them. A config that
takes `runs`, the folder where the stages before it wrote, is given WORKDIR.
"""

import importlib
import json
import time
from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import run

PROGRAMS = ("prepare", "cpt", "synthesize", "sft", "evaluate", "report")


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Run all stages; returns the result of each by name, and the seconds it took this time."""
    stages = [dict(stage) for stage in config.stages]
    # Every name and every config is checked before the first stage starts.
    for stage in stages:
        if set(stage) != {"name", "program", "config"}:
            raise ValueError(f"a stage is {{name, program, config}}, not {stage}")
        if stage["program"] not in PROGRAMS:
            raise ValueError(f"stage {stage['name']}: unknown program {stage['program']!r}; known: {', '.join(PROGRAMS)}")
    if len({stage["name"] for stage in stages}) < len(stages):
        raise ValueError(f"two stages have one name: {[stage['name'] for stage in stages]}")
    configs = [door.load_config(stage["config"], runs=str(workdir)) for stage in stages]

    # A chain may grow: stages that are done are kept, so its own config is written anew, while each stage checks its own.
    run.write_json(workdir / "config.json", config.to_dict())
    results, seconds = {}, {}
    for number, (stage, settings) in enumerate(zip(stages, configs, strict=True), 1):
        print(f"\n== {number}/{len(stages)} {stage['name']}: experiments.{stage['program']} {stage['config']}", flush=True)
        began = time.perf_counter()
        program = importlib.import_module(f"experiments.{stage['program']}")
        results[stage["name"]] = program.main(settings, workdir / stage["name"])
        seconds[stage["name"]] = round(time.perf_counter() - began, 1)
        print(f"-- {stage['name']}: {seconds[stage['name']]} s", flush=True)
    files = {stage["name"]: workdir / stage["name"] / "manifest.json" for stage in stages}
    made = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    manifest = {
        "format_version": run.FORMAT_VERSION,
        "stages": {name: run.sha256_path(workdir / name) for name in made},
        "licences": sorted({licence for stage in made.values() for licence in stage["licences"]}),
        "result": results,
        "seconds": {name: stage["seconds"] for name, stage in made.items()},
    }
    run.write_json(workdir / "manifest.json", manifest)
    return {"stages": len(stages), "seconds": round(sum(seconds.values()), 1), "last": results[stages[-1]["name"]]}


if __name__ == "__main__":
    door.launch(main, __doc__)
