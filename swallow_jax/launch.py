"""One command on other machines: Slurm through submitit, Cloud TPU pods and GKE as exact commands to run.

The command is the one that would run here, as a list of words; a program that finds several processes joins them by itself
(`swallow_jax.hosts`). All of them must see the same disk: NFS or Lustre under Slurm, a mounted bucket on TPU pods and GKE.
"""

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by the runtimes, and safe everywhere: no text model is fetched, the log is complete when a machine vanishes.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


# Slurm.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """`resources` by submitit's names: timeout_min, nodes, tasks_per_node, gpus_per_node, cpus_per_task, slurm_partition ..."""

    resources: Mapping[str, Any]
    requeues: int  # how often a job that failed is queued again; a preempted one always is
    at_once: int  # how many jobs of an array run at a time


def read_resources(text: str) -> dict[str, Any]:
    """ "nodes=2 slurm_partition=gpu" as a dict; ValueError for what is not NAME=VALUE."""
    found: dict[str, Any] = {}
    for word in shlex.split(text):
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"{word!r} is not NAME=VALUE; write for example 'nodes=2 gpus_per_node=8 slurm_partition=gpu'")
        found[name] = int(value) if value.isdigit() else value
    return found


def submit(commands: Sequence[Sequence[str]], folder: Path, name: str, slurm: Slurm, *, after: Sequence[str] = ()) -> list[str]:
    """Queue the commands, several as an array; returns their job ids. They start when the jobs `after` have succeeded.

    A task that dies takes its job's other tasks with it; the job is then queued again under its id, up to `requeues` times, and
    goes on from its checkpoint. Before a time limit or preemption Slurm's signal becomes a SIGTERM, at which programs save.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("Slurm jobs need submitit; pip install 'swallow_jax[slurm]'") from None
    if shutil.which("sbatch") is None:
        raise ValueError("no sbatch here: run this on a login node of a Slurm cluster, or use --submit=print")
    # Queued again from within: Slurm itself does so after a lost node, not after a failed task.
    again = (
        'trap \'code=$?; if [ $code -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt '
        f'{slurm.requeues} ]; then scontrol requeue "$SLURM_JOB_ID"; fi\' EXIT'
    )
    exports = [f"export {key}={shlex.quote(value)}" for key, value in ENVIRONMENT.items()]
    # A job that reaches its time limit goes on in another, however often: training has an end.
    special = {"slurm_max_num_timeout": 1_000_000, "slurm_python": shlex.quote(sys.executable)}
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster="slurm", **special)
    try:
        executor.update_parameters(
            name=name,
            slurm_setup=[again, *exports],
            slurm_srun_args=["--kill-on-bad-exit=1"],
            slurm_array_parallelism=slurm.at_once,
            slurm_additional_parameters={"requeue": True},
            **({"slurm_dependency": "afterok:" + ":".join(after)} if after else {}),
            **slurm.resources,
        )
    except (NameError, TypeError) as error:  # submitit lists the names it knows
        raise ValueError(f"--slurm: {error}") from None
    jobs = executor.map_array(Task(), [list(command) for command in commands], [str(Path.cwd())] * len(commands))
    return [str(job.job_id) for job in jobs]


def queued(job: str) -> bool:
    """Whether Slurm still has this job, waiting or running."""
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


class Task:
    """One task of a Slurm job: runs the command as a child. submitit calls `checkpoint` before it queues a job again."""

    def __init__(self):
        self._child: subprocess.Popen | None = None

    def __call__(self, command: list[str], folder: str) -> int:
        """Returns 0; raises RuntimeError where the command failed, so that the job counts as failed."""
        # Slurm signals every process of the step; the child must survive the signals that are meant for submitit.
        self._child = subprocess.Popen(command, cwd=folder, preexec_fn=_deaf)
        while self._child.poll() is None:
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        if code := self._child.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {code}")
        return 0

    def checkpoint(self, command: list[str], folder: str) -> Any:
        """SIGTERM, wait until the program has saved, and hand back the same call."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Task(), command, folder)


def _deaf() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


# Google Cloud.

# The configs' relative paths lead into the bucket.
_LINKS = "for d in runs models data; do mkdir -p /bucket/$d && ln -sfn /bucket/$d $d; done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cloud:
    """Where in Google Cloud. `bucket` is mounted as /bucket: models, data, run folders and compiled programs lie there."""

    name: str  # of the TPU, or of the GKE cluster and its workload
    project: str
    zone: str
    accelerator: str  # v5p-16, v5litepod-16, v6e-64 ...
    bucket: str  # gs://NAME
    slices: int
    spot: bool
    image: str = ""  # GKE: a container image with this checkout; "": xpk builds one from a Python image and what is committed


# Accelerator -> system image of its VMs, from Google's table of TPU software versions (2026).
_RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


