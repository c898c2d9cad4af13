"""Heavy proofs on processes: the programs on loopback, killed and restarted; twenty kills; other meshes; minutes each."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swallow_jax import hosts
from tests.test_hosts import ROOT, Gang, batch_of, metrics, rows, worker  # noqa: F401 (rows is a fixture)
from tests.test_programs import config, prepared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.proof
FOUR = ("c.mesh.fsdp = 4", "c.compute.scan_layers = True", "c.compute.attention = 'xla'")
BEAT = "c.hosts = __import__('ml_collections').ConfigDict({'heartbeat_s': 5, 'start_s': 60})"


def cpt(file, workdir, *flags):
    return ["-m", "experiments.cpt", f"--config={file}", f"--workdir={workdir}", *flags]


def alone(command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_one_two_and_four_processes_with_four_devices_are_one_run(rows, tmp_path):  # noqa: F811
    results, batches = {}, {}
    for processes in (1, 2, 4):
        found, said = Gang(worker(tmp_path / str(processes), rows, 12), processes, 4 // processes).results()
        results[processes], batches[processes] = {r["params_sha256"] for r in found}, batch_of(said)
    assert batches[1] == batches[2] == batches[4] and len(batches[1]) == 4
    assert len(set.union(*results.values())) == 1
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2") == metrics(tmp_path / "4")


def test_other_device_counts_lose_alike_over_fifty_steps(config, tmp_path):  # noqa: F811
    losses = {}
    for devices in (1, 2, 4):
        lines = (f"c.mesh.fsdp = {devices}", "c.train.steps = 50", "c.train.eval_every = 50", "c.checkpoint.save_every = 50")
        Gang(cpt(config(*FOUR[1:], *lines), tmp_path / str(devices)), 1, devices).results()
        losses[devices] = [row["loss"] for row in metrics(tmp_path / str(devices))]
    for devices in (2, 4):
        assert losses[devices] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_one_killed_supervised_or_resumed_as_one_end_like_the_straight_run(config, tmp_path):  # noqa: F811
    file = config(*FOUR, BEAT)
    (wanted, _), _ = Gang(cpt(file, tmp_path / "straight"), 2, 2).results()
    supervised = Gang(cpt(file, tmp_path / "both", "--restarts=3", "--restart_s=1"), 2, 2)
    supervised.after(tmp_path / "both" / "metrics.jsonl", 17)
    (victim,) = children(supervised.started[0].pid)  # process 0, which the others ask where everyone is
    os.kill(victim, signal.SIGKILL)
    both, _ = supervised.results()
    assert [r["params_sha256"] for r in both] == [wanted["params_sha256"]] * 2
    assert metrics(tmp_path / "both") == metrics(tmp_path / "straight")

    killed = Gang(cpt(file, tmp_path / "one"), 2, 2)
    killed.after(tmp_path / "one" / "metrics.jsonl", 17)
    killed.started[1].kill()
    began = time.monotonic()
    (code, _, err), _ = killed.wait()
    assert time.monotonic() - began < 15 and code == hosts.LOST and "another process of this run is gone" in err
    (one,), _ = Gang(cpt(file, tmp_path / "one"), 1, 4).results()
    assert one["params_sha256"] == wanted["params_sha256"] and one["tokens"] == wanted["tokens"]


def test_the_survivor_of_process_zero_ends_too(rows, tmp_path):  # noqa: F811
    gang = Gang(worker(tmp_path / "a", rows, 40, "step_s=0.1"), 2, 1)
    gang.after(tmp_path / "a" / "metrics.jsonl", 5)
    gang.started[0].kill()
    began = time.monotonic()
    _, (code, _, err) = gang.wait()
    assert time.monotonic() - began < 15 and code != 0
    assert "another process of this run is gone" in err or "another task died" in err, err[-2000:]


def test_a_frozen_peer_is_given_up(rows, tmp_path):  # noqa: F811
    """A process that is stopped, as on a machine that hangs: its heart stands still, but its connections stay open."""
    gang = Gang(worker(tmp_path / "a", rows, 40, "step_s=0.1"), 2, 1)
    gang.after(tmp_path / "a" / "metrics.jsonl", 5)
    gang.started[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, err = gang.started[0].communicate(timeout=120)
    seconds = time.monotonic() - began
    gang.started[1].kill()
    gang.started[1].communicate()
    assert gang.started[0].returncode != 0 and seconds < 15, (seconds, err[-2000:])


def test_sigterm_to_one_of_two_stops_both_at_one_step_and_the_run_ends_the_same(rows, tmp_path):  # noqa: F811
    (wanted, _), _ = Gang(worker(tmp_path / "straight", rows, 30), 2, 1).results()
    gang = Gang(worker(tmp_path / "a", rows, 30, "step_s=0.1"), 2, 1)
    gang.after(tmp_path / "a" / "metrics.jsonl", 6)
    gang.started[1].terminate()
    (code, out, err), (other, _, _) = gang.wait()
    assert code == other == 0, err[-2000:]
    assert "asked to stop: saved step" in out
    (again, _), _ = Gang(worker(tmp_path / "a", rows, 30), 2, 1).results()
    assert again["params_sha256"] == wanted["params_sha256"]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "straight")


def test_what_process_zero_refuses_ends_all_with_its_sentence(config, tmp_path):  # noqa: F811
    alone(cpt(config("c.train.steps = 6", "c.optim.decay_steps = 1"), tmp_path / "a"))
    gang = Gang(cpt(config("c.train.steps = 7", "c.optim.decay_steps = 1", "c.mesh.fsdp = 2"), tmp_path / "a"), 2, 1)
    for code, _, err in gang.wait():
        assert code == 1 and "holds another config (config.train.steps: 6 there, 7 now)" in err.strip().splitlines()[-1]


def test_a_checkpoint_goes_on_on_another_mesh_and_process_count(config, tmp_path):  # noqa: F811
    lines = FOUR[1:]
    straight = Gang(cpt(config(*lines, "c.mesh.fsdp = 4"), tmp_path / "a"), 1, 4).results()[0][0]
    gang = Gang(cpt(config(*lines, "c.mesh.fsdp = 4"), tmp_path / "b"), 1, 4)
    gang.after(tmp_path / "b" / "metrics.jsonl", 17)
    gang.started[0].terminate()
    assert gang.wait()[0][0] == 0
    (moved, _), _ = Gang(cpt(config(*lines, "c.mesh.fsdp = 2", "c.mesh.tensor = 2"), tmp_path / "b"), 2, 2).results()
    assert moved["loss"] == pytest.approx(straight["loss"], rel=1e-5) and moved["tokens"] == straight["tokens"]
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["moved"][0]["to"].startswith("config.mesh.fsdp: 4 there, 2 now")


def test_twenty_kills_at_random_moments_twenty_times_the_same_bits(config, tmp_path):  # noqa: F811
    """Moments by the clock, so that starting, compiling, saving and ending are hit too."""
    file, rng = config(), random.Random(time.time_ns())
    wanted = alone(cpt(file, tmp_path / "straight"))
    began = time.monotonic()
    alone(cpt(file, tmp_path / "timed"))
    whole = time.monotonic() - began
    moments = []
    for number in range(20):
        workdir = tmp_path / f"killed_{number}"
        process = subprocess.Popen(
            [sys.executable, *cpt(file, workdir)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.25 * whole, whole))
        process.kill()
        process.wait()
        log = workdir / "metrics.jsonl"
        moments.append(log.read_text().count("\n") if log.is_file() else None)
        result = alone(cpt(file, workdir))
        assert result["params_sha256"] == wanted["params_sha256"], moments
        assert metrics(workdir) == metrics(tmp_path / "straight"), moments
    print(json.dumps({"kills": 20, "same": 20, "steps_at_kill": moments}))


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
