"""One run on many processes: how they find each other, who writes, which rows each one loads, and how they end together.

JAX's own runtime does the work (`jax.distributed`); gloo carries the collectives between CPU processes. Process 0 writes the
run folder, Orbax saves from all. A process that dies takes the others with it, within seconds and with a sentence: what is
left could only wait. `experiments.supervise` starts them again from the last checkpoint.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from swallow_jax import run

T = TypeVar("T")
LOST = 75  # exit code (EX_TEMPFAIL of sysexits.h) of a process whose peer is gone or whose step hangs: starting again may help


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """How processes find and watch each other; none of it changes a result, so a run may go on with other values."""

    coordinator: str = ""  # HOST:PORT of process 0; "auto": what JAX finds (TPU pods, GKE, Open MPI); "": the environment
    processes: int = 0  # 0: the environment
    heartbeat_s: int = 10  # a process that was silent this long counts as dead
    start_s: int = 300  # how long processes wait for each other at the start
    hang_s: float = 0.0  # a step that takes longer is reported; 0: no report
    give_up_s: float = 0.0  # a step that takes longer ends the process; 0: never


def start(config: Mapping[str, Any] | None) -> HostsConfig:
    """Join the other processes, where the config or the environment names any; before anything touches a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it for any launcher, `srun` for Slurm, and
    TPU_WORKER_HOSTNAMES for TPU pods. A CPU run of one process joins too when an address is given: its sums are then added by
    gloo in the order of many.
    """
    settings = run.build(HostsConfig, dict(config or {}), "hosts")
    if settings.heartbeat_s < 1 or settings.start_s < 1:
        raise ValueError(f"hosts: heartbeat_s={settings.heartbeat_s}, start_s={settings.start_s}: at least 1 is wanted")
    address = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = settings.processes or _number("JAX_NUM_PROCESSES") or 0
    found = address == "auto" or (int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ)
    found = found or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if jax.distributed.is_initialized() or not (address or found):
        return settings
    waits = {
        "initialization_timeout": settings.start_s,
        "heartbeat_timeout_seconds": settings.heartbeat_s,
        "shutdown_timeout_seconds": settings.heartbeat_s,
    }
    if address and address != "auto":
        process = _number("JAX_PROCESS_ID")
        if process is None and count == 1:
            process = 0
        if process is None and found:
            process = int(os.environ["SLURM_PROCID"])
            count = count or int(os.environ["SLURM_NTASKS"])
        if not count or process is None or not 0 <= process < count:
            raise ValueError(
                f"coordinator {address}, but process {process} of {count or None}: set JAX_NUM_PROCESSES and JAX_PROCESS_ID"
                " (0 ... processes - 1) for every process"
            )
        waits |= {"coordinator_address": address, "num_processes": count, "process_id": process}
    try:
        jax.distributed.initialize(**waits)
    except RuntimeError as error:  # JaxRuntimeError of the connection, or a backend that is up already
        end(f"could not join the other processes at {address or 'the address found'}: {_first_line(error)}")
    return settings


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None or value == "":
        return None
    if not value.isdigit():
        raise ValueError(f"{name}={value!r} is no number; set it to one, or unset it")
    return int(value)


def many() -> bool:
    """Whether this run has joined a distributed runtime (of one process or more)."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this is the process that writes the run folder and speaks."""
    return jax.process_index() == 0


def say(sentence: str) -> None:
    """Print once for all processes."""
    if first():
        print(sentence, flush=True)


