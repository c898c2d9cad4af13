"""The training benchmark runs, prints one JSON object, and compares the same losses."""

import json

import numpy as np
import pytest

from tools.bench import train


def bench(capsys, *flags):
    code = train.main(["--case=tiny", "--rounds=1", *flags])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_measures_our_step_alone(capsys):
    code, result = bench(capsys, "--peer=none")
    assert code == 0 and result["ours_tok_s"] > 0 and "ratio" not in result


def test_the_first_hopper_case_finds_what_must_be_exact():
    """The same checks at toy size; `rows` stands where a GPU's kernel will."""
    case = train.dataclasses.replace(train.CASES["tiny"], dtype="bfloat16", scan=True)
    result = train.correct(case, ["xla", "rows"])
    assert "error" not in result and result["rows_bfloat16"]["isolated"] and max(result["accumulation"].values()) < 1e-5


def test_a_leak_is_an_error(monkeypatch):
    from swallow_jax import llama

    real = llama.forward
    monkeypatch.setattr(llama, "forward", lambda *args, **kinds: real(*args, **kinds | {"segments_BT": None}))
    case = train.dataclasses.replace(train.CASES["tiny"], scan=True)
    result = train.correct(case, ["xla"])
    assert result["error"] == "a number that must be right is not" and not result["xla_float32"]["isolated"]


@pytest.mark.live
def test_transformers_has_the_same_losses(capsys, monkeypatch):
    code, result = bench(capsys)
    assert code == 0 and result["loss_gap"] <= 1e-4 and result["ratio"] > 0 and result["ratio_cpu"] > 0
    real = train.transformers_peer

    def backwards(case, params):
        peer = real(case, params)
        return lambda tokens: peer(np.flip(tokens, 1).copy())

    monkeypatch.setattr(train, "transformers_peer", backwards)
    code, result = bench(capsys)
    assert code == 1 and "losses differ" in result["error"]
