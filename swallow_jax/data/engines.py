"""One door to every machine: `run_tasks(fn, tasks)` here, on several processes, on Ray or on Slurm.

A task's result is a small JSON file, written whole when the task is done: it is the marker by which a killed job knows what is
left. Tasks write their own files under names of their own, so that neither engine, worker count nor order can show in what
comes out. Distribution itself is datatrove's (extra `data`; Ray in extra `ray`); nothing distributed is written here.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run

KINDS = ("here", "local", "ray", "slurm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Where tasks run: 'here' (this process, one after another), 'local' (processes), 'ray', 'slurm'.

    address: of a running Ray cluster, "" for one on this machine. slurm: settings of datatrove's SlurmPipelineExecutor (time,
    partition, cpus_per_task, mem_per_cpu_gb, env_command, ...). Ray and Slurm need a folder that all machines share.
    """

    kind: str
    workers: int
    address: str
    slurm: dict[str, Any]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"engine.kind {self.kind!r} is unknown; known are {', '.join(KINDS)}")
        if self.workers < 1:
            raise ValueError(f"engine.workers={self.workers}: at least 1 is wanted")
        if self.kind == "slurm" and not {"time", "partition"} <= set(self.slurm):
            raise ValueError('engine.slurm needs at least {"time": "04:00:00", "partition": NAME}')


Task = Mapping[str, Any]


def run_tasks(
    fn: Callable[[Task], dict[str, Any]], tasks: Sequence[Task], *, engine: Engine, folder: Path, name: str
) -> list[dict[str, Any]]:
    """`fn(task)` for every task, once; returns their results in the order of the tasks.

    fn is a function of a module (it is sent by name) and must write any file whole. Tasks whose result lies in folder/name are
    not run again.
    """
    place = Path(folder).resolve() / name
    left = [number for number in range(len(tasks)) if not _marker(place, number).is_file()]
    if left:
        place.mkdir(parents=True, exist_ok=True)
        for error in place.glob("*.error"):
            error.unlink()
        step = _Step(fn, {number: tasks[number] for number in left}, place)
        done = f" ({len(tasks) - len(left)} of them done before)" if len(left) < len(tasks) else ""
        print(f"{name}: {len(tasks)} tasks{done}, engine {engine.kind}, {engine.workers} workers", flush=True)
        _ENGINES[engine.kind](step, engine)
        for number in left:
            if (error := _marker(place, number).with_suffix(".error")).is_file():
                raise ValueError(f"{name}, task {number}: {error.read_text(encoding='utf-8')}")
            if not _marker(place, number).is_file():
                raise ValueError(
                    f"{name}: task {number} ended without a result; see {place / 'logs'}, then run the command again"
                )
    return [json.loads(_marker(place, number).read_text(encoding="utf-8")) for number in range(len(tasks))]


def _marker(place: Path, number: int) -> Path:
    return place / f"{number:05d}.json"


class _Step:
    """A step of a datatrove pipeline: rank r runs the r-th task that is left."""

    def __init__(self, fn: Callable[[Task], dict[str, Any]], tasks: Mapping[int, Task], place: Path):
        self.fn, self.tasks, self.place = fn, tasks, place

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        number = sorted(self.tasks)[rank]
        marker = _marker(self.place, number)
        if marker.is_file():  # a second attempt of an engine that tries again
            return
        try:
            result = self.fn(self.tasks[number])
        except (ValueError, OSError) as error:  # what a user can mend travels as a sentence, whatever the engine
            if isinstance(error, OSError) and error.errno and not error.filename:
                error.filename = str(marker)
            run.write_text(marker.with_suffix(".error"), str(error))
            raise
        run.write_json(marker, result)

    def __repr__(self) -> str:
        return f"{self.fn.__name__} x {len(self.tasks)}"


def _here(step: _Step, engine: Engine) -> None:
    from tqdm import tqdm

    for rank in tqdm(range(len(step.tasks)), desc=step.place.name, unit=" tasks", disable=None, leave=False):
        step(rank=rank)


def _datatrove() -> None:
    """Its log belongs into files (work/STAGE/logs); the terminal is ours."""
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # read when loguru is imported, here and in the workers
    try:
        from datatrove.utils.logging import logger
    except ImportError as error:
        raise ValueError(
            "engine local, ray and slurm need datatrove; pip install 'swallow_jax[data]', or use engine here"
        ) from error
    logger.remove()


def _local(step: _Step, engine: Engine) -> None:
    _datatrove()
    from datatrove.executor import LocalPipelineExecutor

    class Quiet(LocalPipelineExecutor):
        def _run_for_rank(self, rank, local_rank=0, node_rank=-1):
            return super()._run_for_rank(rank, local_rank + 1, node_rank)  # only local rank 0 writes to the terminal

    Quiet(
        pipeline=[step],
        tasks=len(step.tasks),
        workers=min(engine.workers, len(step.tasks)),
        logging_dir=str(step.place / "logs"),
        skip_completed=False,  # our markers know better: they are numbered by task, not by what was left this time
    ).run()


def _ray(step: _Step, engine: Engine) -> None:
    _datatrove()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine ray needs Ray; pip install 'swallow_jax[ray]'") from error
    from datatrove.executor.ray import RayPipelineExecutor

    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = not ray.is_initialized()
    if mine:
        where = {"address": engine.address} if engine.address else {"num_cpus": engine.workers, "include_dashboard": False}
        ray.init(**where, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, logging_level="ERROR")
    try:
        RayPipelineExecutor(
            pipeline=[step],
            tasks=len(step.tasks),
            workers=engine.workers,
            logging_dir=str(step.place / "logs"),
            skip_completed=False,
            mem_per_cpu_gb=1,
        ).run()
    finally:
        if mine:
            ray.shutdown()


def _slurm(step: _Step, engine: Engine) -> None:
    _datatrove()
    from datatrove.executor import SlurmPipelineExecutor

    settings = dict(engine.slurm)
    poll_seconds = settings.pop("poll_seconds", 10)
    settings.setdefault(
        "env_command", f"export PYTHONPATH={Path(__file__).resolve().parents[2]}; PATH={Path(sys.executable).parent}:$PATH"
    )
    executor = SlurmPipelineExecutor(
        pipeline=[step],
        tasks=len(step.tasks),
        workers=engine.workers,
        job_name=f"swallow_{step.place.name}",
        logging_dir=str(step.place / "logs"),
        skip_completed=False,
        **settings,
    )
    executor.run()  # submits an array job and returns
    print(f"{step.place.name}: Slurm job {executor.job_id}; interrupting this program leaves it running", flush=True)
    while any(not _marker(step.place, number).is_file() for number in step.tasks) and not any(step.place.glob("*.error")):
        seen = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True, check=False)
        if seen.returncode or not seen.stdout.strip():
            time.sleep(poll_seconds)  # a shared file system may show the last results later than the queue
            return
        time.sleep(poll_seconds)


_ENGINES = {"here": _here, "local": _local, "ray": _ray, "slurm": _slurm}
