"""Adapters: what they compute, what they train, what a checkpoint holds, and peft's files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file, save_file

from experiments import door, sft
from swallow_jax import checkpoint, hf, llama, lora, mesh, optim, train
from tests.helpers import FLOAT32, LLAMA31, QWEN3, model_logits, random_params
from tests.test_train import OPTIM, TRAIN, make_batch
from tools import export

SMALL = dataclasses.replace(LLAMA31, num_layers=2, vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8)
LORA = lora.LoraConfig(rank=4, alpha=6.0, targets=("q", "v", "down"))
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


def random_adapter(config=SMALL, settings=LORA, seed=0):
    """An adapter as training leaves it: no zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), lora.init(config, settings, jax.random.key(0))
    )


def test_an_untrained_adapter_changes_no_bit():
    params = random_params(SMALL)
    attached = lora.attach(params, lora.init(SMALL, LORA, jax.random.key(0)), LORA)
    assert np.array_equal(model_logits(attached, SMALL, TOKENS), model_logits(params, SMALL, TOKENS))


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(QWEN3, vocab_size=64)], ids=["llama", "qwen3"])
def test_attached_and_merged_compute_the_same_and_not_what_the_base_does(config):
    every = dataclasses.replace(LORA, targets=lora.TARGETS)
    params, adapter = random_params(config), random_adapter(config, every)
    merged = model_logits(lora.merge(params, adapter, every), config, TOKENS)
    attached = model_logits(lora.attach(params, adapter, every), config, TOKENS)
    unrolled = model_logits(llama.unstack_layers(lora.attach(params, adapter, every)), config, TOKENS)
    np.testing.assert_allclose(attached, merged, atol=2e-5)
    np.testing.assert_allclose(unrolled, merged, atol=2e-5)
    assert np.abs(merged - model_logits(params, config, TOKENS)).max() > 0.1


def test_the_adapters_gradient_is_the_weights_gradient_seen_through_it():
    """dB = s dW Aᵀ and dA = s Bᵀ dW, with s = alpha / rank = 1.5."""
    params, adapter, batch = random_params(SMALL), random_adapter(), make_batch(0)

    def loss(params):
        total, weight = train.loss_sums(params, SMALL, FLOAT32, TRAIN, batch)
        return total / weight

    whole = jax.jit(jax.grad(lambda p: loss(lora.merge(p, adapter, LORA))))(params)["layers"]
    got = jax.jit(jax.grad(lambda a: loss(lora.attach(params, a, LORA))))(adapter)["layers"]
    for target in LORA.targets:
        a, b = adapter["layers"][target]["a"], adapter["layers"][target]["b"]
        wanted = {
            "a": 1.5 * jnp.einsum("LOR,LOI->LRI", b, whole[target]),
            "b": 1.5 * jnp.einsum("LOI,LRI->LOR", whole[target], a),
        }
        for half, value in wanted.items():
            np.testing.assert_allclose(got[target][half], value, atol=1e-6, err_msg=f"{target}.{half}")


def test_moments_exist_for_adapters_alone_and_lie_where_they_lie():
    optimizer = optim.make_optimizer(OPTIM, 8)
    adapter = jax.eval_shape(lambda: lora.init(SMALL, LORA, jax.random.key(0)))
    devices = AbstractMesh((1, 2, 2, 1), mesh.AXES, axis_types=(AxisType.Auto,) * 4)
    placed = jax.tree.map(
        lambda s, names: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=mesh.sharding(devices, names)),
        adapter,
        lora.axes(SMALL, LORA),
    )
    abstract = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), placed)
    places = train.state_placements(abstract, placed, optimizer, devices)
    assert jax.tree.structure(places) == jax.tree.structure(abstract)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract["opt_state"]) if leaf.ndim]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapter))
    pair = places["params"]["layers"]["down"]  # [L, R, F] and [L, D, R]: F over tensor, D over fsdp
    assert (*pair["a"].spec,) == (None, None, "tensor") and (*pair["b"].spec,)[:2] == (None, "fsdp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"targets": ("q", "embed")}, "some of q, k, v, o, gate, up, down"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("q", "q")}, "each once"),
    ],
)
def test_a_config_that_adapts_nothing_known_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LORA, **change)


# Files.


