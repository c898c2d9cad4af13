"""Slurm for real: Debian's slurm-wlm and munge on this machine (apt-get install slurm-wlm munge), two tasks, two JAX processes.

A job of two tasks trains; one task is killed; the job is queued again under its id and ends with the straight run's weights.
A sweep goes through the same door as an array with what comes before and after it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments import door, prepare

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parent.parent

_CONF = """ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def slurm():
    """A cluster of this machine, with its own key, ports and folders; the environment that its commands need."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        assert shutil.which(program), f"{program} is missing: apt-get install slurm-wlm munge"
    place = Path(tempfile.mkdtemp(prefix="slurm_proof_", dir="/tmp"))
    place.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (place / name).mkdir()
    (place / "munge" / "key").write_bytes(os.urandom(128))
    (place / "munge" / "key").chmod(0o400)
    shutil.chown(place / "munge", "munge", "munge")
    shutil.chown(place / "munge" / "key", "munge", "munge")
    conf = place / "slurm.conf"
    conf.write_text(_CONF.format(host=socket.gethostname(), place=place, ports=free_ports(2)))
    environment = {**os.environ, "SLURM_CONF": str(conf), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    munge = [f"--{name}={place}/munge/{file}" for name, file in (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"),
             ("log-file", "log"), ("seed-file", "seed"))]  # fmt: skip
    daemons = [
        ["runuser", "-u", "munge", "--", "munged", "--foreground", "--num-threads=2", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    running = []
    try:
        for command in daemons:
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        until(lambda: "idle" in out(["sinfo", "--noheader", "--format=%T"], environment), 60, "the node to come up")
        yield environment
    finally:
        subprocess.run(["scancel", "--partition=cpu"], env=environment, check=False)
        end = time.monotonic() + 30  # a step that is still reporting would outlive the daemons
        while out(["squeue", "--noheader"], environment).strip() and time.monotonic() < end:
            time.sleep(0.3)
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(timeout=20)
        shutil.rmtree(place, ignore_errors=True)


def out(command: list[str], environment: dict) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout + done.stderr


def until(there, seconds: float, what: str, say=lambda: ""):
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}\n{say()}"
        time.sleep(0.3)
    return found


def program(module: str, environment: dict, *arguments: object) -> dict:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def result(folder: Path) -> dict | None:
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text()).get("result") if manifest.is_file() else None


def logs(folder: Path):
    def text() -> str:
        files = sorted(file for file in folder.glob("*.*") if file.suffix != ".pkl")
        return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files)

    return text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The tiny CPT config on two devices, long enough to be killed on the way."""
    place = tmp_path_factory.mktemp("slurm")
    prepare.main(door.load_config(str(ROOT / "configs/prepare/tiny.py")), place / "prepare")
    file = place / "two.py"
    file.write_text(
        "from configs.cpt import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n"
        f"    c.tokenizer = {str(place / 'prepare' / 'tokenizer')!r}\n    c.data.prepare = ''\n"
        f"    c.data.mixture = (({str(place / 'prepare' / 'train')!r}, 1),)\n"
        f"    c.data.heldout = {str(place / 'prepare' / 'heldout')!r}\n"
        "    c.mesh.fsdp = 2\n    c.train.steps = 300\n    c.train.eval_every = 20\n    c.checkpoint.save_every = 20\n"
        "    return c\n\n\n"
        "def sweep():\n    return {f'steps={n}': {'train.steps': n} for n in (20, 40)}\n"
    )
    return file


def launched(environment: dict, config: Path, workdir: Path) -> tuple[str, Path]:
    told = program(
        "tools.launch", environment, "--to=slurm", f"--logs={workdir}_logs", f"--name={workdir.name}",
        "--slurm=tasks_per_node=2 cpus_per_task=1 timeout_min=30",
        f"--command=python -m experiments.cpt --config={config} --workdir={workdir}",
    )  # fmt: skip
    return told["jobs"][0], Path(told["folder"])


def test_a_job_with_a_killed_task_is_queued_again_and_ends_like_the_straight_one(slurm, config, tmp_path):
    _, straight_logs = launched(slurm, config, tmp_path / "straight")
    straight = until(lambda: result(tmp_path / "straight"), 300, "the straight run", logs(straight_logs))
    job, folder = launched(slurm, config, tmp_path / "killed")
    log = tmp_path / "killed" / "metrics.jsonl"
    until(lambda: log.is_file() and log.read_text().count("\n") > 60, 300, "step 60", logs(folder))
    # The second process of the run: a child of the task that Slurm calls 1.
    processes = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    second = [p for p in processes if of_task(p, job, "1") and b"experiments.cpt" in read(f"/proc/{p}/cmdline").split(b"\0")]
    assert len(second) == 1, second
    os.kill(second[0], signal.SIGKILL)
    until(lambda: "Restarts=1" in out(["scontrol", "show", "job", job], slurm), 90, "the job to be queued again", logs(folder))
    assert result(tmp_path / "killed") is None, "the run was over before its task was killed"

    def restarted() -> str:  # Slurm waits two minutes before it starts a job again; not here
        out(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm)
        return out(["squeue", "--noheader", "--jobs", job, "--states=R"], slurm).strip()

    until(restarted, 120, "the job to run again", logs(folder))
    killed = until(lambda: result(tmp_path / "killed"), 300, "the run that was killed", logs(folder))
    assert killed["params_sha256"] == straight["params_sha256"]
    assert killed["steps"] == straight["steps"] == 300
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 301))


def test_a_sweep_goes_to_slurm_as_an_array(slurm, config, tmp_path):
    workdir = tmp_path / "sweep"
    file = tmp_path / "cpt" / "one.py"  # the folder's name says the program
    file.parent.mkdir()
    file.write_text(config.read_text().replace("c.mesh.fsdp = 2", "c.mesh.fsdp = 1"))
    flags = [f"--config={file}", f"--workdir={workdir}", "--submit=slurm", "--slurm=cpus_per_task=1 timeout_min=30"]
    told = program("experiments.sweep", slurm, *flags)
    assert told["arms"] == 2 and told["done"] == 0
    index = json.loads((workdir / "index.json").read_text())["arms"]
    jobs = {name: entry["job"] for name, entry in index.items()}
    assert {job.split("_")[1] for job in jobs.values()} == {"0", "1"}
    program("experiments.sweep", slurm, *flags)
    again = json.loads((workdir / "index.json").read_text())["arms"]
    assert {name: entry["job"] for name, entry in again.items()} == jobs, "what is queued is not queued a second time"
    for name in jobs:
        until(lambda name=name: result(workdir / "arms" / name), 300, name, logs(workdir / "slurm"))
    told = program("experiments.sweep", slurm, *flags)
    assert told["done"] == 2
    results = json.loads((workdir / "index.json").read_text())["arms"]
    assert [entry["result"]["cpt"]["steps"] for entry in results.values()] == [20, 40]


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def of_task(process: int, job: str, task: str) -> bool:
    environment = read(f"/proc/{process}/environ").split(b"\0")
    return f"SLURM_JOB_ID={job}".encode() in environment and f"SLURM_PROCID={task}".encode() in environment
