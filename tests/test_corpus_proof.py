"""Heavy proofs on the corpus: the same bytes from every engine, and after a kill in every stage; flat memory."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from experiments import prepare
from swallow_jax import run
from swallow_jax.data import engines
from tests.test_corpus import ROOT, big, document, fingerprint, mixed_folder

pytestmark = pytest.mark.proof
STAGES = ("annotate", "resolve", "compare", "decide", "tokenise", "pack")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of a dozen tasks with everything in it, the config that reads it, and what a straight run makes of it."""
    place = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    config = big(place, rng, count=120)
    turns = [{"speaker": "募集人", "text": document(rng, 1)} for _ in range(20)]
    run.write_jsonl(place / "test.jsonl", [{"conversation_id": "c", "turns": turns, "labels": [], "evidence": []}])
    config.contamination = ConfigDict(
        {"test_sets": (str(place / "test.jsonl"),), "protect": "turns", "ngram": 13, "jaccard": 0.5}
    )
    config.corpus.task_mb = 0.02
    config.corpus.unique_paragraphs = True
    config.pack.heldout_share = 0.1
    os.chdir(ROOT)
    result = prepare.main(config, place / "straight")
    return place, config, result, fingerprint(place / "straight")


def config_file(place, config, name="config.py"):
    """The config as a file that the command line takes."""
    content = config.to_dict()
    (place / name).write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({content!r})\n"
    )
    return place / name


