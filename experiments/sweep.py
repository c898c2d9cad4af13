"""A sweep: one chain of stages, many sets of overrides; run here, on Slurm, or printed. Then one evaluation over all arms.

    python -m experiments.sweep --config=configs/sweep/demo.py --workdir=runs/sweeps/demo
    python -m experiments.sweep --config=configs/sweep/demo.py --workdir=runs/sweeps/demo --dry_run
    python -m experiments.sweep --config=FILE --workdir=SHARED_DISK --submit=slurm --slurm="nodes=2 gpus_per_node=8"

The config's `sweep()` returns {arm: {"STAGE.field": value}} (helpers in configs/sweep/__init__.py); its get_config() has `shared`
(stages that run once, first), `stages` (those of every arm) and `after` (once all arms are done; "*" there stands for every arm).
A training config with a `sweep()` of its own is a sweep of that one stage. Every arm is checked before anything runs: config,
mesh (against --devices), inputs, plan. Finished arms are skipped; index.json says what each arm is and what came out.
--arm=NAME runs one arm, `shared` or `after` here: the one command an arm that --submit=print shows.
"""

import contextlib
import fcntl
import json
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import door, pipeline
from swallow_jax import launch, run, sweep

_SUBMIT = flags.DEFINE_enum("submit", "local", ["local", "slurm", "print"], "where the arms run")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check every arm and show the commands; write and start nothing")
_ARM = flags.DEFINE_string("arm", "", "run this arm alone, here; or `shared`, or `after`")
_DEVICES = flags.DEFINE_integer("devices", 0, "devices an arm will have (default: those of this machine with --submit=local)")
_MEMORY = flags.DEFINE_float("memory_gb", 0.0, "memory of one of them; weights, moments and gradients of each arm must fit")
_SLURM = flags.DEFINE_string("slurm", "", "resources of a job by submitit's names: 'nodes=2 gpus_per_node=8 slurm_partition=gpu'")
_REQUEUES = flags.DEFINE_integer("requeues", 3, "how often a Slurm job that failed is queued again")
_AT_ONCE = flags.DEFINE_integer("at_once", 16, "Slurm jobs of this sweep that run at a time")


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Expand, check, run what is left; returns counts by state, the index, and which arm won once all are done."""
    plan = Plan(config, config_flags.get_config_filename(flags.FLAGS["config"]), workdir)
    if _ARM.value:
        return plan.run_part(_ARM.value)
    plan.check(_devices(), _MEMORY.value)
    commands = {part: plan.command(part) for part in plan.parts()}
    if _DRY_RUN.value or _SUBMIT.value == "print":
        if not _DRY_RUN.value:
            plan.write_index()
        for part, command in commands.items():
            print(f"{'done   ' if plan.done(part) else 'to run '} {shlex.join(command)}", flush=True)
    elif _SUBMIT.value == "slurm":
        plan.submit(commands)
    else:
        with _locked(workdir) as lock:
            plan.run_all(commands, lock)
    return plan.result(write=not _DRY_RUN.value)


def _devices() -> int:
    if _DEVICES.value or _SUBMIT.value != "local":
        return _DEVICES.value
    # In another process: one that has touched an accelerator keeps it from the arms.
    ask = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout)


class Plan:
    """The sweep of one config: its arms, their folders and commands, and the index."""

    def __init__(self, config: Any, name: str, workdir: Path):
        self.config_name, self.workdir = name, workdir
        given, before = config.to_dict(), door.load_config(name).to_dict()
        if given != before:
            raise ValueError("a sweep takes no --config.field=value; write it in the file's sweep(), so that every arm has it")
        sets = runpy.run_path(name.partition(":")[0]).get("sweep")
        if sets is None:
            raise ValueError(f"{name} has no sweep(); see configs/sweep/demo.py")
        named = sets()
        if "stages" not in config:  # a training config: one stage, overrides without its name
            program = Path(name).parent.name
            config = ConfigDict({"shared": (), "stages": ({"name": program, "program": program, "config": name},), "after": ()})
            named = {arm: {f"{program}.{field}": value for field, value in fields.items()} for arm, fields in named.items()}
        self.shared, self.after = ([dict(stage) for stage in config.get(part, ())] for part in sweep.PARTS)
        self.arms = sweep.arms(named, [dict(stage) for stage in config.stages], workdir)
        self.downloads = config.get("downloads", ())
        self.file = workdir / "index.json"
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        self._finished: set[str] = set()
        self.notes: dict[str, dict[str, str]] = known.get("notes", {})  # part -> its Slurm job, what it failed with

    def parts(self) -> list[str]:
        """What is run, in order: shared stages, arms, stages after them."""
        return [*["shared"] * bool(self.shared), *(arm.name for arm in self.arms), *["after"] * bool(self.after)]

    def folder(self, part: str) -> Path:
        return {"shared": self.workdir / "shared", "after": self.workdir}.get(part, self.workdir / "arms" / part)

    def stages(self, part: str) -> list[dict[str, Any]]:
        """The stages of a part; in those after the arms, "*" is written out."""
        if part in sweep.PARTS:
            places = {"{shared}": str(self.workdir / "shared")}
            stages = [sweep.filled(stage, places) for stage in (self.shared if part == "shared" else self.after)]
            if part == "shared":
                return stages
            written = []
            for stage, settings in zip(stages, pipeline.load(stages, self.workdir), strict=True):
                every = sweep.every(settings.to_dict(), self.arms)
                written.append({**stage, "overrides": {**stage.get("overrides", {}), **every}})
            return written
        for arm in self.arms:
            if arm.name == part:
                return list(arm.stages)
        raise ValueError(f"--arm={part}: no such arm; there are {', '.join(self.parts())}")

    def command(self, part: str) -> list[str]:
        program = ["python", "-m", "experiments.sweep"]
        return [*program, f"--config={self.config_name}", f"--workdir={self.workdir}", f"--arm={part}"]

    def run_part(self, part: str) -> dict[str, Any]:
        stages = tuple(self.stages(part))
        if part == "after" and (left := [arm.name for arm in self.arms if not self.done(arm.name)]):
            raise ValueError(f"{len(left)} arms are not finished yet, the first is {left[0]!r}; run them first")
        return pipeline.main(ConfigDict({"stages": stages, "downloads": self.downloads}), self.folder(part))

    def done(self, part: str) -> bool:
        """Whether it is finished; ValueError where it was finished with another config."""
        if part in self._finished:
            return True
        manifest = self.folder(part) / "manifest.json"
        if not manifest.is_file() or "result" not in (found := json.loads(manifest.read_text(encoding="utf-8"))):
            return False
        stages = self.stages(part)
        now = {s["name"]: pipeline.settled(c) for s, c in zip(stages, pipeline.load(stages, self.folder(part)), strict=True)}
        if found["configs"] != now:
            other = sorted(name for name in {*now, *found["configs"]} if now.get(name) != found["configs"].get(name))
            raise ValueError(
                f"{part} in {self.workdir} is finished with another config of {', '.join(other)}; choose another --workdir or "
                f"remove {self.folder(part)}"
            )
        self._finished.add(part)
        return True

    # Before anything runs.

    def check(self, devices: int, memory_gb: float) -> None:
        """Every config loads with its overrides, every mesh and model fits, every input exists or will be made; prints a plan."""
        made, missing, rows = [], [], {}
        for part in self.parts():
            stages = self.stages(part)
            try:
                configs = pipeline.load(stages, self.folder(part))
                missing += pipeline.absent(stages, configs, self.folder(part), made)
                for stage, settings in zip(stages, configs, strict=True):
                    if stage["program"] in pipeline.TRAINING:
                        rows.setdefault(part, []).append(plan_row(settings, devices, memory_gb))
            except ValueError as error:
                raise ValueError(f"{part}: {error}") from None
            made.append(self.folder(part))
        if missing:
            raise FileNotFoundError(pipeline.absence(missing, self.downloads))
        for part, plans in rows.items():
            print(f"{part:40} {'; '.join(plans)}", flush=True)

    # Running.

    def run_all(self, commands: dict[str, list[str]], lock: int) -> None:
        """One part after the other in a process of its own, its output in logs/; an arm that fails does not stop the next one."""
        began, failed = time.perf_counter(), []
        left = [part for part in commands if not self.done(part)]
        self.write_index()
        for number, part in enumerate(left, 1):
            if failed and (part == "after" or "shared" in failed):
                break
            log = self.workdir / "logs" / f"{part}.log"
            print(f"== {number}/{len(left)} {part}, output in {log}", flush=True)
            code = _child([sys.executable, *commands[part][1:]], log, lock)
            minutes = (time.perf_counter() - began) / 60
            notes = self.notes.setdefault(part, {})
            notes.pop("error", None)
            if code or not self.done(part):
                failed.append(part)
                words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"]
                notes["error"] = words[-1].removeprefix("error: ")
            self.write_index()
            came = f"failed: {notes['error']}" if part in failed else "done"
            to_go = minutes / number * (len(left) - number)
            print(f"-- {part}: {came} ({minutes:.1f} min so far, about {to_go:.1f} to go)", flush=True)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(commands)} parts failed: {', '.join(failed)} (see {self.workdir / 'logs'}); the others"
                " are kept; mend them or take them out of sweep(), and run the same command"
            )

    def submit(self, commands: dict[str, list[str]]) -> None:
        """What is neither finished nor queued goes to Slurm: shared stages, an array of the arms, and what comes after them."""
        resources = launch.read_resources(_SLURM.value)
        waiting: list[str] = []  # ids that the next jobs wait for
        for group in (["shared"], [arm.name for arm in self.arms], ["after"]):
            left = [part for part in group if part in commands and not self.done(part)]
            alive = [part for part in left if launch.queued(self.notes.get(part, {}).get("job", "0"))]
            new = [part for part in left if part not in alive]
            ids = []
            if new:
                # What is not training runs in one process, however many the arms have.
                alone = any(stage["program"] not in pipeline.TRAINING for part in new for stage in self.stages(part))
                single = {"nodes": 1, "tasks_per_node": 1} if alone else {}
                slurm = launch.Slurm(resources={**resources, **single}, requeues=_REQUEUES.value, at_once=_AT_ONCE.value)
                programs = [[sys.executable, *commands[part][1:]] for part in new]
                ids = launch.submit(programs, self.workdir / "slurm", self.workdir.name, slurm, after=waiting)
            for part, job in zip(new, ids, strict=True):
                self.notes.setdefault(part, {})["job"] = job
                print(f"job {job:12} {part}", flush=True)
            self.write_index()
            waiting = [*(self.notes[part]["job"] for part in alive), *ids] or waiting

    # What came out.

    def write_index(self, **more: Any) -> None:
        """index.json: arm -> label, seed, overrides, folder, command, state, result; atomic."""
        entries = {}
        for arm in self.arms:
            manifest = arm.folder / "manifest.json"
            notes = self.notes.get(arm.name, {})
            begun = "begun" if arm.folder.exists() else "waiting"
            state = "done" if self.done(arm.name) else "failed" if "error" in notes else begun
            entries[arm.name] = {
                "label": arm.label, "seed": arm.seed, "overrides": arm.overrides, "folder": str(arm.folder), "state": state,
                "command": shlex.join(self.command(arm.name)), **notes,
                "result": json.loads(manifest.read_text(encoding="utf-8"))["result"] if state == "done" else None,
            }  # fmt: skip
        index = {"format_version": run.FORMAT_VERSION, "config": self.config_name, "arms": entries, "notes": self.notes, **more}
        run.write_json(self.file, index)

    def result(self, *, write: bool) -> dict[str, Any]:
        states = {arm.name: self.done(arm.name) for arm in self.arms}
        found: dict[str, Any] = {"arms": len(states), "done": sum(states.values()), "index": str(self.file)}
        evaluation = next((stage for stage in self.after if stage["program"] == "evaluate"), None)
        if evaluation and all(states.values()) and self.done("after"):
            folder = self.workdir / evaluation["name"]
            details = json.loads((folder / "details.json").read_text(encoding="utf-8"))
            scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            labels = list(dict.fromkeys(arm.label for arm in self.arms))
            verdict = sweep.verdict(scores, labels, details["primary"], details["test_set"]["name"])
            print(sweep.verdict_words(verdict), flush=True)
            found["verdict"] = verdict
        if write:
            self.write_index(**{key: found[key] for key in ("verdict",) if key in found})
        return found


def plan_row(config: Any, devices: int, memory_gb: float) -> str:
    """Words on one training stage; ValueError where its mesh has another size than `devices` or its state exceeds `memory_gb`."""
    from swallow_jax import checkpoint, hf, llama, mesh, optim

    sizes = run.build(mesh.MeshConfig, config.mesh.to_dict(), "mesh")
    compute = run.build(llama.Compute, config.compute.to_dict(), "compute")
    run.build(optim.OptimConfig, config.optim.to_dict(), "optim")
    wanted = sizes.replica * sizes.fsdp * sizes.tensor * sizes.context
    if devices and wanted != devices:
        raise ValueError(
            f"mesh {config.mesh.to_dict()} wants {wanted} devices, {devices} are there; change the mesh or --devices"
        )
    shares = config.train.micro_batches * sizes.replica * sizes.fsdp
    if config.data.batch_size % shares:
        raise ValueError(f"data.batch_size={config.data.batch_size} is no multiple of {shares} (micro-batches x data shards)")
    shape = None
    if config.init and Path(config.init).exists():
        shape = hf.read_config(checkpoint.model_folder(config.init))
    elif config.get("model"):
        shape = hf.parse_config(config.model.to_dict(), "model")
    words = f"{wanted} device(s), " + (f"{config.train.steps} steps" if "steps" in config.train else f"{config.epochs} epochs")
    if shape is None:  # made by an earlier stage
        return words
    total = llama.parameter_count(shape)[0]
    # Float32 weights, gradients and moments (the first one perhaps bfloat16); frozen weights lie in the compute dtype, alone.
    each = {"bfloat16": 2, "float16": 2}.get(compute.dtype, 4) if config.get("lora") else 14 if config.optim.mu_dtype else 16
    state = total * each / (sizes.fsdp * sizes.tensor) / 1e9
    if memory_gb and state > memory_gb:
        raise ValueError(f"{state:.2g} GB of weights and optimiser state a device, {memory_gb:g} are there; take a larger mesh")
    return f"{words}, {total:,} parameters, at least {state:.2g} GB a device"


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[int]:
    """One local sweep a folder at a time. The running arm holds the lock too: one that a kill left behind is waited for."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process runs this sweep, or an arm that it left; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _child(command: Sequence[str], log: Path, lock: int) -> int:
    """Run it with its output appended to `log`; what stops this program asks it to stop, and waits until it has saved."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, pass_fds=[lock])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    door.launch(main, __doc__)
