"""Run folders: whole or absent, never mixed, and told apart by what went in."""

import dataclasses
import json

import numpy as np
import pytest

from swallow_jax import run


def test_a_file_is_whole_or_absent(tmp_path):
    run.write_json(tmp_path / "a.json", {"語": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"語": 1}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        run.write_json(tmp_path / "b.json", {"x": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not JSON"):
        run.read_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a JSON object is wanted, this is list"):
        run.read_jsonl(tmp_path / "a.jsonl")


def test_a_folder_with_another_config_or_input_is_refused(tmp_path):
    (tmp_path / "data").write_text("one")
    open_it = lambda config: run.open_run(tmp_path / "run", config, inputs={"data": tmp_path / "data"})  # noqa: E731
    job = open_it({"a": {"b": 1}})
    assert not job.finished
    job.finish({"loss": np.float32(1.5)})
    assert open_it({"a": {"b": 1}}).result == {"loss": 1.5}
    with pytest.raises(ValueError, match=r"holds another config \(config.a.b: 1 there, 2 now\)"):
        open_it({"a": {"b": 2}})
    with pytest.raises(ValueError, match=r"config.c is only in the new one"):
        open_it({"a": {"b": 1}, "c": 0})
    (tmp_path / "data").write_text("two")
    with pytest.raises(ValueError, match="made from another data"):
        open_it({"a": {"b": 1}})


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no manifest"):
        run.open_run(tmp_path, {}, inputs={})


def test_metrics_after_the_restored_step_are_cut_away(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics = run.Metrics(file, from_step=2)
    metrics.write(3, loss=0.5)
    metrics.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    name: str
    inner: Inner
    dtype: str | None


def test_config_sections_become_dataclasses_and_errors_name_the_field():
    good = {"rate": 1, "name": "x", "inner": {"size": 2}, "dtype": None}
    assert run.build(Outer, good, "c") == Outer(rate=1.0, name="x", inner=Inner(size=2), dtype=None)
    for change, message in [
        ({"rate": "fast"}, r"c.rate: 'fast' is str, float is wanted"),
        ({"rate": True}, r"c.rate: True is bool"),
        ({"inner": {"size": 2.5}}, r"c.inner.size: 2.5 is float, int is wanted"),
        ({"inner": {}}, r"c.inner: missing field size"),
        ({"colour": 1}, r"c: unknown field colour; known: rate, name, inner, dtype"),
        ({"dtype": 3}, r"c.dtype: 3 is int, str or NoneType is wanted"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.build(Outer, good | change, "c")


def test_a_start_killed_between_its_first_two_files_goes_on(tmp_path):
    run.write_json(tmp_path / "run" / "config.json", {"a": 1})
    with pytest.raises(ValueError, match=r"holds another config \(config.a: 1 there, 2 now\)"):
        run.open_run(tmp_path / "run", {"a": 2}, inputs={})
    assert not run.open_run(tmp_path / "run", {"a": 1}, inputs={}).finished
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no manifest"):
        run.open_run(tmp_path / "model", {}, inputs={})


def test_a_parent_that_was_made_again_is_noticed(tmp_path):
    run.open_run(tmp_path / "base", {"seed": 0}, inputs={}).finish({"loss": 1})
    open_it = lambda: run.open_run(tmp_path / "run", {}, inputs={}, parents=[tmp_path / "base"])  # noqa: E731
    open_it().finish({})
    assert open_it().finished
    run.open_run(tmp_path / "base", {"seed": 0}, inputs={}).finish({"loss": 2})
    with pytest.raises(ValueError, match="was made from another .*base"):
        open_it()


def test_line_numbers_count_blank_lines_and_bad_bytes_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n\n{"a": "\xff"}\n')
    rows = run.numbered_jsonl(tmp_path / "a.jsonl")
    assert next(rows) == (2, {"a": 1})
    with pytest.raises(ValueError, match=r"a\.jsonl:4: not JSON \(not UTF-8\)"):
        next(rows)


def test_licences_travel_from_parent_to_child(tmp_path):
    (tmp_path / "text").write_text("x")
    first = run.open_run(tmp_path / "a", {}, inputs={"text": tmp_path / "text"})
    first.note(licences=["GPL-2.0-or-later"])
    first.finish({})
    child = run.open_run(tmp_path / "b", {}, inputs={}, parents=[tmp_path / "a"])
    assert child.manifest["licences"] == ["GPL-2.0-or-later"]
