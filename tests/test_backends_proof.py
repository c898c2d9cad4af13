"""Jobs that are killed at random, and the server under load, misuse and fuzzing; minutes each."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from swallow_jax import run
from tests.test_backends import checkpoint  # noqa: F401  (a fixture)

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parent.parent
REQUESTS, KILLS = 2000, 10
SECONDS = float(os.environ.get("LOAD_SECONDS", "120"))
CLIENTS = 64

JOB = """
import sys
from swallow_jax.generate import backends

checkpoint, path = sys.argv[1:]
section = {"kind": "jax", "path": checkpoint, "dtype": "float32", "slots": 16, "max_length": 64, "chunk": 4, "name": "tiny"}
job = backends.record(backends.open_backend(section), path)
requests = (
    backends.Request(
        prompt=f"質問{i}", max_new_tokens=2 + i % 9, temperature=(0.0, 0.8)[i % 2], top_k=0, top_p=0.9, seed=i,
        stop=("の",) if i % 3 == 0 else (),
    )
    for i in range(2000)
)
assert len({result.key for result in job.generate(requests)}) == 2000
"""


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_job_killed_ten_times_ends_with_the_lines_of_an_uninterrupted_one(checkpoint, tmp_path):  # noqa: F811
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", JOB, str(checkpoint)]
    subprocess.run([*command, str(straight)], cwd=ROOT, check=True)
    rng, kept = random.Random(0), []
    for _ in range(KILLS):
        process = subprocess.Popen([*command, str(killed)], cwd=ROOT)
        target = lines(killed) + rng.randint(1, (REQUESTS - lines(killed)) // 6)
        while process.poll() is None and lines(killed) < target:
            time.sleep(rng.uniform(0, 0.01))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(lines(killed))
    with open(killed, "ab") as f:  # and a power cut in the middle of a line
        f.write(b'{"key": "half a l')
    assert kept == sorted(kept) and len(set(kept)) == KILLS and kept[-1] < REQUESTS
    subprocess.run([*command, str(killed)], cwd=ROOT, check=True)
    rows = run.read_jsonl(killed)
    assert len(rows) == REQUESTS and len({row["key"] for row in rows}) == REQUESTS
    assert sorted(killed.read_bytes().splitlines()) == sorted(straight.read_bytes().splitlines())
    print(json.dumps({"requests": REQUESTS, "kills": KILLS, "lines_at_kill": kept}))


@contextlib.contextmanager
def serving(folder, *flags):
    """tools.serve in a process of its own: (process, url)."""
    command = [sys.executable, "-m", "tools.serve", f"--path={folder}", "--name=tiny", "--dtype=float32", "--max_length=128"]
    with open(folder / "server.log", "w+b") as log:
        process = subprocess.Popen([*command, "--port=0", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
        try:
            while b"serving tiny on " not in (said := (folder / "server.log").read_bytes()):
                assert process.poll() is None, said
                time.sleep(0.1)
            yield process, said.split(b"serving tiny on ")[1].split()[0].decode()
        finally:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and json.loads(out.splitlines()[-1])["running"] == 0
    assert b"Traceback" not in (folder / "server.log").read_bytes()


def memory(process):
    """Resident bytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def asked(number):
    """The number-th of forty requests, and its path."""
    rng = random.Random(number)
    common = {"model": "tiny", "temperature": rng.choice([0, 0.7, 1.0]), "seed": number, "n": rng.choice([1, 1, 2])}
    if number % 4 == 0:
        return "/chat/completions", common | {
            "messages": [{"role": "user", "content": f"質問{number}"}],
            "max_tokens": rng.randint(1, 24),
        }
    if number % 4 == 1:
        return "/completions", common | {
            "prompt": f"保険{number}",
            "max_tokens": 1,
            "temperature": 0,
            "n": 1,
            "echo": True,
            "logprobs": 1,
        }
    return "/completions", common | {"prompt": f"保険{number}", "max_tokens": rng.randint(1, 40), "top_p": 0.9, "stop": ["の"]}


