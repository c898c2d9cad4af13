"""Faults: every program, killed, asked to stop, on a full or a read-only disk, after damage, left by a peer; nothing may be lost.

    python -m pytest -m proof tests/test_faults.py -s          FAULT_TRIES=5 (default), FAULT_TABLE=file.md

A try is survived when the same command, once the fault is over, ends with the result of a run that had none; a fault that
ends the program must end it in one sentence. The table is printed at the end. Needs root (a small tmpfs is mounted).
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from tests.test_hosts import ROOT, Gang
from tests.test_hosts_proof import children

pytestmark = pytest.mark.proof
TRIES = int(os.environ.get("FAULT_TRIES", "5"))
TABLE: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])  # (program, fault) -> [tried, survived]
SEED = int(os.environ.get("FAULT_SEED", time.time_ns() % 1_000_000))
INSURANCE = "configs/tasks/insurance_sales_compliance"
SYNTHESIZED = ("train.jsonl", "dev.jsonl", "rejected.jsonl")
EVALUATED = ("scores.json", "predictions.jsonl")


class Program:
    """A program with a small job: `command(workdir)`, what it leaves (`print_of`), and its time and space without a fault."""

    def __init__(self, name, command, print_of):
        self.name, self.command, self.print_of = name, command, print_of
        self.wanted, self.seconds, self.bytes = None, 0.0, 0

    def start(self, workdir):
        """A group of its own, so that a kill reaches the workers too."""
        command = [sys.executable, *map(str, self.command(workdir))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def run(self, workdir):
        process = self.start(workdir)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def straight(self, workdir):
        if self.wanted is None:
            code, _, err = self.run(workdir / "warm")  # compiled programs are kept: the time below is a later run's
            assert code == 0, err[-3000:]
            began = time.monotonic()
            code, _, err = self.run(workdir / "straight")
            assert code == 0, err[-3000:]
            self.seconds, self.wanted = time.monotonic() - began, self.print_of(workdir / "straight")
            self.bytes = sum(p.stat().st_size for p in (workdir / "straight").rglob("*") if p.is_file())
            assert self.print_of(workdir / "warm") == self.wanted, "two runs without a fault differ"

    def recovers(self, workdir) -> bool:
        code, _, err = self.run(workdir)
        if code != 0:
            print(f"{self.name}: {err[-1500:]}", file=sys.stderr)
        return code == 0 and self.print_of(workdir) == self.wanted


CLOCKS = {"tokens_per_s", "mfu", "data_wait_s", "seconds", "started_at", "finished_at", "started_unix", "requests_per_s"}


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def trained(workdir):
    result = json.loads((workdir / "manifest.json").read_text())["result"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result["params_sha256"], timeless(rows)


def contents(*patterns):
    """A print of the files that match, of JSON without its clocks."""

    def print_of(workdir):
        found = {}
        for pattern in patterns:
            files = sorted(p for p in workdir.glob(pattern) if p.is_file())
            assert files, f"{workdir} holds no {pattern}"
            for file in files:
                data = file.read_bytes()
                if file.suffix in (".json", ".jsonl"):
                    lines = [data] if file.suffix == ".json" else data.splitlines()
                    data = json.dumps([timeless(json.loads(line)) for line in lines], sort_keys=True).encode()
                found[str(file.relative_to(workdir))] = hashlib.sha256(data).hexdigest()
        return found

    return print_of


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """All programs; each waits for its first use."""
    place = tmp_path_factory.mktemp("faults")

    def module(name, config, *flags):
        return lambda workdir: ["-m", f"experiments.{name}", f"--config={config}", f"--workdir={workdir}", *flags]

    def config(name, base, *lines):
        file = place / f"{name}.py"
        body = "".join(f"    {line}\n" for line in lines)
        file.write_text(f"{base}\n\n\ndef get_config():\n    c = tiny.get_config()\n{body}    return c\n")
        return file

    shards = place / "prepared"
    code, _, err = Program("prepare", module("prepare", "configs/prepare/tiny.py"), None).run(shards)
    assert code == 0, err
    cpt = config(
        "cpt", "from configs.cpt import tiny",
        f"c.tokenizer = {str(shards / 'tokenizer')!r}", "c.data.prepare = ''", f"c.data.heldout = {str(shards / 'heldout')!r}",
        f"c.data.mixture = (({str(shards / 'train')!r}, 1),)", "c.checkpoint.update({'save_every': 4, 'keep_last': 2})",
        "c.train.update({'eval_every': 4})",
    )  # fmt: skip
    sft = config("sft", "from configs.sft import tiny", "c.checkpoint.update({'keep_last': 2})", "c.epochs = 6")
    synthesize = config(
        "synthesize", "from configs.synthesize import demo as tiny",
        "c.teachers.pop('live', None)", "c.teachers.recorded.quotas.update({'train_pairs': 20, 'dev_pairs': 2})",
    )  # fmt: skip
    return place, {
        "prepare": Program("prepare", module("prepare", "configs/prepare/tiny.py"), contents("train/*", "heldout/*")),
        "cpt": Program("cpt", module("cpt", cpt), trained),
        "synthesize": Program("synthesize", module("synthesize", synthesize), contents(*SYNTHESIZED)),
        "sft": Program("sft", module("sft", sft), trained),
        "evaluate": Program("evaluate", module("evaluate", "configs/evaluate/tiny.py"), contents(*EVALUATED)),
        "check": Program("check", check(place), contents("verdicts.jsonl", "verdicts.csv")),
    }  # fmt: skip


def check(place):
    """tools.check of a dozen conversations with the demo's base."""
    talks = place / "talks.jsonl"
    lines = (ROOT / INSURANCE / "dev_demo.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    keep = ("conversation_id", "turns")
    talks.write_text("".join(json.dumps({k: json.loads(line)[k] for k in keep}, ensure_ascii=False) + "\n" for line in lines))

    def command(workdir):
        flags = [f"--task={INSURANCE}", f"--input={talks}", f"--output={workdir / 'verdicts.jsonl'}", "--asking=labels"]
        return ["-m", "tools.check", "--model=configs/base", *flags, "--evidence_turns=0", "--dtype=float32"]

    return command


NAMES = ("prepare", "cpt", "synthesize", "sft", "evaluate", "check")


@pytest.fixture(params=NAMES)
def program(request, programs):
    place, known = programs
    chosen = known[request.param]
    chosen.straight(place / request.param)
    return chosen


def tries(program, fault, tmp_path):
    """(number, its folder, random numbers) of each try."""
    for number in range(TRIES):
        workdir = tmp_path / f"{program.name}_{number}"
        yield number, workdir, random.Random(f"{SEED} {program.name} {fault} {number}")
        shutil.rmtree(workdir, ignore_errors=True)


def count(program, fault, survived):
    row = TABLE[program if isinstance(program, str) else program.name, fault]
    row[0] += 1
    row[1] += bool(survived)


def sentence(code, err):
    """A program that ends on a fault says why in its last line, and shows no traceback."""
    last = err.strip().splitlines()[-1] if err.strip() else ""
    assert code not in (0, None) and last.startswith("error: ") and "Traceback" not in err, (code, err[-2500:])
    return last


def interrupted(program, workdir, rng, number):
    """Start, wait a random part of the time a run takes, send the signal to the whole group; its exit code."""
    process = program.start(workdir)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=rng.uniform(0.2, 1.0) * program.seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_sigkill(program, tmp_path):
    for _, workdir, rng in tries(program, "SIGKILL", tmp_path):
        interrupted(program, workdir, rng, signal.SIGKILL)
        count(program, "SIGKILL", program.recovers(workdir))


def test_sigterm(program, tmp_path):
    for _, workdir, rng in tries(program, "SIGTERM", tmp_path):
        code, _, err = interrupted(program, workdir, rng, signal.SIGTERM)
        ended = code in (0, -signal.SIGTERM, 128 + signal.SIGTERM) and "Traceback" not in err
        count(program, "SIGTERM", ended and program.recovers(workdir))
        assert ended, (code, err[-2000:])


@contextlib.contextmanager
def small_disk(place: Path, size: int):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size // 1024, 4)}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_full_disk(program, tmp_path):
    for number, workdir, rng in tries(program, "full disk", tmp_path):
        with small_disk(tmp_path / f"disk_{number}", int(program.bytes * rng.uniform(0.05, 0.9))):
            workdir = tmp_path / f"disk_{number}" / "run"
            code, _, err = program.run(workdir)
            if code != 0:  # a job that leaves less than it needs on the way may fit
                assert "No space left" in sentence(code, err)
            remount(workdir.parent, "size=1g")
            count(program, "full disk", program.recovers(workdir))


def test_read_only_disk(program, tmp_path):
    for number, workdir, rng in tries(program, "read-only disk", tmp_path):
        with small_disk(tmp_path / f"disk_{number}", 1 << 30):
            workdir = tmp_path / f"disk_{number}" / "run"
            if number:  # the first try meets an empty disk, the others one on which half the work is done
                interrupted(program, workdir, rng, signal.SIGKILL)
            remount(workdir.parent, "ro")
            code, _, err = program.run(workdir)
            if code != 0:  # a run that was through before it was killed has nothing to write
                assert "Read-only" in sentence(code, err)
            remount(workdir.parent, "rw")
            count(program, "read-only disk", program.recovers(workdir))


def test_the_last_saved_file_is_damaged(program, tmp_path):
    """Training: a bit of its last checkpoint flips, or a byte is missing. Others: the last line they saved is half there."""
    for number, workdir, rng in tries(program, "damage", tmp_path):
        for _ in range(20):  # until something was saved before the kill
            interrupted(program, workdir, rng, signal.SIGKILL)
            if damage(workdir, rng, flip=number % 2 == 0):
                break
            shutil.rmtree(workdir, ignore_errors=True)
        count(program, "damage", program.recovers(workdir))


def damage(workdir, rng, *, flip):
    root = workdir / "checkpoints"
    if root.is_dir():
        steps = sorted((int(p.name) for p in root.iterdir() if p.name.isdigit()), reverse=True)
        if len(steps) < 2 or "result" in json.loads((workdir / "manifest.json").read_text()):
            return False
        file = rng.choice(sorted(p for p in (root / str(steps[0]) / "state").rglob("*") if p.is_file()))
        data = bytearray(file.read_bytes())
        if flip and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[-1:]
        file.write_bytes(data)
        return True
    files = [p for p in workdir.rglob("*.jsonl") if p.is_file() and p.stat().st_size > 2]
    if not files:
        return False
    newest = max(files, key=lambda p: p.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[: -rng.randint(1, 2)])
    return True


@pytest.mark.parametrize("name", ["cpt", "sft"])
def test_a_vanished_peer_of_training(programs, tmp_path, name):
    """Two processes, one killed: the other ends with a sentence; both restarted, the run ends like one that lost nobody."""
    _, known = programs
    flags = ["--config.mesh.fsdp=2", "--config.compute.attention=xla", "--config.compute.scan_layers=True"]
    command = [*known[name].command(tmp_path / "straight"), *flags]
    Gang(command, 2, 1).results()
    wanted = trained(tmp_path / "straight")
    for number, workdir, rng in tries(known[name], "vanished peer", tmp_path):
        command = [*known[name].command(workdir), *flags]
        gang = Gang(command, 2, 1)
        gang.after(workdir / "metrics.jsonl", rng.randint(1, len(wanted[1]) - 2))
        gang.started[number % 2].kill()
        began = time.monotonic()
        ended = gang.wait()[1 - number % 2]
        quick = time.monotonic() - began < 15 and ended[0] != 0
        Gang(command, 2, 1).results()
        count(known[name], "vanished peer", quick and trained(workdir) == wanted)


def test_a_vanished_worker_of_prepare(programs, tmp_path):
    """One of the processes that read the documents is killed, as by the kernel when memory runs out."""
    place, known = programs
    program = known["prepare"]
    program.straight(place / "prepare")
    flags = ["--config.engine.kind=local", "--config.engine.workers=2"]
    parallel = Program("prepare", lambda w: [*program.command(w), *flags], program.print_of)
    parallel.wanted, parallel.seconds = program.wanted, program.seconds
    for _, workdir, rng in tries(program, "vanished peer", tmp_path):
        process = parallel.start(workdir)
        deadline, killed = time.monotonic() + 60, False
        time.sleep(rng.uniform(0, 0.5) * program.seconds)
        while not killed and process.poll() is None and time.monotonic() < deadline:
            for child in children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed = True
            time.sleep(0.01)
        process.communicate(timeout=120)
        count(program, "vanished peer", parallel.recovers(workdir))


# The server has no folder of its own: what it must not lose is its service.


@contextlib.contextmanager
def serving(cwd=ROOT):
    flags = [f"--path={ROOT / 'configs/base'}", "--dtype=float32", "--max_length=256", "--port=0"]
    command = [sys.executable, "-m", "tools.serve", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        while not said or not said[-1].startswith("serving "):
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        yield process, said[-1].split()[-1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(url, **more):
    body = json.dumps({"model": "base", "prompt": "保険の", "max_tokens": 16, "temperature": 0, **more}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def test_serve(tmp_path):
    """Killed or asked to stop it answers again as before; a disk it cannot write to, or clients that leave, change nothing."""
    with serving() as (_, url):
        wanted = ask(url)
    for number in range(TRIES):
        rng = random.Random(f"{SEED} serve {number}")
        with serving() as (process, _):
            time.sleep(rng.random())
            process.kill()
        with serving() as (process, url):
            count("serve", "SIGKILL", ask(url) == wanted)
            process.terminate()
            ended = process.wait(timeout=90) == 0
        with serving() as (_, url):
            count("serve", "SIGTERM", ended and ask(url) == wanted)
        for fault, size, options in (("full disk", 4096, "rw"), ("read-only disk", 1 << 20, "ro")):
            with small_disk(tmp_path / f"{fault[:4]}_{number}", size):
                place = tmp_path / f"{fault[:4]}_{number}"
                if fault == "full disk":
                    with contextlib.suppress(OSError):
                        (place / "full").write_bytes(b"x" * 65536)
                remount(place, options)
                with serving(place) as (_, url):
                    count("serve", fault, ask(url) == wanted)
        with serving() as (_, url):
            host, port = url.split("//")[1].split("/")[0].split(":")
            body = json.dumps({"model": "base", "prompt": "保険の", "max_tokens": 200, "stream": True}).encode()
            for _ in range(4):  # clients that leave in the middle of an answer
                with socket.create_connection((host, int(port))) as client:
                    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
                    head += [f"Content-Length: {len(body)}", "\r\n"]
                    client.sendall("\r\n".join(head).encode() + body[: rng.randint(0, len(body))])
                    time.sleep(rng.random() / 4)
            count("serve", "vanished peer", ask(url) == wanted)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    faults = ["SIGKILL", "SIGTERM", "full disk", "read-only disk", "damage", "vanished peer"]
    lines = ["| program | " + " | ".join(faults) + " |", "|---" * (len(faults) + 1) + "|"]
    for name in (*NAMES, "serve"):
        cells = [TABLE.get((name, fault)) for fault in faults]
        lines.append(f"| {name} | " + " | ".join(f"{cell[1]} of {cell[0]}" if cell else "" for cell in cells) + " |")
    tried, survived = (sum(row[i] for row in TABLE.values()) for i in (0, 1))
    text = "\n".join([*lines, f"tried {tried}, survived {survived}, lost {tried - survived} (seed {SEED})"])
    print(f"\n{text}")
    if file := os.environ.get("FAULT_TABLE"):
        Path(file).write_text(text + "\n")
    assert tried == survived, text