def test_peft_files_come_back_bit_for_bit(tmp_path):
    adapter = random_adapter()
    lora.save(tmp_path / "a", adapter, LORA, base="base")
    read, settings = lora.load(tmp_path / "a", SMALL)
    assert settings == LORA and lora.adapter_sha256(read) == lora.adapter_sha256(adapter)
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert names["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 4)
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"]) == (4, 6.0, ["q_proj", "v_proj", "down_proj"])
    with pytest.raises(FileExistsError, match="exists"):
        lora.save(tmp_path / "a", adapter, LORA, base="base")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("settings", "damage", "message"),
    [
        ({"use_dora": True}, None, "use_dora is True; only False"),
        ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern is {'q_proj': 8}"),
        ({"lora_alpha": None}, None, "missing lora_alpha"),
        ({}, lambda t: t.pop(Q), f"{Q} is missing"),
        ({}, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q]}), "lm_head.lora_A.weight is unknown"),
        ({}, lambda t: t.update({Q: np.ascontiguousarray(t[Q][:, :2])}), r"has shape \(32, 2\), \(32, 4\) is wanted"),
    ],
)
def test_what_is_not_computed_and_what_is_damaged_is_refused_by_name(settings, damage, message, tmp_path):
    lora.save(tmp_path / "a", random_adapter(), LORA, base="base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if damage:
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        damage(tensors)
        save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        lora.load(tmp_path / "a", SMALL)


# Runs.


def lora_config(folder):
    """configs/sft/lora_tiny.py, with the base copied so that a test may damage it."""
    import shutil

    if not (folder / "base").exists():
        shutil.copytree("configs/base", folder / "base")
    config = door.load_config("configs/sft/lora_tiny.py")
    config.init = str(folder / "base")
    config.epochs = 6
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    config = lora_config(folder)
    return config, folder / "run", sft.main(config, folder / "run")


def test_a_lora_run_learns_keeps_the_base_and_saves_adapters_alone(finished):
    config, folder, result = finished
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1
    params, shape = hf.load(config.init)
    saved = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    assert saved < 4 * llama.parameter_count(shape)[0]  # less than one copy of the base in float32
    adapter, settings, base = checkpoint.open_adapter(folder, which="last")
    assert (settings.rank, base) == (8, config.init) and lora.adapter_sha256(adapter) == result["params_sha256"]
    opened, _ = checkpoint.open_model(folder, which="last")
    assert np.array_equal(opened["embed"], params["embed"].astype(jnp.float32))
    assert not np.array_equal(opened["layers"]["q"], params["layers"]["q"].astype(jnp.float32))


def test_a_lora_run_that_was_stopped_ends_like_the_straight_one(finished, tmp_path, monkeypatch):
    config, _, result = finished
    real, steps = train.heldout_loss, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "heldout_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sft.main(config, tmp_path / "run")
    monkeypatch.setattr(train, "heldout_loss", real)
    assert checkpoint.Checkpoints(tmp_path / "run", checkpoint.CheckpointConfig(**config.checkpoint)).latest_step() == 2
    with pytest.raises(ValueError, match=f"is half trained: step 2 of {result['steps']}"):
        checkpoint.open_model(tmp_path / "run")
    checkpoint.open_model(tmp_path / "run", unfinished=True)
    assert sft.main(config, tmp_path / "run")["params_sha256"] == result["params_sha256"]


def test_exports_merged_and_as_an_adapter_compute_the_same(finished, tmp_path):
    _, folder, _ = finished
    export.export(str(folder), str(tmp_path / "merged"), dtype="float32", which="last")
    export.export_adapter(str(folder), str(tmp_path / "adapter"), which="last")
    merged, _ = hf.load(tmp_path / "merged")
    for other in (folder, tmp_path / "adapter"):  # the run, and peft's files beside the base they name
        params, _ = checkpoint.open_model(other, which="last")
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), params, merged)
    assert checkpoint.model_folder(tmp_path / "adapter") == checkpoint.model_folder(finished[0].init)
    with pytest.raises(ValueError, match="is no run with a `lora` section"):
        export.export_adapter(str(tmp_path / "merged"), str(tmp_path / "x"), which="last")


def test_an_adapter_refuses_a_base_that_has_changed(finished):
    config, folder, _ = finished
    file = door.Path(config.init) / "generation_config.json"
    before = file.read_text()
    file.write_text(before + "\n")
    with pytest.raises(ValueError, match="has changed since; bring back the model"):
        checkpoint.open_model(folder)
    file.write_text(before)


def test_adapters_need_a_model_and_a_whole_one(finished, tmp_path):
    config, folder, _ = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    stopped = {k: v for k, v in manifest.items() if k != "result"} | {"steps": manifest["steps"] + 1}
    (folder / "manifest.json").write_text(json.dumps(stopped))
    config = config.copy_and_resolve_references()
    config.init = str(folder)
    with pytest.raises(ValueError, match="is half trained: step 6 of 7; .*init_unfinished=True"):
        sft.main(config, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    (folder / "manifest.json").write_text(json.dumps(manifest))
