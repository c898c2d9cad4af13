"""Sweeps: combining sets of overrides, arms and their labels, checks before anything runs, what "*" means, and the verdict."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.sweep import axis, chain, product, zipped
from experiments import door, pipeline
from swallow_jax import sweep

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(f for f in (ROOT / "configs" / "sweep").glob("*.py") if f.stem != "__init__")
STAGES = (
    {"name": "cpt", "program": "cpt", "config": "configs/cpt/demo.py"},
    {"name": "sft", "program": "sft", "config": "configs/sft/demo.py:base,0", "overrides": {"epochs": 1}},
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# Sets of overrides.


def test_product_names_every_choice_and_the_last_axis_is_fastest():
    assert product(axis("a.x", (1, 2), name="x"), axis("a.y", (3, 4), name="y")) == {
        "x=1,y=3": {"a.x": 1, "a.y": 3},
        "x=1,y=4": {"a.x": 1, "a.y": 4},
        "x=2,y=3": {"a.x": 2, "a.y": 3},
        "x=2,y=4": {"a.x": 2, "a.y": 4},
    }


def test_zipped_goes_through_sets_side_by_side_and_refuses_unequal_ones():
    assert zipped(axis("x", (1, 2), name="x"), axis("y", (3, 4), name="y")) == {
        "x=1,y=3": {"x": 1, "y": 3},
        "x=2,y=4": {"x": 2, "y": 4},
    }
    with pytest.raises(ValueError, match="equally long, these have 2, 1 arms"):
        zipped(axis("x", (1, 2), name="x"), axis("y", (3,), name="y"))


def test_chain_joins_sets_and_refuses_a_name_that_stands_twice():
    assert chain({"plain": {}}, axis("x", (1,), name="x")) == {"plain": {}, "x=1": {"x": 1}}
    with pytest.raises(ValueError, match="two arms are called 'plain'"):
        chain({"plain": {}}, {"plain": {"x": 1}})
    with pytest.raises(ValueError, match="arm x=1,z=2: 'z=2' sets x a second time"):
        product(axis("x", (1,), name="x"), axis("x", (2,), name="z"))


# Arms.


def test_an_arm_overrides_its_stages_and_stands_apart_from_its_seed():
    named = product({"low": {"sft.optim.learning_rate": 1e-4}, "high": {}}, axis("sft.data.seed", (0, 7), name="seed"))
    found = sweep.arms(named, STAGES, Path("runs/s"))
    assert [(arm.name, arm.label, arm.seed) for arm in found] == [
        ("low,seed=0", "low", 0), ("low,seed=7", "low", 7), ("high,seed=0", "high", 0), ("high,seed=7", "high", 7)]  # fmt: skip
    assert found[1].folder == Path("runs/s/arms/low,seed=7")
    assert found[1].stages[1]["overrides"] == {"epochs": 1, "optim.learning_rate": 1e-4, "data.seed": 7}
    assert STAGES[1]["overrides"] == {"epochs": 1}, "the sweep's own stages stay as they are"


def test_an_arm_may_take_another_config_for_a_stage_or_leave_it_out():
    other = {"sft": "configs/sft/demo.py:cpt,0", "cpt.data.heldout": "{shared}/x"}
    first, second = sweep.arms({"a": other, "b": {"cpt": None, "sft.init": "{arm}/cpt"}}, STAGES, Path("w"))
    assert [stage["config"] for stage in first.stages] == ["configs/cpt/demo.py", "configs/sft/demo.py:cpt,0"]
    assert first.stages[0]["overrides"] == {"data.heldout": "w/shared/x"}
    assert [stage["name"] for stage in second.stages] == ["sft"] and second.stages[0]["overrides"]["init"] == "w/arms/b/cpt"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({}, "names no arm"),
        ({"a/b": {}}, "arm 'a/b': a name is made of letters"),
        ({"..": {}}, "arm '..'"),
        ({"after": {}}, "none of shared, after"),
        ({"a": {"sgt.epochs": 1}}, "arm a: 'sgt.epochs' names no stage; known: cpt, sft"),
        ({"x,seed=1": {}, "seed=1,x": {}}, "one label and one seed"),
    ],
)
def test_bad_arms_are_named(named, words):
    with pytest.raises(ValueError, match=words):
        sweep.arms(named, STAGES, Path("w"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.learning_rat": 1e-3}, r"no field 'optim.learning_rat'; did you mean 'optim.learning_rate'\?"),
        ({"optim.learning_rate": "fast"}, "optim.learning_rate='fast' is str, float is wanted"),
        ({"seed.x": 1}, "no field 'seed.x'"),
    ],
)
def test_an_override_of_what_is_not_there_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        door.override(door.load_config("configs/sft/tiny.py"), changes)


def test_overrides_reach_the_config_of_a_stage_and_keep_it_locked():
    stages = ({**STAGES[1], "overrides": {"optim.learning_rate": 1, "data.replay": (("x", 1),)}},)
    (config,) = pipeline.load(stages, Path("w"))
    assert config.optim.learning_rate == 1.0 and config.data.replay == (("x", 1),) and config.is_locked
    assert config.data.samples == "w/synthesize/train.jsonl"


# "*" stands for every arm.


def test_a_star_is_written_out_for_every_arm():
    found = sweep.arms(product({"a": {}, "b": {}}, {"seed=0": {}, "seed=1": {}}), STAGES, Path("w"))
    config = {
        "training": ("some/file.jsonl",),
        "models": ({"name": "base", "seed": 0, "path": "m"}, {"name": "* tuned", "seed": 0, "path": "sft"}),
        "comparisons": ({"a": "*", "b": "*"}, {"a": "*", "b": "base"}, {"a": "x", "b": "y"}),
        "kept": ({"before": "base", "after": "*", "margin": 0.1},),
    }
    out = sweep.every(config, found)
    assert [(m["name"], m["seed"], m["path"]) for m in out["models"]] == [
        ("base", 0, "m"), ("a tuned", 0, "w/arms/a,seed=0/sft"), ("a tuned", 1, "w/arms/a,seed=1/sft"),
        ("b tuned", 0, "w/arms/b,seed=0/sft"), ("b tuned", 1, "w/arms/b,seed=1/sft")]  # fmt: skip
    assert [(c["a"], c["b"]) for c in out["comparisons"]] == [("b", "a"), ("a", "base"), ("b", "base"), ("x", "y")]
    assert out["kept"] == ({"before": "base", "after": "a", "margin": 0.1}, {"before": "base", "after": "b", "margin": 0.1})
    assert "training" not in out
    report = sweep.every({"training": ({"name": "*", "folder": "sft"},)}, found)
    assert [entry["name"] for entry in report["training"]] == ["a,seed=0", "a,seed=1", "b,seed=0", "b,seed=1"]


# Which arm won.


def scores(**p_holm: float) -> dict:
    values = {"a": 0.5, "b": 0.8, "c": 0.7, "base": 0.9}
    rows = [{"model": m, "metric": "acc", "test_set": "t", "value": v, "level": 0.95} for m, v in values.items()]
    same = {"metric": "acc", "test_set": "t"}
    paired = [
        {**same, "a": a, "b": b, "diff": values[a] - values[b], "p_pairs": p / 2, "p_holm": p} for (a, b), p in p_holm.items()
    ]
    return {"scores": rows, "paired": paired}


def test_the_verdict_tells_the_best_arm_from_those_that_chance_allows():
    found = sweep.verdict(scores(ba=0.01, cb=0.3), ["a", "b", "c"], "acc", "t")
    assert found["best"] == "b" and found["comparisons"] == 2, "a model that is no arm does not win"
    assert list(found["better_than"]) == ["a"] and found["better_than"]["a"]["gain"] == pytest.approx(0.3)
    assert list(found["not_told_from"]) == ["c"] and found["not_told_from"]["c"]["gain"] == pytest.approx(0.1)
    words = sweep.verdict_words(found)
    assert "better than a (+30.0 pp, Holm p 0.01)" in words and "not told apart from c (+10.0 pp, Holm p 0.3)" in words
    assert sweep.verdict(scores(ba=0.01), ["a", "b", "c"], "acc", "t")["not_compared"] == ["c"]


# The configs that ship, and the program.


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_every_shipped_sweep_loads_with_all_its_arms(file, tmp_path):
    import runpy

    config = door.load_config(str(file.relative_to(ROOT)))
    arms = sweep.arms(runpy.run_path(str(file))["sweep"](), [dict(s) for s in config.stages], tmp_path)
    made = [tmp_path / "shared"]
    shared = sweep.filled(config.shared, {"{shared}": str(made[0])})
    assert not pipeline.absent(shared, pipeline.load(shared, made[0]), made[0])
    for arm in arms:
        assert not pipeline.absent(arm.stages, pipeline.load(arm.stages, arm.folder), arm.folder, made)
    for stage, settings in zip(config.after, pipeline.load(config.after, tmp_path), strict=True):
        door.override(settings, sweep.every(settings.to_dict(), arms))
        if stage["program"] == "evaluate":
            from experiments import evaluate
            from swallow_jax import run

            evaluate.check(run.build(evaluate.Settings, settings.to_dict(), "config"))


def sweeping(*flags: str, config="configs/sweep/demo.py"):
    command = [sys.executable, "-m", "experiments.sweep", f"--config={config}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def write(tmp_path, sets: str, stages=STAGES[1:]) -> Path:
    file = tmp_path / "s.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    c = ConfigDict()\n"
        f"    c.shared, c.stages, c.after = (), {stages!r}, ()\n    return c\n\n\ndef sweep():\n    return {sets}\n"
    )
    return file


def test_a_dry_run_shows_one_command_an_arm_and_writes_nothing(tmp_path):
    done = sweeping(f"--workdir={tmp_path / 'w'}", "--dry_run", "--devices=1")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("to run ")]
    assert len(commands) == 8 and f"--workdir={tmp_path / 'w'} --arm=rate=0.001,seed=0" in commands[1]
    assert json.loads(done.stdout.splitlines()[-1]) == {"arms": 6, "done": 0, "index": str(tmp_path / "w" / "index.json")}
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("sets", "flags", "words"),
    [
        ("{'a': {}, 'b': {'sft.optim.learning_rat': 1.0}}", (), ("error: b: stage sft", "learning_rate")),
        ("{'a': {}, 'b': {'sft.mesh.fsdp': 2}}", ("--devices=1",), ("error: b: mesh", "wants 2 devices, 1 are there")),
        ("{'a': {}}", ("--memory_gb=0.001",), ("error: a: 0.019 GB of weights and optimiser state", "0.001 are there")),
        ("{'a': {}, 'b': {'sft.data.samples': 'no/such.jsonl'}}", (), ("no/such.jsonl (for sft) does not exist",)),
        ("{'a': {}, 'b': {'sft.optim.clip_norm': None}}", (), ("error: b:", "clip_norm")),
    ],
)
def test_one_bad_arm_stops_the_sweep_before_the_first_runs(tmp_path, sets, flags, words):
    chats = "configs/prepare/tiny_data/chats.jsonl"
    stages = ({**STAGES[1], "overrides": {"data.samples": chats, "data.heldout_samples": chats}},)
    done = sweeping(f"--workdir={tmp_path / 'w'}", "--submit=print", *flags, config=write(tmp_path, sets, stages))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "w").exists()


def test_a_finished_arm_of_another_config_is_refused_and_a_finished_one_skipped(tmp_path):
    from swallow_jax import run

    chats = "configs/prepare/tiny_data/chats.jsonl"
    stages = ({**STAGES[1], "overrides": {"data.samples": chats, "data.heldout_samples": chats}},)
    file, workdir = write(tmp_path, "{'a': {'sft.epochs': 1}, 'b': {'sft.epochs': 2}}", stages), tmp_path / "w"
    (arm, _) = sweep.arms({"a": {"sft.epochs": 1}, "b": {"sft.epochs": 2}}, stages, workdir)
    (settings,) = pipeline.load(arm.stages, arm.folder)
    finished = {"result": {"sft": {"loss": 1.0}}, "configs": {"sft": pipeline.settled(settings)}}
    run.write_json(arm.folder / "manifest.json", finished)
    done = sweeping(f"--workdir={workdir}", "--submit=print", config=file)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert any(line.startswith("done ") and line.endswith("--arm=a") for line in shown)
    index = json.loads((workdir / "index.json").read_text())["arms"]
    assert {name: entry["state"] for name, entry in index.items()} == {"a": "done", "b": "waiting"}
    assert index["a"]["result"] == {"sft": {"loss": 1.0}} and index["b"]["overrides"] == {"sft.epochs": 2}
    done = sweeping(f"--workdir={workdir}", "--submit=print", config=write(tmp_path, "{'a': {'sft.epochs': 3}}", stages))
    assert done.returncode == 1 and "a in" in done.stderr and "finished with another config of sft" in done.stderr


def test_a_sweep_beside_a_training_config_needs_no_stages(tmp_path):
    file = tmp_path / "sft" / "mine.py"
    file.parent.mkdir()
    file.write_text(
        "from configs.sft import tiny\n\n\ndef get_config():\n    return tiny.get_config()\n\n\n"
        "def sweep():\n    return {'one': {'epochs': 1}, 'two': {'epochs': 2}}\n"
    )
    done = sweeping(f"--workdir={tmp_path / 'w'}", "--dry_run", config=file)
    assert done.returncode == 0 and done.stdout.count("to run ") == 2, done.stderr
    assert "1 device(s), 2 epochs" in done.stdout
    done = sweeping(f"--workdir={tmp_path / 'w'}", "--dry_run", "--config.epochs=5", config=file)
    assert done.returncode == 1 and "write it in the file's sweep()" in done.stderr


@pytest.mark.parametrize("module", ["experiments.sweep", "tools.launch"])
def test_help_comes_with_an_example(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and f"python -m {module} --" in done.stdout, done.stderr


def test_locked_configs_of_arms_do_not_share_what_an_override_changes():
    first, second = (door.load_config("configs/sft/tiny.py") for _ in range(2))
    door.override(first, {"optim.learning_rate": 5.0})
    assert second.optim.learning_rate != 5.0 and isinstance(first.optim, ConfigDict)


# The demo's sweep at a tenth of its size, killed and resumed.

_SMALL = """
from configs.sweep import axis, demo, product


