"""The model: cache, scan, remat, isolation and RoPE agree with their other ways of being computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import attention, hf, llama
from tests.helpers import FLOAT32, KINDS, LLAMA2, LLAMA31, LLAMA32_TIED, MQA, QWEN3, model_logits, random_params

TOKENS = np.random.default_rng(0).integers(0, 512, (2, 24))


@pytest.mark.parametrize("config", [LLAMA31, LLAMA32_TIED, MQA, QWEN3], ids=["llama31", "tied", "mqa", "qwen3"])
def test_cached_decode_equals_full_forward(config):
    params = llama.unstack_layers(random_params(config))
    whole = model_logits(params, config, TOKENS)
    cache = llama.init_cache(config, 2, 32, jnp.float32)
    pieces = []
    for first, last in [(0, 9), (9, 10), (10, 11), (11, 24)]:  # prefill, two single steps, a chunk
        positions = jnp.broadcast_to(jnp.arange(first, last), (2, last - first))
        hidden, cache = llama.forward(params, config, FLOAT32, jnp.asarray(TOKENS[:, first:last]), positions, cache=cache)
        pieces.append(llama.logits(params, config, hidden))
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=2e-5)


def test_right_padding_in_a_prefill_does_not_reach_later_steps():
    params = llama.unstack_layers(random_params(LLAMA31))
    whole = model_logits(params, LLAMA31, TOKENS[:1, :6])
    cache = llama.init_cache(LLAMA31, 1, 16, jnp.float32)
    padded = np.concatenate([TOKENS[:1, :5], [[7, 7, 7]]], 1)
    positions = jnp.arange(8)[None]
    _, cache = llama.forward(params, LLAMA31, FLOAT32, jnp.asarray(padded), positions, cache=cache)
    hidden, _ = llama.forward(params, LLAMA31, FLOAT32, jnp.asarray(TOKENS[:1, 5:6]), jnp.full((1, 1), 5), cache=cache)
    np.testing.assert_allclose(llama.logits(params, LLAMA31, hidden), whole[:, 5:], atol=2e-5)


def square_loss(params, compute):
    positions = jnp.broadcast_to(jnp.arange(24), TOKENS.shape)
    hidden, _ = llama.forward(params, LLAMA31, compute, jnp.asarray(TOKENS), positions)
    return jnp.square(llama.logits(params, LLAMA31, hidden)).mean()


GRADIENT = jax.jit(jax.grad(square_loss), static_argnums=1)
REMATS = ["none", "dots", "attention", "full", "q,k,v,gate,up"]


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("scan", [True, False])
def test_scan_and_remat_change_neither_logits_nor_gradients(scan, remat):
    """Largest gradient 0.3: a float32 sum in another order moves it by its last bits."""
    params = random_params(LLAMA31)
    wanted = GRADIENT(params, FLOAT32)
    got = GRADIENT(params, dataclasses.replace(FLOAT32, scan_layers=scan, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)


def test_remat_computes_again_what_its_name_says():
    """Matrix products in the gradient of an unrolled model, three layers: nothing is forgotten to be switched on."""

    def products(remat):
        compute = dataclasses.replace(FLOAT32, scan_layers=False, remat=remat)
        return dots(jax.make_jaxpr(jax.grad(lambda p: square_loss(p, compute)))(random_params(LLAMA31)).jaxpr)

    def dots(program):
        inner = jax.tree.leaves([list(step.params.values()) for step in program.eqns], is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [getattr(x, "jaxpr", x) for x in inner]
        return sum(step.primitive.name == "dot_general" for step in program.eqns) + sum(
            dots(x) for x in inner if hasattr(x, "eqns")
        )

    count = {remat: products(remat) for remat in [*REMATS, "q", "gate"]}
    # Per layer: seven weights; the two of attention are computed again in any case (attention.py).
    assert count["full"] == count["none"] + 3 * (7 + 2 - 1)  # the last product of a layer is never needed again
    assert count["q"] == count["gate"] == count["full"] - 3
    assert count["none"] <= count["dots"] < count["attention"] < count["full"]


def test_an_unknown_remat_policy_is_refused():
    for policy in ("some", "q,w", ""):
        with pytest.raises(ValueError, match=f"unknown remat policy '{policy}'; known: none, dots, attention, full, or some of"):
            square_loss(random_params(LLAMA31), dataclasses.replace(FLOAT32, remat=policy))


def test_packed_documents_equal_documents_alone():
    params = random_params(LLAMA31)
    segments = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4])
    positions = jnp.asarray([[*range(9), *range(11), *[0] * 4]])
    packed = model_logits(params, LLAMA31, TOKENS[:1], segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :9], model_logits(params, LLAMA31, TOKENS[:1, :9]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 9:20], model_logits(params, LLAMA31, TOKENS[:1, 9:20]), atol=2e-5)


def test_another_document_changes_no_bit_and_has_no_gradient():
    params = random_params(LLAMA31)
    segments = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4])
    positions = jnp.asarray([[*range(9), *range(11), *[0] * 4]])
    other = TOKENS[:1].copy()
    other[:, :9] = 511 - other[:, :9]
    one, two = (model_logits(params, LLAMA31, t, segments=segments, positions=positions) for t in (TOKENS[:1], other))
    assert np.array_equal(one[:, 9:20], two[:, 9:20])
    assert not np.array_equal(one[:, :9], two[:, :9])

    def second_document_loss(embedded):
        tokens = jnp.arange(24)[None]  # token i reads row i of the embedding, so rows are tokens of the row
        hidden, _ = llama.forward({**params, "embed": embedded}, LLAMA31, FLOAT32, tokens, positions, segments_BT=segments)
        return jnp.sum(jnp.square(hidden[:, 9:20]))

    grads = jax.jit(jax.grad(second_document_loss))(params["embed"][:24])
    assert np.all(np.asarray(grads[:9]) == 0) and np.all(np.asarray(grads[20:]) == 0)
    assert np.all(np.abs(grads[9:20]).max(axis=1) > 0)


def test_padding_rows_stay_finite():
    params = random_params(LLAMA31)
    zeros = jnp.zeros((1, 8), jnp.int32)
    assert np.isfinite(model_logits(params, LLAMA31, zeros, segments=zeros, positions=zeros)).all()


@pytest.mark.parametrize("backend", ["xla", "rows"])
def test_backends_and_block_sizes_give_the_same_result_and_isolate(backend, monkeypatch):
    params = random_params(LLAMA31)
    segments = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4] * 2)
    positions = jnp.asarray([[*range(9), *range(11), *[0] * 4]] * 2)
    whole = model_logits(params, LLAMA31, TOKENS, segments=segments, positions=positions)
    monkeypatch.setitem(attention._BLOCKS, backend, 10)  # 24 positions: two whole blocks and a shorter one
    jax.clear_caches()
    compute = dataclasses.replace(FLOAT32, attention=backend)
    got = model_logits(params, LLAMA31, TOKENS, compute, segments=segments, positions=positions)
    np.testing.assert_allclose(got, whole, atol=2e-5)
    other = TOKENS.copy()
    other[:, :9] = 511 - other[:, :9]
    moved = model_logits(params, LLAMA31, other, compute, segments=segments, positions=positions)
    assert np.array_equal(moved[:, 9:20], got[:, 9:20]) and not np.array_equal(moved[:, :9], got[:, :9])


def test_rope_scaling_blends_between_the_two_wavelengths():
    """Llama 3.1's numbers: wavelengths under 2048 stay, over 8192 are stretched by 8, between is between."""
    scaled = np.asarray(llama.inverse_frequencies(dataclasses.replace(LLAMA31, head_dim=128)))
    plain = np.asarray(llama.inverse_frequencies(dataclasses.replace(LLAMA31, head_dim=128, rope_scaling=None)))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-7)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any() and np.all(scaled[middle] < plain[middle]) and np.all(scaled[middle] > plain[middle] / 8)