def agree(make: Callable[[], T]) -> T:
    """`make()` of process 0, a JSON value, known to all; a ValueError or OSError there is everyone's ValueError."""
    if jax.process_count() == 1:
        return make()
    told: dict[str, Any] = {}
    if first():
        try:
            told = {"value": make()}
        except (ValueError, OSError) as error:
            told = {"error": str(error)}
    told = json.loads(_broadcast(json.dumps(told).encode() if first() else b""))
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def _broadcast(blob: bytes) -> bytes:
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.array(len(blob), np.int32)))
    buffer = np.zeros(size, np.uint8)
    if first():
        buffer[:] = np.frombuffer(blob, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()


def one_after_all(make: Callable[[], None], made: Callable[[], bool]) -> None:
    """`make()` by process 0; afterwards by those that do not see what it `made` (no shared disk)."""
    agree(lambda: None if made() else make())
    if not made():
        make()


def open_run(workdir: Path, config: Mapping[str, Any], **arguments: Any) -> run.Run:
    """`run.open_run` by process 0; the others get a Run that writes nothing."""
    manifest = agree(lambda: run.open_run(workdir, config, **arguments).manifest)
    return run.Run(Path(workdir), manifest, writes=first())


# Rows.


def local_rows(sharding: Any, batch_size: int) -> tuple[int, ...]:
    """The rows of a global batch [batch_size, T] that this process's devices hold, in order."""
    return _local_rows(sharding, batch_size)


@functools.lru_cache(maxsize=16)
def _local_rows(sharding: Any, batch_size: int) -> tuple[int, ...]:
    columns = sharding.mesh.size  # any number that every axis divides
    held: set[int] = set()
    for index in sharding.addressable_devices_indices_map((batch_size, columns)).values():
        held.update(range(*index[0].indices(batch_size)))
    return tuple(sorted(held))


def place(batch: Mapping[str, np.ndarray], sharding: Any) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays [B, T] on `sharding`; every process calls it."""
    local = len(next(iter(batch.values())))
    parts = sharding.mesh.size  # rows come in equal shares, so the share of a batch of `parts` rows tells B
    batch_size = local * parts // len(local_rows(sharding, parts))
    rows = local_rows(sharding, batch_size)
    if len(rows) != local:
        raise ValueError(f"{local} rows arrived, this process holds {len(rows)} of {batch_size}; the batch does not divide")

    def put(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end_, _ = index[0].indices(batch_size)
            at = rows.index(begin)
            return values[(slice(at, at + end_ - begin), *index[1:])]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: put(values) for name, values in batch.items()}


# Stopping together.


class Stop:
    """SIGTERM asks for a checkpoint after the current step and a clean exit; all processes stop at the same step."""

    def __init__(self):
        self._asked = False
        self._before = None if many() else signal.signal(signal.SIGTERM, self._ask)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked once a step, by every process."""
        if self._before is None:  # JAX's runtime caught the signal and settles on a step that none has passed
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def restore(self) -> None:
        """Give the signal back: what comes after the loop (the next stage of a pipeline) must end on it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True


_GONE = ("gloo", "nccl", "connection", "heartbeat", "coordination", "unavailable", "peer", "socket", "barrier", "deadline")


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """In here, the loss of another process ends this one with a sentence and exit code LOST."""
    try:
        yield
    except RuntimeError as error:  # JAX's own is one; what a dead peer causes has no type of its own
        if jax.process_count() == 1 or not any(word in str(error).lower() for word in _GONE):
            raise
        end(f"another process of this run is gone ({_first_line(error)})")


def end(reason: str) -> None:
    """Say why and leave at once: Python's own way out would wait for processes that are gone."""
    sentence = f"error: process {_index()}: {reason}; start all of them again, they go on from the last checkpoint"
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


def _index() -> int:
    return _number("JAX_PROCESS_ID") or int(os.environ.get("SLURM_PROCID", "0"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


class Watch:
    """Reports a step that does not end, and where the program is; after `give_up_s` it ends the process."""

    def __init__(self, config: HostsConfig, log: Path):
        self.config, self.log = config, log
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._main = threading.current_thread().ident
        self._over = threading.Event()
        limits = [limit for limit in (config.hang_s, config.give_up_s) if limit > 0]
        if limits:
            threading.Thread(target=self._look, args=(min(limits) / 4,), daemon=True, name="watch").start()

    def step(self, step: int) -> None:
        """`step` begins. The first step of a process is not timed: it compiles."""
        self._since, self._told = time.monotonic(), False
        self._step = step if self._step else -step

    def close(self) -> None:
        self._over.set()

    def _look(self, every: float) -> None:
        while not self._over.wait(every):
            if self._step == 0:
                continue
            seconds = time.monotonic() - self._since
            if self._step < 0:  # the first step
                continue
            if self.config.hang_s and seconds > self.config.hang_s and not self._told:
                self._told = True
                print(f"warning: {self.sentence(seconds)}", file=sys.stderr, flush=True)
            if self.config.give_up_s and seconds > self.config.give_up_s:
                end(self.sentence(seconds))

    def sentence(self, seconds: float) -> str:
        """Which step, for how long, where, and what the log says last."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [entry for entry in stack if f"{os.sep}swallow_jax{os.sep}" in entry.filename]
        where = ", in ".join(f"{Path(e.filename).name}:{e.lineno} ({e.name})" for e in [*ours[-1:], *stack[-1:]])
        last = "nothing"
        if self.log.is_file() and (lines := self.log.read_text(encoding="utf-8").splitlines()):
            last = lines[-1][:160]
        return f"step {abs(self._step)} has not ended for {seconds:.0f} s, at {where}; last log: {last}"
