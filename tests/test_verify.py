"""Parity with transformers by recorded values, and proof that the tolerance would notice each classic mistake."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import hf, llama
from tests.helpers import KINDS, write_checkpoint
from tools import verify

GOLDEN = Path(__file__).parent / "golden"  # written by tools.verify --long=640 --write_golden on helpers.write_checkpoint


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / request.param
    write_checkpoint(folder, request.param)
    params, config = hf.load(folder, dtype=jnp.float32)
    return request.param, folder, params, config, dict(np.load(GOLDEN / f"{request.param}.npz"))


def test_logits_and_inverse_frequencies_equal_transformers(checkpoint):
    _, _, params, config, golden = checkpoint
    assert verify.logit_difference(params, config, golden) < verify.TOLERANCE
    assert np.array_equal(np.asarray(llama.inverse_frequencies(config)), golden["inv_freq"])


MUTANTS = ["no scaling", "other theta", "other eps", "tiled heads", "interleaved rope"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_ten_times_past_the_tolerance(mutant, tmp_path, monkeypatch):
    config = write_checkpoint(tmp_path / "hf", "llama31")
    params, _ = hf.load(tmp_path / "hf", dtype=jnp.float32)
    if mutant == "no scaling":
        config = dataclasses.replace(config, rope_scaling=None)
    elif mutant == "other theta":
        config = dataclasses.replace(config, rope_theta=10000.0)
    elif mutant == "other eps":
        config = dataclasses.replace(config, rms_norm_eps=1e-3)
    elif mutant == "tiled heads":
        params = {**params, "layers": tiled(params["layers"], config)}
    else:
        monkeypatch.setattr(llama, "apply_rope", interleaved)
    golden = dict(np.load(GOLDEN / "llama31.npz"))
    assert verify.logit_difference(params, config, golden) > 10 * verify.TOLERANCE


def tiled(layers, config):
    """Query head n reads key-value head n % K instead of n // G: the same as permuting the query heads."""
    order = np.arange(config.num_heads).reshape(-1, config.num_kv_heads).T.reshape(-1)
    q = layers["q"].reshape(config.num_layers, config.num_heads, config.head_dim, config.hidden_size)
    o = layers["o"].reshape(config.num_layers, config.hidden_size, config.num_heads, config.head_dim)
    return {**layers, "q": q[:, order].reshape(layers["q"].shape), "o": o[:, :, order].reshape(layers["o"].shape)}


def interleaved(x, cos, sin):
    """RoPE over neighbouring dimensions, as in Meta's original files."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def test_the_command_prints_json_and_refuses_a_damaged_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "hf", "llama32_tied")
    command = [sys.executable, "-m", "tools.verify", f"--hf={tmp_path / 'hf'}", f"--golden={GOLDEN / 'llama32_tied.npz'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["round_trip_bitwise"] and result["inv_freq_equal"] and result["max_rel_logit_diff"] < 1e-4
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["factor"] = 8.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "does not compute what transformers computes" in done.stderr
