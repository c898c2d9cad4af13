"""Parity with transformers by recorded values, and proof that the tolerance would notice each classic mistake."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import hf, llama, text
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
    kind, _, params, config, golden = checkpoint
    assert verify.logit_difference(params, config, golden) < verify.TOLERANCE
    ours = np.asarray(llama.inverse_frequencies(config))
    if kind == "qwen3":  # torch's own two answers: see test_verify_live.py
        np.testing.assert_array_max_ulp(ours, golden["inv_freq"], 1)
    else:
        assert np.array_equal(ours, golden["inv_freq"])


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


@pytest.mark.parametrize("mutant", ["no q/k norms", "q and k norms swapped", "head size from hidden size"])
def test_every_mutant_of_qwen3_is_ten_times_past_the_tolerance(mutant, tmp_path, monkeypatch):
    config = write_checkpoint(tmp_path / "hf", "qwen3")
    params, _ = hf.load(tmp_path / "hf", dtype=jnp.float32)
    layers = params["layers"]
    if mutant == "no q/k norms":
        kept = {name: leaf for name, leaf in layers.items() if name not in ("q_norm", "k_norm")}
        config, params = dataclasses.replace(config, qk_norm=False), {**params, "layers": kept}
    elif mutant == "q and k norms swapped":
        params = {**params, "layers": {**layers, "q_norm": layers["k_norm"], "k_norm": layers["q_norm"]}}
    else:  # the frequencies of heads of 16, on heads of 128
        real, narrow = llama.inverse_frequencies, dataclasses.replace(config, head_dim=16)
        monkeypatch.setattr(llama, "inverse_frequencies", lambda _: jnp.repeat(real(narrow), 8))
    golden = dict(np.load(GOLDEN / "qwen3.npz"))
    assert verify.logit_difference(params, config, golden) > 10 * verify.TOLERANCE


def test_divergence_and_perplexity_are_their_formulas():
    exact, rough = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    wanted = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert verify.divergence(exact, rough) == pytest.approx(wanted, rel=1e-5)
    # Two windows: 2 and 1 predicted tokens, of probability 1/2, 1/4 and 1/8.
    steps = {3: np.log([[0.5, 0.5], [0.75, 0.25], [1.0, 1e-9]]), 2: np.log([[0.125, 0.875], [1.0, 1e-9]])}
    windows = [np.array([0, 1, 1]), np.array([0, 0])]
    assert verify.perplexity(lambda ids: steps[len(ids)], windows) == pytest.approx((2 * 4 * 8) ** (1 / 3), rel=1e-5)


def test_numbers_that_differ_are_named(checkpoint):
    kind, _, params, config, golden = checkpoint
    checks = verify.Checks()
    checks.numbers(params, config, golden, [])
    assert not checks.failed and checks.values["tied"] == (kind == "llama32_tied")
    other = {"tied": not golden["tied"], "bf16_kl": golden["bf16_kl"] / 10, "inv_freq": golden["inv_freq"] * 1.001}
    checks.numbers(params, config, {**golden, **other}, [])
    assert [failure.split()[0] for failure in checks.failed] == ["inv_freq_ulps", "tied", "bf16_kl"]
    assert "FAILS  inv_freq_ulps" in checks.table()


def test_words_that_differ_are_named(tmp_path):
    """What transformers said of configs/base is played by our own tokenizer, then changed in one place each."""
    tokenizer = text.load_tokenizer("configs/base")
    encoded = [tokenizer.encode(t) for t in verify.TEXTS]
    theirs = {
        "encoded": encoded,
        "decoded": [tokenizer.decode(ids, skip_special=False) for ids in encoded],
        "chats": [verify._render(tokenizer, chat, prompt) for chat in verify.CHATS for prompt in (False, True)],
        "eos_ids": list(tokenizer.eos_ids),
        "bos_id": tokenizer.bos_id,
    }

    def failures(**change):
        checks = verify.Checks()
        checks.words(tokenizer, {"words": np.asarray(json.dumps({**theirs, **change}))})
        return checks.failed

    assert failures() == []
    assert "解約返戻金" in failures(encoded=[[1, 2], *encoded[1:]])[0]
    assert failures(decoded=["x", *theirs["decoded"][1:]])[0].startswith("tokenizer")
    assert (
        "chat_template is differs on ['system', 'user']" in failures(chats=[*theirs["chats"][:3], [7], *theirs["chats"][4:]])[0]
    )
    assert failures(eos_ids=[*tokenizer.eos_ids, 9])[0].startswith("generation_config")
    assert failures(bos_id=5)[0].startswith("generation_config")


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