def tpu_commands(command: Sequence[str], cloud: Cloud) -> list[tuple[str, str]]:
    """(what it does, shell command) in the order to be run, for a Cloud TPU pod as a queued resource."""
    kind = cloud.accelerator.partition("-")[0]
    if kind not in _RUNTIMES:
        raise ValueError(f"accelerator {cloud.accelerator!r}: no system image is known; known kinds: {', '.join(_RUNTIMES)}")
    where = f"--project={cloud.project} --zone={cloud.zone}"
    name = shlex.quote(cloud.name)
    nodes = f"--node-id={name}" if cloud.slices == 1 else f"--node-count={cloud.slices} --node-prefix={name}"
    capacity = " --spot" if cloud.spot else ""
    ours = [name] if cloud.slices == 1 else [f"{name}-{number}" for number in range(cloud.slices)]

    def on_all(words: str, workers: str = "all") -> str:
        each = [
            f"gcloud compute tpus tpu-vm ssh {one} {where} --worker={workers} --command={shlex.quote(words)}"
            for one in (ours if workers == "all" else ours[:1])
        ]
        return " &\n".join(each) + (" &\nwait" if len(each) > 1 else "")

    bucket = _bucket(cloud.bucket)
    install = (
        "sudo mkdir -p /bucket && sudo chmod 777 /bucket && { mountpoint -q /bucket || "
        f"gcsfuse --implicit-dirs --rename-dir-limit=100000 {bucket} /bucket; }} && "
        "mkdir -p swallow_jax && tar -xzf swallow_jax.tgz -C swallow_jax && "
        f"cd swallow_jax && {_LINKS} && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    )
    # What is committed, and nothing else: neither .venv nor runs/.
    copies = ["git archive --format=tar.gz --output=swallow_jax.tgz HEAD"]
    copies += [f"gcloud compute tpus tpu-vm scp swallow_jax.tgz {one}: {where} --worker=all" for one in ours]
    words = f"cd swallow_jax && {_exports(cloud)} && nohup {_their_python(command)} > run.log 2>&1 < /dev/null &"
    return [
        ("ask for the pod", f"gcloud compute tpus queued-resources create {name} {nodes} {where} \\\n    --accelerator-type="
         f"{cloud.accelerator} --runtime-version={_RUNTIMES[kind]}{capacity}"),
        ("wait until this prints ACTIVE",
         f"gcloud compute tpus queued-resources describe {name} {where} --format='value(state.state)'"),
        ("copy this checkout to every worker", "\n".join(copies)),
        ("mount the bucket and install, on every worker", on_all(install)),
        ("start, on every worker: JAX finds the others by the pod's own metadata", on_all(words)),
        ("read the log of the first worker", on_all("tail -n 100 -f swallow_jax/run.log", workers="0")),
        ("after a preemption: delete, ask again, and start again; the run goes on from its last checkpoint in the bucket",
         f"gcloud compute tpus queued-resources delete {name} {where} --force --quiet"),
    ]  # fmt: skip


def gke_commands(command: Sequence[str], cloud: Cloud) -> list[tuple[str, str]]:
    """(what it does, shell command) in the order to be run, for GKE by xpk (pip install xpk, in an environment of its own)."""
    where = f"--project={cloud.project} --zone={cloud.zone} --cluster={cloud.name}"
    workload = f"{cloud.name}-run"
    capacity = "--spot" if cloud.spot else "--on-demand"
    size = f"--tpu-type={cloud.accelerator} --num-slices={cloud.slices}"
    image = f"--docker-image={cloud.image}" if cloud.image else "--base-docker-image=python:3.12 --script-dir=build/gke"
    setup = f"{_LINKS} && " + ("" if cloud.image else "python -m pip install -q -e '.[tpu]' && ")
    words = f"{setup}{_exports(cloud)} && {_their_python(command, 'python')}"
    return [
        ("make the cluster", f"xpk cluster create {where} \\\n    {size} {capacity}"),
        ("mount the bucket in every workload",
         f"xpk storage attach {cloud.name}-bucket {where} --type=gcsfuse \\\n    --bucket={_bucket(cloud.bucket)} "
         "--mount-point=/bucket --readonly=false --size=1000 --auto-mount=true"),
        ("what is committed goes into the image, and nothing else",
         "mkdir -p build/gke && git archive HEAD | tar -x -C build/gke"),
        ("start; a worker that is lost restarts the workload, which goes on from its last checkpoint",
         f"xpk workload create {where} --workload={workload} \\\n    {size} {image} --max-restarts=50 \\\n    "
         f"--command={shlex.quote(words)}"),
        ("see its state", f"xpk workload list {where} --filter-by-job={workload}"),
        ("read the log of the first worker",
         "kubectl logs --follow --selector="
         f"jobset.sigs.k8s.io/jobset-name={workload},batch.kubernetes.io/job-completion-index=0"),
        ("end it", f"xpk workload delete {where} --workload={workload}"),
        ("give the machines back", f"xpk cluster delete {where}"),
    ]  # fmt: skip


def script(steps: Sequence[tuple[str, str]]) -> str:
    """The steps as text for a terminal: a comment and a command each."""
    return "\n\n".join(f"# {number}. {what}\n{command}" for number, (what, command) in enumerate(steps, 1))


def _bucket(url: str) -> str:
    if not url.startswith("gs://") or not url.removeprefix("gs://").strip("/"):
        raise ValueError(f"bucket {url!r}: gs://NAME is wanted; run folders and checkpoints must outlive the machines")
    return url.removeprefix("gs://").strip("/")


def _exports(cloud: Cloud) -> str:
    settings = {**ENVIRONMENT, "JAX_PLATFORMS": "tpu,cpu", "JAX_COMPILATION_CACHE_DIR": "/bucket/cache/xla"}
    return "export " + " ".join(f"{key}={value}" for key, value in settings.items())


def _their_python(command: Sequence[str], python: str = ".venv/bin/python") -> str:
    words = list(command)
    if {"experiments.cpt", "experiments.sft"} & set(words):
        words.append("--config.hosts.coordinator=auto")  # the workers find each other by the pod's metadata
    if Path(words[0]).name.startswith("python"):
        words[0] = python
    return shlex.join(words)
