"""Weights laid out for decoding give the products of the weights they came from; int8 ones within their rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import llama, lora, quant
from swallow_jax.generate import steps
from tests.helpers import FLOAT32, LLAMA31, LLAMA32_TIED, model_logits, random_params


def weights(*rows, inputs=48, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((n, inputs)), jnp.float32) for n in rows]


@pytest.mark.parametrize("cpu", [True, False])
def test_joined_products_are_those_of_the_parts(cpu):
    parts = weights(64, 16, 32)
    x_BTI = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 48)), jnp.float32)
    products = quant.matrix(parts, dtype=jnp.float32, int8=False, cpu=cpu).split_product(x_BTI)
    for part, product in zip(parts, products, strict=True):
        np.testing.assert_allclose(product, jnp.einsum("BTI,OI->BTO", x_BTI, part), atol=1e-5)


@pytest.mark.parametrize("int8", [True, False])
def test_a_row_has_the_same_bits_in_any_company(int8):
    made = quant.matrix(weights(96, 32, inputs=512), dtype=jnp.float32, int8=int8, cpu=True)
    x_XI = jnp.asarray(np.random.default_rng(2).standard_normal((64, 512)), jnp.float32)
    product = jax.jit(lambda x_XI: made(x_XI[:, None])[:, 0], compiler_options=steps.compiler_options())
    whole = np.asarray(product(x_XI))
    for rows in (2, 3, 7, 16, 17, 31, 32):
        assert np.array_equal(product(x_XI[:rows]), whole[:rows]), rows
    assert np.array_equal(product(x_XI[::-1]), whole[::-1])


def test_int8_rounds_each_channel_to_half_a_step_of_its_own():
    (weight,) = weights(6)
    weight = weight * jnp.asarray([1e-6, 1.0, 30.0, 1e4, 0.0, 0.1])[:, None]
    values, scale = quant.quantise(weight)
    assert values.dtype == jnp.int8 and scale.shape == (6,)
    assert np.all(np.abs(values * scale[:, None] - weight) <= scale[:, None] * 0.5001)
    assert np.all(np.abs(values).max(axis=1)[[0, 1, 2, 3, 5]] == 127)
    assert not np.any(values[4]) and np.all(np.isfinite(scale))


@pytest.mark.parametrize("cpu", [True, False])
def test_int8_products_are_those_of_the_rounded_weights(cpu):
    (weight,) = weights(1024, inputs=1024)  # several blocks on a CPU
    made = quant.matrix([weight], dtype=jnp.float32, int8=True, cpu=cpu)
    x_XI = jnp.asarray(np.random.default_rng(3).standard_normal((4, 1024)), jnp.float32)
    np.testing.assert_allclose(made(x_XI), x_XI @ (made.values * made.scale[:, None]).T, rtol=1e-4, atol=1e-3)


def test_int8_weights_are_never_converted_whole():
    made = quant.matrix(weights(4096, inputs=1024), dtype=jnp.bfloat16, int8=True, cpu=True)
    x_XI = jnp.ones((2, 1024), jnp.bfloat16)
    memory = jax.jit(lambda made, x: made(x)).lower(made, x_XI).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.01 * 4096 * 1024 + 4 * 4096 + x_XI.nbytes
    assert memory.temp_size_in_bytes < 4096 * 1024 / 2  # in bfloat16 it would be 2 x 4096 x 1024


@pytest.mark.parametrize("config", [LLAMA31, LLAMA32_TIED], ids=["untied", "tied"])
def test_the_decode_form_computes_the_same_model(config):
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 24))
    form = steps.decode_form(params, "float32")
    assert steps.decode_form(form, "float32") is form
    plain = model_logits(params, config, tokens)
    np.testing.assert_allclose(model_logits(form, config, tokens), plain, atol=2e-5)
    compute = dataclasses.replace(FLOAT32, dtype="bfloat16")
    half = model_logits(steps.decode_form(params, "bfloat16"), config, tokens, compute)
    np.testing.assert_allclose(half, model_logits(params, config, tokens, compute), atol=0.15)
    # int8 changes the mean log-likelihood a little, and is not the same model.
    int8 = model_logits(steps.decode_form(params, "float32", int8=True), config, tokens)
    likelihoods = [np.mean(np.asarray(jax.nn.log_softmax(x))[:, np.arange(23), tokens[0, 1:]]) for x in (plain, int8)]
    assert 0 < abs(likelihoods[0] - likelihoods[1]) < 0.02 * abs(likelihoods[0])


def test_an_adapter_must_be_merged_before_decoding():
    params = random_params(LLAMA31)
    config = lora.LoraConfig(rank=2, alpha=4.0, targets=("q",))
    adapted = lora.attach(params, lora.init(LLAMA31, config, jax.random.key(0)), config)
    with pytest.raises(ValueError, match="merge it"):
        steps.decode_form(adapted, "float32")


def test_a_layer_of_the_decode_form_is_read_by_the_block_that_trains():
    form = steps.decode_form(random_params(LLAMA31), "float32")
    assert isinstance(form["layers"][0]["q"], quant.Matrix) and isinstance(form["layers"][0]["k"], quant.Joined)
    cache = llama.init_cache(LLAMA31, 2, 8, jnp.float32)
    hidden, _ = llama.forward(form, LLAMA31, FLOAT32, jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32), cache=cache)
    assert hidden.shape == (2, 1, 64)
