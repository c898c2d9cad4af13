"""Commands for other machines: exact, shell-safe, with environment, bucket and logs; and the task that Slurm runs."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from swallow_jax import launch

# A test before may have loaded JAX, which warns of every fork.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

COMMAND = ["python", "-m", "experiments.cpt", "--config=configs/cpt/tiny.py", "--workdir=runs/it's here"]
CLOUD = {"name": "pod", "project": "mine", "zone": "us-east5-a", "accelerator": "v5p-16", "bucket": "gs://b", "slices": 1,
         "spot": False}  # fmt: skip


def inner(command: str, flag: str) -> str:
    """The words behind --command= of a printed command."""
    return next(word.removeprefix(flag) for word in shlex.split(command.replace("\\\n", " ")) if word.startswith(flag))


def parses(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False, capture_output=True).returncode == 0


def test_a_pod_is_asked_for_installed_and_started_on_every_worker():
    steps = launch.tpu_commands(COMMAND, launch.Cloud(**CLOUD))
    script = launch.script(steps)
    assert parses(script)
    create, _, copy, install, start, log, delete = (command for _, command in steps)
    assert "queued-resources create pod --node-id=pod --project=mine --zone=us-east5-a" in create
    assert "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5" in create and "--spot" not in create
    assert all("--worker=all" in command for command in (copy, install, start)) and "--worker=0" in log
    assert "queued-resources delete pod" in delete
    assert "gcsfuse" in inner(install, "--command=") and " b /bucket" in inner(install, "--command=")
    words = inner(start, "--command=")
    assert "JAX_PLATFORMS=tpu,cpu" in words and "JAX_COMPILATION_CACHE_DIR=/bucket/cache/xla" in words
    assert "nohup .venv/bin/python -m experiments.cpt" in words and "> run.log" in words
    assert "--config.hosts.coordinator=auto" in words, "jax.distributed by the pod's metadata"
    assert "--workdir=runs/it's here" in shlex.split(words), "the command arrives as it was given, through two shells"
    assert parses(words)


def test_several_slices_are_several_nodes_of_one_request():
    steps = launch.tpu_commands(COMMAND, launch.Cloud(**{**CLOUD, "slices": 2, "spot": True}))
    commands = [command for _, command in steps]
    assert "--node-count=2 --node-prefix=pod" in commands[0] and commands[0].endswith("--spot")
    assert commands[4].count("tpu-vm ssh pod-0") == commands[4].count("tpu-vm ssh pod-1") == 1
    assert commands[5].count("tpu-vm ssh") == 1 and parses(launch.script(steps))


def test_gke_gets_a_workload_that_restarts_with_its_bucket():
    steps = launch.gke_commands(COMMAND, launch.Cloud(**{**CLOUD, "image": "repo/image:1"}))
    script = launch.script(steps)
    assert parses(script) and "--tpu-type=v5p-16 --num-slices=1 --docker-image=repo/image:1" in script
    (start,) = [command for _, command in steps if "workload create" in command]
    assert "--max-restarts=50" in start
    words = inner(start, "--command=")
    assert parses(words) and "--workdir=runs/it's here" in shlex.split(words) and "/bucket/runs" in words.replace("$d", "runs")
    assert "--bucket=b --mount-point=/bucket --readonly=false" in script and "kubectl logs" in script


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bucket": "s3://b"}, "bucket 's3://b': gs://NAME is wanted"),
        ({"bucket": "gs://"}, "gs://NAME is wanted"),
        ({"accelerator": "h100-8"}, "accelerator 'h100-8': no system image is known; known kinds: v4"),
    ],
)
def test_what_google_would_refuse_is_refused_here(change, words):
    with pytest.raises(ValueError, match=words):
        launch.tpu_commands(COMMAND, launch.Cloud(**{**CLOUD, **change}))


def test_resources_are_name_value_pairs():
    assert launch.read_resources("nodes=2 slurm_partition=gpu slurm_comment='two words'") == {
        "nodes": 2, "slurm_partition": "gpu", "slurm_comment": "two words"}  # fmt: skip
    with pytest.raises(ValueError, match="'nodes' is not NAME=VALUE"):
        launch.read_resources("nodes 2")


def test_a_task_fails_with_its_command_and_its_child_is_deaf_to_slurms_signals(tmp_path):
    task = launch.Task()
    hears = "import os, signal; [os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGUSR2)]"
    assert task([sys.executable, "-c", hears], str(tmp_path)) == 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        task([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path))


def test_before_it_is_queued_again_a_task_lets_its_program_save(tmp_path):
    saves = (
        "import signal, sys, time, pathlib\n"
        "def save(*_): time.sleep(0.3); pathlib.Path('saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    task, command = launch.Task(), [sys.executable, "-c", saves]

    def preempt(*_):  # as submitit does, in the middle of the wait
        assert (tmp_path / "ready").exists()
        again.append(task.checkpoint(command, str(tmp_path)))
        assert (tmp_path / "saved").exists(), "the job is queued again only after its program has saved"

    again: list = []
    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        wait = f"while [ ! -e ready ]; do sleep 0.05; done; kill -USR2 {os.getpid()}"
        other = subprocess.Popen(["bash", "-c", wait], cwd=tmp_path)
        assert task(command, str(tmp_path)) == 0
        other.wait()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert again[0].args == (command, str(tmp_path)) and isinstance(again[0].function, launch.Task)