def test_parameter_counts_and_flops_are_the_published_ones():
    """Llama 3.1 8B: 8,030,261,248 parameters; 51.47 GFLOP a token at 8,192 tokens, attention counted causally."""
    eight = dataclasses.replace(
        LLAMA31,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    )
    assert llama.parameter_count(eight) == (8_030_261_248, 7_504_924_672)
    assert llama.train_flops_per_token(eight, 8192) == pytest.approx(51.47e9, rel=1e-3)


def test_bfloat16_stays_close_to_float32():
    params = random_params(LLAMA31)
    exact = model_logits(params, LLAMA31, TOKENS)
    rough = model_logits(params, LLAMA31, TOKENS, dataclasses.replace(FLOAT32, dtype="bfloat16"))
    assert np.abs(rough - exact).max() / exact.std() < 0.1  # bf16 keeps 8 bits: 2**-8 a layer, three layers


# Families.


@pytest.mark.parametrize("kind", KINDS)
def test_a_familys_config_comes_back(kind):
    raw = hf.config_json(KINDS[kind], "bfloat16")
    assert hf.parse_config(raw, "config.json") == KINDS[kind]
    wanted = ("qwen3", ["Qwen3ForCausalLM"]) if kind == "qwen3" else ("llama", ["LlamaForCausalLM"])
    assert (raw["model_type"], raw["architectures"]) == wanted


def test_llama_2s_older_config_means_theta_10000():
    """As meta-llama/Llama-2-7b-hf has it: no rope_theta, no head_dim; 10000 is what transformers fills in."""
    raw = hf.config_json(LLAMA2, "float16")
    for newer in ("rope_theta", "rope_parameters", "head_dim", "attention_bias", "mlp_bias"):
        del raw[newer]
    assert hf.parse_config(raw, "config.json") == LLAMA2
    for change in ({"head_dim": 16}, {"rope_scaling": {"rope_type": "llama3"}}, {"model_type": "qwen3", "head_dim": 16}):
        with pytest.raises(ValueError, match="neither rope_parameters nor rope_theta"):
            hf.parse_config({**raw, **change}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": None}, "missing head_dim"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; known: llama, qwen3"),
    ],
)
def test_what_is_not_qwen3_dense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hf.parse_config({**hf.config_json(QWEN3, "bfloat16"), **change}, "config.json")


def test_qwen3_counts_its_norms():
    """Qwen3-8B: 8,190,735,360 parameters (transformers' count of the published config)."""
    eight = dataclasses.replace(
        QWEN3, vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8
    )
    assert llama.parameter_count(eight)[0] == 8_190_735_360
