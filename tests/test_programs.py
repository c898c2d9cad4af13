"""The programs from the shell: they run alone, resume after a kill, answer --help fast, and meet bad input with a sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import door, prepare
from tests.helpers import write_checkpoint

ROOT = Path(__file__).parent.parent
CLOCK = ("tokens_per_s", "mfu", "data_wait_s")


def python(*arguments, file_limit: int | None = None):
    command = [sys.executable, *map(str, arguments)]
    if file_limit is not None:  # a limit on file size stands for a full disk: the write fails in the same place
        command = ["bash", "-c", f"trap '' XFSZ; ulimit -f {file_limit}; exec \"$@\"", "-", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The tiny corpus as shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "prepare"
    prepare.main(door.load_config(str(ROOT / "configs/prepare/tiny.py")), folder)
    return folder


@pytest.fixture
def config(prepared, tmp_path):
    """A config file like configs/cpt/tiny.py on the prepared shards; `config(change)` adds lines to it."""

    def write(*lines: str) -> Path:
        file = tmp_path / "config.py"
        file.write_text(
            "from configs.cpt import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n"
            f"    c.tokenizer = {str(prepared / 'tokenizer')!r}\n    c.data.prepare = ''\n"
            f"    c.data.mixture = (({str(prepared / 'train')!r}, 1),)\n    c.data.heldout = {str(prepared / 'heldout')!r}\n"
            + "".join(f"    {line}\n" for line in lines)
            + "    return c\n"
        )
        return file

    return write


def cpt(config_file, workdir, *flags):
    return python("-m", "experiments.cpt", f"--config={config_file}", f"--workdir={workdir}", *flags)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def refused(done, *words):
    assert done.returncode not in (0, None), done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr[-2000:]
    for word in words:
        assert word in last, last


def test_a_killed_run_ends_like_the_straight_one(config, tmp_path):
    file = config()
    straight = cpt(file, tmp_path / "a")
    assert straight.returncode == 0, straight.stderr
    result = json.loads(straight.stdout.splitlines()[-1])
    assert result["steps"] == 40 and {"loss", "tokens_per_s", "params_sha256"} <= result.keys()
    kill_and_resume(file, tmp_path, result, after=17)


def kill_and_resume(file, tmp_path, wanted, after: int, name: str = "b"):
    command = [sys.executable, "-m", "experiments.cpt", f"--config={file}", f"--workdir={tmp_path / name}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    log = tmp_path / name / "metrics.jsonl"
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < after):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = cpt(file, tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["params_sha256"] == wanted["params_sha256"]
    assert metrics(tmp_path / name) == metrics(tmp_path / "a")


@pytest.mark.proof
def test_five_kills_at_random_moments(config, tmp_path):
    import random

    file = config()
    wanted = json.loads(cpt(file, tmp_path / "a").stdout.splitlines()[-1])
    for number, after in enumerate(random.Random(time.time_ns()).sample(range(1, 40), 5)):
        kill_and_resume(file, tmp_path, wanted, after=after, name=f"kill_{number}_after_{after}")


def test_a_finished_run_is_not_run_again(config, tmp_path):
    file = config("c.train.steps = 6", "c.optim.decay_steps = 1")
    first = cpt(file, tmp_path / "a")
    assert first.returncode == 0, first.stderr
    again = cpt(file, tmp_path / "a")
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    refused(cpt(file, tmp_path / "a", "--config.train.steps=7"), "holds another config", "config.train.steps: 6 there, 7 now")


def test_sigterm_saves_and_the_same_command_goes_on(config, tmp_path):
    file = config("c.train.steps = 400")
    command = [sys.executable, "-m", "experiments.cpt", f"--config={file}", f"--workdir={tmp_path / 'a'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log = tmp_path / "a" / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "asked to stop: saved step" in out


@pytest.mark.parametrize("program", ["prepare", "cpt", "synthesize", "sft", "evaluate", "report", "pipeline", "sweep"])
def test_help_comes_with_an_example(program):
    done = python("-m", f"experiments.{program}", "--help")
    assert done.returncode == 0 and f"python -m experiments.{program} --config=" in done.stdout, done.stderr


def test_sft_runs_on_a_base_and_trains_the_answers_alone(config, tmp_path):
    base = config("c.train.steps = 6", "c.optim.decay_steps = 1")
    assert cpt(base, tmp_path / "base").returncode == 0
    chats = [
        {"id": str(i), "messages": [{"role": "user", "content": f"問い{i}"}, {"role": "assistant", "content": "答え"}]}
        for i in range(6)
    ]
    samples = tmp_path / "chats.jsonl"
    samples.write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats), encoding="utf-8")
    flags = [f"--config.init={tmp_path / 'base'}", f"--config.data.samples={samples}", f"--config.data.heldout_samples={samples}"]
    flags += ["--config.data.row_length=64", "--config.epochs=2", "--config.train.loss_chunk=8"]
    done = python("-m", "experiments.sft", "--config=configs/sft/tiny.py", f"--workdir={tmp_path / 'sft'}", *flags)
    assert done.returncode == 0, done.stderr
    row = metrics(tmp_path / "sft")[0]
    assert 0 < row["targets"] < row["tokens"] / 2
    samples.write_text('{"id": "1", "messages": [}\n', encoding="utf-8")
    refused(
        python("-m", "experiments.sft", "--config=configs/sft/tiny.py", f"--workdir={tmp_path / 'sft2'}", *flags),
        "chats.jsonl:1: not JSON",
    )
    samples.write_text('\n{"id": "1", "messages": [{"role": "cook", "content": "x"}, {"role": "assistant", "content": "x"}]}\n')
    refused(
        python("-m", "experiments.sft", "--config=configs/sft/tiny.py", f"--workdir={tmp_path / 'sft3'}", *flags),
        "chats.jsonl:2: message 0 has the unknown role 'cook'",
    )


def test_misspelt_mistyped_and_missing_settings(config, tmp_path):
    file = config()
    refused(cpt(file, tmp_path / "a", "--config.optim.learning_rat=1"), "learning_rat", "learning_rate")
    refused(cpt(file, tmp_path / "a", "--config.optim.learning_rate=fast"), "learning_rate", "fast")
    refused(cpt(config("del c.optim.beta2"), tmp_path / "a"), "optim: missing field beta2")
    refused(cpt(tmp_path / "nowhere.py", tmp_path / "a"), "nowhere.py")
    refused(
        cpt(config("c.data.batch_size = 3", "c.train.micro_batches = 2"), tmp_path / "b"), "data.batch_size=3 does not divide"
    )


def test_counts_below_one_are_refused(config, tmp_path):
    done = cpt(config("c.data.batch_size = 0", "c.train.eval_every = 0"), tmp_path / "a")
    refused(done, "data.batch_size=0, train.eval_every=0: at least 1 is wanted")
    sft = ["-m", "experiments.sft", "--config=configs/sft/tiny.py", f"--workdir={tmp_path / 'b'}"]
    refused(python(*sft, "--config.data.samples_weight=0"), "data.samples_weight=0: at least 1 is wanted")
    assert not (tmp_path / "b").exists()


def test_a_model_folder_left_half_copied_by_a_kill_is_completed(config, tmp_path):
    from swallow_jax import checkpoint

    file = config("c.train.steps = 6", "c.optim.decay_steps = 1")
    first = cpt(file, tmp_path / "a")
    assert first.returncode == 0, first.stderr
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "result"}))
    (tmp_path / "a" / "model" / "config.json").unlink()
    again = cpt(file, tmp_path / "a")
    assert again.returncode == 0, again.stderr
    wanted, got = (json.loads(done.stdout.splitlines()[-1]) for done in (first, again))
    assert [got[k] for k in ("loss", "params_sha256")] == [wanted[k] for k in ("loss", "params_sha256")]
    checkpoint.open_model(tmp_path / "a")


def test_bad_models_and_tokenizers(config, prepared, tmp_path):
    write_checkpoint(tmp_path / "hf", "mqa")
    for file in (prepared / "tokenizer").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    init = f"c.init = {str(tmp_path / 'hf')!r}"
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(cpt(config(init), tmp_path / "a"), "model.safetensors", "truncated")
    weights.unlink()
    refused(cpt(config(init), tmp_path / "b"), "model.safetensors", "missing")
    weights.write_bytes(whole)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**raw, "intermediate_size": 96}))
    refused(cpt(config(init), tmp_path / "c"), "has shape", "config.json asks for")
    refused(cpt(config("c.model.vocab_size = 300"), tmp_path / "d"), "512", "300")
    refused(cpt(config("c.init = '/nowhere/model'"), tmp_path / "e"), "/nowhere/model", "does not exist")


def test_bad_text(tmp_path):
    domain = tmp_path / "domain"
    domain.mkdir()
    source = (ROOT / "configs/prepare/tiny_data/domain.yaml").read_text(encoding="utf-8")
    (domain / "domain.yaml").write_text(source, encoding="utf-8")
    for file in (ROOT / "configs/prepare/tiny_data").glob("*.jsonl"):
        (domain / file.name).write_text('{"id": "1", "text": "あ"}\n{"id": \n', encoding="utf-8")
    config_file = tmp_path / "config.py"
    config_file.write_text(
        "from configs.prepare import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n"
        f"    c.corpus.domains = ({str(domain)!r},)\n    return c\n"
    )
    done = python("-m", "experiments.prepare", f"--config={config_file}", f"--workdir={tmp_path / 'a'}")
    refused(done, ".jsonl:")
    for file in domain.glob("*.jsonl"):
        file.write_text("", encoding="utf-8")
    refused(python("-m", "experiments.prepare", f"--config={config_file}", f"--workdir={tmp_path / 'b'}"), "empty")
    assert not (tmp_path / "a" / "train").exists() and not (tmp_path / "b" / "train").exists()


def test_a_diverging_run_names_its_steps(config, tmp_path):
    file = config("c.optim.learning_rate = 1e12", "c.optim.clip_norm = 1e12", "c.optim.final_learning_rate = 1e12")
    refused(cpt(file, tmp_path / "a"), "not finite at step", "lower optim.learning_rate")


def test_a_full_disk_leaves_nothing_that_looks_complete(config, tmp_path):
    workdir = tmp_path / "a"
    done = python("-m", "experiments.prepare", "--config=configs/prepare/tiny.py", f"--workdir={workdir}", file_limit=16)
    refused(done, "File too large")
    assert not (workdir / "train" / "index.json").exists()
    assert "result" not in json.loads((workdir / "manifest.json").read_text())


def test_a_full_disk_under_a_checkpoint_is_one_sentence(config, tmp_path):
    command = ["-m", "experiments.cpt", f"--config={config()}", f"--workdir={tmp_path / 'a'}"]
    done = python(*command, file_limit=100)
    # Above it tensorstore may print what became of its other writes.
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: File too large: ") and "checkpoints; free some space" in last
    assert "result" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert not [p for p in (tmp_path / "a" / "checkpoints").iterdir() if p.name.isdigit()]


def pipeline(tmp_path, stages):
    file = tmp_path / "pipeline.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    c = ConfigDict()\n"
        f"    c.stages = {stages!r}\n    return c\n"
    )
    return python("-m", "experiments.pipeline", f"--config={file}", f"--workdir={tmp_path / 'runs'}")


def test_a_pipeline_runs_its_stages_once(tmp_path):
    stages = (
        {"name": "text", "program": "prepare", "config": "configs/prepare/tiny.py"},
        {"name": "scores", "program": "evaluate", "config": "configs/evaluate/tiny.py"},
    )
    done = pipeline(tmp_path, stages)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["stages"] == 2
    first = (tmp_path / "runs" / "scores" / "manifest.json").read_text()
    chain = json.loads((tmp_path / "runs" / "manifest.json").read_text())
    assert list(chain["stages"]) == ["text", "scores"] and chain["result"]["scores"] == json.loads(first)["result"]
    assert json.loads((tmp_path / "runs" / "config.json").read_text())["stages"][1]["name"] == "scores"
    again = pipeline(tmp_path, stages)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (tmp_path / "runs" / "scores" / "manifest.json").read_text() == first


def test_a_pipeline_checks_every_stage_before_the_first(tmp_path):
    good = {"name": "text", "program": "prepare", "config": "configs/prepare/tiny.py"}
    refused(pipeline(tmp_path, (good, {**good, "name": "b", "program": "cook"})), "stage b: unknown program 'cook'")
    refused(pipeline(tmp_path, (good, {**good, "name": "b", "config": "configs/nowhere.py"})), "configs/nowhere.py")
    refused(pipeline(tmp_path, (good, good)), "two stages have one name")
    assert not (tmp_path / "runs").exists()