def told(answer):
    """What may not differ between two answers to one request. Scores of a text depend on nothing else either."""
    return [choice | {"index": 0} for choice in answer["choices"]]


BAD = [
    b"{", b"\xff", b"[" * 5000, b"x" * 3_000_000, b'{"model": "tiny"}', b'{"model": "tiny", "prompt": [999999], "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": 5000}', b'{"model": "tiny", "prompt": "a", "n": 1000}',
    b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "no", "prompt": "a"}',
    b'{"model": "tiny", "prompt": "a", "temperature": 9}',
]  # fmt: skip


def test_64_clients_for_two_minutes_get_right_answers_and_leave_nothing_behind(checkpoint, tmp_path):  # noqa: F811
    counts = dict.fromkeys(("answered", "refused", "hung_up", "come_again", "wrong"), 0)
    json_headers = {"Content-Type": "application/json"}

    async def client(number, url, expected, until):
        rng = random.Random(f"client {number}")
        async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
            while time.monotonic() < until:
                kind, which = rng.random(), rng.randrange(40)
                path, body = asked(which)
                if kind < 0.1:
                    response = await http.post(url + "/completions", content=rng.choice(BAD), headers=json_headers)
                    assert 400 <= response.status_code < 500 and response.json()["error"]["message"], response.text
                    counts["refused" if response.status_code != 429 else "come_again"] += 1
                elif kind < 0.2:
                    with contextlib.suppress(httpx.ReadTimeout):
                        pause = httpx.Timeout(60, read=rng.uniform(0.001, 0.2))
                        body = body | {"max_tokens": 100} if "echo" not in body else body
                        await http.post(url + path, json=body, timeout=pause)
                    counts["hung_up"] += 1
                else:
                    response = await http.post(url + path, json=body)
                    if response.status_code == 429:
                        counts["come_again"] += 1
                        await asyncio.sleep(0.05)
                        continue
                    assert response.status_code == 200, response.text
                    counts["answered"] += 1
                    counts["wrong"] += told(response.json()) != expected[which]

    async def load(url, process):
        async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
            expected = {}
            for which in range(40):  # each alone, before there is any load
                path, body = asked(which)
                response = await http.post(url + path, json=body)
                assert response.status_code == 200, response.text
                expected[which] = told(response.json())
            sizes, start = [], time.monotonic()

            async def watch():
                while time.monotonic() < start + SECONDS:
                    sizes.append(memory(process))
                    await asyncio.sleep(SECONDS / 40)

            await asyncio.gather(watch(), *(client(i, url, expected, start + SECONDS) for i in range(CLIENTS)))
            for _ in range(200):
                state = (await http.get(url.removesuffix("/v1") + "/health")).json()
                if not (state["under_way"] or state["running"] or state["queued"]):
                    break
                await asyncio.sleep(0.1)
        return sizes, state

    with serving(checkpoint, "--slots=8", "--requests=48", "--body_bytes=100000") as (process, url):
        sizes, state = asyncio.run(load(url, process))
    early, late = (float(np.median(part)) for part in (sizes[8:18], sizes[-10:]))
    print(json.dumps({"seconds": SECONDS, "clients": CLIENTS, **counts, "health": state, "rss_mb": [early / 1e6, late / 1e6]}))
    assert (state["status"], state["under_way"], state["running"], state["queued"]) == ("ok", 0, 0, 0)
    assert counts["wrong"] == 0 and min(counts["answered"], counts["refused"], counts["hung_up"], counts["come_again"]) > 0
    assert late < early + 30e6


def test_schemathesis_finds_no_server_error(checkpoint):  # noqa: F811
    with serving(checkpoint, "--slots=4", "--body_s=2") as (_, url):
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", url.removesuffix("/v1") + "/openapi.json",
            "--checks=not_a_server_error", "--max-examples=60", "--seed=1", "--no-color", "--request-timeout=60",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
