"""Tasks run once, whatever happens; what stops them comes back as a sentence."""

import pytest

from swallow_jax.data import engines
from swallow_jax.data.engines import Engine, run_tasks

HERE = Engine(kind="here", workers=1, address="", slurm={})
RAN = []


def square(task):
    RAN.append(task["n"])
    if task["n"] == task.get("bad"):
        raise ValueError(f"{task['n']} is a bad number; take another")
    return {"square": task["n"] ** 2}


@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()


def test_results_come_in_the_order_of_the_tasks_and_a_second_call_runs_nothing(tmp_path):
    tasks = [{"n": n} for n in (3, 1, 2)]
    for _ in range(2):
        assert run_tasks(square, tasks, engine=HERE, folder=tmp_path, name="s") == [{"square": n} for n in (9, 1, 4)]
    assert RAN == [3, 1, 2]


def test_only_the_tasks_without_a_result_are_run_again(tmp_path):
    tasks = [{"n": n, "bad": 2} for n in range(4)]
    with pytest.raises(ValueError, match="2 is a bad number; take another"):
        run_tasks(square, tasks, engine=HERE, folder=tmp_path, name="s")
    assert sorted(path.name for path in (tmp_path / "s").glob("*.json")) == ["00000.json", "00001.json"]
    RAN.clear()
    found = run_tasks(square, [{"n": n} for n in range(4)], engine=HERE, folder=tmp_path, name="s")
    assert RAN == [2, 3] and found == [{"square": n**2} for n in range(4)]
    assert not list((tmp_path / "s").glob("*.error"))


def test_half_a_result_is_no_result(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/.00000.json.123.tmp").write_text('{"squ')
    assert run_tasks(square, [{"n": 5}], engine=HERE, folder=tmp_path, name="s") == [{"square": 25}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "spark"}, "engine.kind 'spark' is unknown; known are here, local, ray, slurm"),
        ({"workers": 0}, "engine.workers=0"),
        ({"kind": "slurm"}, "engine.slurm needs at least"),
    ],
)
def test_a_wrong_engine_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        Engine(**{"kind": "here", "workers": 1, "address": "", "slurm": {}} | change)


@pytest.mark.parametrize("kind", ["local", "ray", "slurm"])
def test_without_datatrove_the_extra_is_named(tmp_path, monkeypatch, kind):
    import sys

    for name in [name for name in sys.modules if name.startswith("datatrove")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    engine = Engine(kind=kind, workers=1, address="", slurm={"time": "1", "partition": "a"})
    with pytest.raises(ValueError, match=r"pip install 'swallow_jax\[data\]'"):
        run_tasks(square, [{"n": 1}], engine=engine, folder=tmp_path, name="s")


def test_the_kinds_are_those_that_are_documented():
    assert tuple(engines._ENGINES) == engines.KINDS