@pytest.mark.parametrize(
    "engine", [{"kind": "local", "workers": 1}, {"kind": "local", "workers": 2}, {"kind": "ray", "workers": 2}]
)
def test_every_engine_and_worker_count_makes_the_same_bytes(made, tmp_path, engine):
    place, config, result, expected = made
    flags = [f"--config.engine.{name}={value}" for name, value in engine.items()]
    if engine["kind"] == "ray":
        flags.append(
            "--config.corpus.task_mb=0.08"
        )  # an actor a task takes seconds; the bytes are the same, as another test says
    command = [
        sys.executable,
        "-m",
        "experiments.prepare",
        f"--config={config_file(place, config)}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == result
    assert fingerprint(tmp_path / "run") == expected


_FAKE = {
    # An array job runs at once, task by task, with the environment that Slurm would give.
    "sbatch": """#!/bin/bash
script="${@: -1}"
if grep -q merge_stats "$script"; then echo "Submitted batch job 2"; exit 0; fi
tasks=$(grep -oP '(?<=--array=0-)[0-9]+' "$script")
for i in $(seq 0 $tasks); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=localhost RUN_OFFSET=0 bash "$script" >> "$FAKE_SLURM_LOG" 2>&1
done
echo "Submitted batch job 1"
""",
    "squeue": "#!/bin/bash\n",
    "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho localhost\n",
}


def test_slurm_gets_an_array_job_that_makes_the_same_bytes(made, tmp_path):
    place, config, result, expected = made
    for name, script in _FAKE.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    slurm = ConfigDict(config.to_dict())
    slurm.engine = ConfigDict(
        {"kind": "slurm", "workers": 2, "address": "", "slurm": {"time": "01:00:00", "partition": "cpu", "poll_seconds": 0}}
    )
    command = [sys.executable, "-m", "experiments.prepare", f"--config={config_file(place, slurm, 'slurm.py')}"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_SLURM_LOG": str(tmp_path / "log")}
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    log = (tmp_path / "log").read_text()[-2000:] if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + log
    assert json.loads(done.stdout.strip().splitlines()[-1]) == result
    assert fingerprint(tmp_path / "run") == expected


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_in_any_stage_changes_nothing(made, tmp_path, stage, moment):
    """Three times in each stage: early, in the middle of writing, and when the stage is nearly done."""
    place, config, result, expected = made
    program = tmp_path / "killer.py"
    program.write_text(
        f"""
import os, signal
from experiments import door, prepare
from swallow_jax.data import corpus, shards

stage, left = {stage!r}, [{(0, 5, 11)[moment]}]

def or_die(function):
    def wrapped(*args, **kwargs):
        if inside[0] == stage:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

inside = [""]

def entered(name, function):
    def wrapped(*args, **kwargs):
        before, inside[0] = inside[0], name
        try:
            return function(*args, **kwargs)
        finally:
            inside[0] = before
    wrapped.__name__ = name
    return wrapped

for name in {STAGES!r}:
    setattr(corpus, name, entered(name, getattr(corpus, name)))
os.fsync = or_die(os.fsync)  # every file of every stage passes here before it gets its name
os.replace = or_die(os.replace)
prepare.main(door.load_config({str(config_file(place, config))!r}), __import__("pathlib").Path({str(tmp_path / "run")!r}))
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run/report.json").exists()
    assert prepare.main(config, tmp_path / "run") == result
    assert fingerprint(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_kills_at_random_moments_with_two_workers(made, tmp_path):
    place, config, result, expected = made
    command = [
        sys.executable,
        "-m",
        "experiments.prepare",
        f"--config={config_file(place, config)}",
        f"--workdir={tmp_path / 'run'}",
    ]
    command += ["--config.engine.kind=local", "--config.engine.workers=2"]
    rng = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(1.5, 9))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert prepare.main(config, tmp_path / "run") == result
    assert fingerprint(tmp_path / "run") == expected


def test_where_two_gigabytes_of_documents_come_together_little_memory_is_needed(tmp_path):
    """700,000 documents of 14 paragraphs (2 GB of UTF-8) as digests and keys: `resolve` and `decide` stay far below 2 GB."""
    script = f"""
import numpy as np, pathlib
from swallow_jax.data import corpus, staging
settings = corpus.Corpus(domains=({str(ROOT / "configs/domains/demo_talks_ja")!r},), root="/", mask=(),
                         unique_paragraphs=True, near_bands=40,
                         near_rows=20, corrections=None, task_mb=16.0, max_document_mb=64.0)
job = corpus.Job(folder=pathlib.Path({str(tmp_path)!r}), corpus=settings, contamination=None, test_files=(), seed=0,
                 tokenizer=None)
rng, N, M = np.random.default_rng(0), 5400, 14
for n in range(130):
    draw = lambda *shape: rng.integers(0, 2**63, shape, dtype=np.uint64)
    staging.write_arrays(job.part("annotate", n, "npz"), document=draw(N, 2), id=draw(N, 2), paragraph=draw(N * M, 2),
                         filled=np.ones(N, bool), good=np.ones(N, bool), lines=np.full(N, M, np.int32))
    staging.write_arrays(job.part("compare", n, "npz"), keys=draw(N, 40) % 2**40, ranks=draw(N, 2), good=np.ones(N, bool),
                         lengths=np.full(N, 1000))
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
corpus.resolve(job, 130)
corpus.decide(job, [{{"domain": 0}}] * 130, 0.01)
print(peak())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 < 1.9e9, f"{int(done.stdout) / 1e6:.2f} GB"
    print(done.stdout)


def test_an_error_in_a_worker_comes_back_as_its_sentence(tmp_path):
    for kind, workers in (("here", 1), ("local", 2)):
        engine = engines.Engine(kind=kind, workers=workers, address="", slurm={})
        with pytest.raises(ValueError, match="task two is wrong"):
            engines.run_tasks(_fails_at_two, [{"n": n} for n in range(4)], engine=engine, folder=tmp_path / kind, name="step")


def _fails_at_two(task):
    if task["n"] == 2:
        raise ValueError("task two is wrong")
    return {}


def test_the_mixed_folder_through_the_command_line(tmp_path):
    made, count, failures = mixed_folder(tmp_path, random.Random(2))
    command = [
        sys.executable,
        "-m",
        "experiments.prepare",
        f"--config={config_file(tmp_path, made)}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    assert printed["documents_in"] == count + len(failures) == printed["kept"] + 1 + len(failures)