def get_config():
    c = demo.get_config()
    c.shared[0]["overrides"] = {"teachers.recorded.quotas.train_pairs": 6}
    c.after[0]["config"] = "configs/evaluate/sweep.py:dev:demo,sft"
    return c


sweep = demo.sweep
"""


@pytest.mark.proof
def test_a_sweep_of_two_by_three_goes_on_after_kills_and_ends_with_a_report(tmp_path):
    file, workdir = tmp_path / "small.py", tmp_path / "w"
    file.write_text(_SMALL)
    command = [sys.executable, "-m", "experiments.sweep", f"--config={file}", f"--workdir={workdir}"]

    def started():
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def in_step(arm: str, process) -> None:
        log = workdir / "arms" / arm / "sft" / "metrics.jsonl"
        while not log.is_file() or not log.read_text():
            assert process.poll() is None, "the sweep ended before it was killed"
            time.sleep(0.05)

    # Everything at once, as when a machine goes down, in the middle of the second arm.
    first = started()
    in_step("rate=0.001,seed=1", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    # The sweep alone: the arm that it leaves behind is waited for.
    second = started()
    in_step("rate=0.003,seed=0", second)
    second.kill()
    second.wait()
    # And a polite stop.
    third = started()
    in_step("rate=0.003,seed=1", third)
    third.terminate()
    assert third.wait() != 0

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["arms"] == told["done"] == 6 and told["verdict"]["comparisons"] == 3
    index = json.loads((workdir / "index.json").read_text())
    assert {arm["state"] for arm in index["arms"].values()} == {"done"} and index["verdict"] == told["verdict"]
    results = {name: arm["result"]["sft"]["params_sha256"] for name, arm in index["arms"].items()}
    assert len(set(results.values())) == 6
    page = (workdir / "report" / "index.html").read_text()
    assert "rate=0.001" in page and "rate=0.003" in page
    scores = json.loads((workdir / "evaluate" / "scores.json").read_text())
    assert {(row["a"], row["b"]) for row in scores["paired"]} == {
        ("rate=0.003", "rate=0.001"), ("rate=0.001", "constant"), ("rate=0.003", "constant")}  # fmt: skip
    assert all(len(row["seeds_a"]) == 3 for row in scores["paired"]) and all("p_holm" in row for row in scores["paired"])

    # The arms that were killed are those that a straight run makes.
    straight = tmp_path / "straight"
    (straight / "shared").parent.mkdir()
    for part in ("shared", "rate=0.001,seed=1", "rate=0.003,seed=1"):
        one = [*command[:-1], f"--workdir={straight}", f"--arm={part}"]
        made = subprocess.run(one, cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        if part != "shared":
            assert json.loads(made.stdout.splitlines()[-1])["last"]["params_sha256"] == results[part]
