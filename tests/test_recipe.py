"""The real recipe, configs/pipeline/insurance_8b.py: it loads for its meshes, says what is missing, and asks six arms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.pipeline import insurance_8b
from experiments import door, evaluate, pipeline
from swallow_jax import run

ROOT = Path(__file__).parent.parent
MESHES = ("h100x8", "v5p-16")
WORKDIR = Path("runs/insurance_8b")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the checkout's configs and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stages(mesh):
    config = door.load_config(f"configs/pipeline/insurance_8b.py:{mesh}")
    found = [dict(stage) for stage in config.stages]
    return config, found, pipeline.load(found, WORKDIR)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_missing_is_the_list_of_downloads_each_with_its_licence_and_source(elsewhere, mesh):
    config, found, configs = stages(mesh)
    missing = pipeline.absent(found, configs, WORKDIR)
    words = pipeline.absence(missing, config.downloads)
    on_gpus = mesh == "h100x8"  # there the teacher is an endpoint
    wanted = [entry for entry in insurance_8b.DOWNLOADS if not (on_gpus and "70B" in entry["path"])]
    assert words.startswith(f"{len(wanted)} things are missing, nothing was started")
    for entry in wanted:
        (line,) = [line for line in words.splitlines() if line.startswith(f"  {entry['path']} (for ")]
        assert f"licence {entry['licence']}; get it by {entry['get']}" in line
    assert "no earlier stage makes it" not in words


@pytest.mark.parametrize("mesh", MESHES)
def test_with_the_downloads_in_place_nothing_is_missing_and_training_fits_its_mesh(elsewhere, mesh):
    from experiments.sweep import plan_row

    for entry in insurance_8b.DOWNLOADS:
        Path(entry["path"]).mkdir(parents=True)
    for name in ("edinet/x/a.zip", "fsa/a.html", "fsa/a.pdf", "laws/a.xml", "wikipedia/a.parquet"):
        file = Path("data/finance") / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for name in ("fineweb2_ja", "fineweb_edu"):
        (Path("data/general") / name / "a.parquet").touch()
    _, found, configs = stages(mesh)
    assert pipeline.absent(found, configs, WORKDIR) == []
    for entry in insurance_8b.DOWNLOADS:
        if entry["path"].startswith("models/"):
            Path(entry["path"]).rmdir()
    plans = {s["name"]: plan_row(c, 8, 80) for s, c in zip(found, configs, strict=True) if s["program"] in pipeline.TRAINING}
    assert len(plans) == 2 + 4 * 3
    assert plans["cpt"] == plans["control"] and plans["cpt"].startswith("8 device(s), 7630 steps, 8,030,261,248 parameters")


def test_the_six_arms_share_their_samples_and_the_control_its_tokens(elsewhere):
    _, found, configs = stages("h100x8")
    by_name = dict(zip((s["name"] for s in found), configs, strict=True))
    settings = run.build(evaluate.Settings, by_name["evaluate"].to_dict(), "config")
    evaluate.check(settings)
    assert list(dict.fromkeys(e["name"] for e in settings.models if e["kind"] in ("hf", "run"))) == [
        "base", "instruct, few-shot", "SFT", "instruct + SFT", "CPT + SFT", "general CPT + SFT"]  # fmt: skip
    made = {f"{WORKDIR}/{name}" for name in by_name}
    assert {e["path"] for e in settings.models if e["kind"] == "run"} <= made
    sfts = [c for s, c in zip(found, configs, strict=True) if s["program"] == "sft"]
    assert len({(c.data.samples, c.epochs, c.optim.learning_rate, c.data.batch_size) for c in sfts}) == 1
    cpt, control = by_name["cpt"].to_dict(), by_name["control"].to_dict()
    assert control["data"]["mixture"] == ((f"{WORKDIR}/general/train", 1),)
    for config in (cpt, control):
        config["data"].pop("mixture"), config["data"].pop("heldout")
    assert cpt == control, "finance CPT and its control differ in their text alone"
    assert by_name["finance"].pack == by_name["general"].pack


def test_the_pipeline_says_so_before_it_writes_anything(elsewhere):
    command = [sys.executable, "-m", "experiments.pipeline", "--config=configs/pipeline/insurance_8b.py", "--workdir=runs/x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: 9 things are missing, nothing was started" in done.stderr
    assert "models/Llama-3.1-Swallow-8B-v0.2 (for untouched, finance, general, cpt, control, sft_0" in done.stderr
    assert not (elsewhere / "runs").exists()


def test_a_stage_may_be_the_last_of_a_start(elsewhere):
    Path("p.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    c = ConfigDict()\n    c.stages = (\n"
        "        {'name': 'a', 'program': 'prepare', 'config': 'configs/prepare/tiny.py',\n"
        "         'overrides': {'pack.row_length': 32}},\n"
        "        {'name': 'b', 'program': 'prepare', 'config': 'configs/prepare/tiny.py'},\n    )\n    return c\n"
    )
    command = [sys.executable, "-m", "experiments.pipeline", "--config=p.py", "--workdir=w"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run([*command, "--until=a"], cwd=elsewhere, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["stages"] == 1 and not Path("w/b").exists()
    assert json.loads(Path("w/a/config.json").read_text())["pack"]["row_length"] == 32
    wrong = subprocess.run([*command, "--until=c"], cwd=elsewhere, capture_output=True, text=True, check=False, env=environment)
    assert wrong.returncode == 1 and "--until=c: no such stage; there are a, b" in wrong.stderr
