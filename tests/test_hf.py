"""Weights at the border: bit-exact round trips, both RoPE schemas, and refusals that name the culprit."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from swallow_jax import hf, placing, weights
from tests.helpers import KINDS, LLAMA31, LLAMA32_TIED, random_params, write_checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, tmp_path):
    config = write_checkpoint(tmp_path / "a", kind)
    params, read = hf.load(tmp_path / "a")
    assert read == config
    hf.save(tmp_path / "b", params, read, dtype="source", source_folder=tmp_path / "a")
    before, after = hf.open_tensors(tmp_path / "a"), hf.open_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, reader in before.items():
        assert reader().dtype == after[name]().dtype
        assert np.array_equal(hf._bits(reader()), hf._bits(after[name]()))


def test_mixed_dtypes_in_one_file_come_back_as_they_were(tmp_path):
    write_checkpoint(tmp_path / "a", "mqa")
    file = tmp_path / "a" / "model.safetensors"
    tensors = {name: np.array(reader()) for name, reader in hf.read_safetensors(file).items()}
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors["model.layers.1.self_attn.q_proj.weight"].astype(np.float16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    write_safetensors(file, tensors)
    params, config = hf.load(tmp_path / "a")
    hf.save(tmp_path / "b", params, config, dtype="source", source_folder=tmp_path / "a")
    for name, reader in hf.open_tensors(tmp_path / "b").items():
        assert reader().dtype == tensors[name].dtype
        assert np.array_equal(hf._bits(reader()), hf._bits(tensors[name])), name


def test_both_rope_schemas_read_the_same(tmp_path):
    raw = hf.config_json(LLAMA31, "bfloat16")
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    assert hf.parse_config(new, "new") == hf.parse_config(old, "old") == LLAMA31


def test_a_sharded_load_places_what_a_plain_load_reads(tmp_path):
    write_checkpoint(tmp_path / "a", "llama31")
    mesh = jax.make_mesh((1, 1, 1, 1), ("replica", "fsdp", "tensor", "context"))
    placed, _ = hf.load(tmp_path / "a", dtype=jnp.float32, mesh=mesh)
    plain, _ = hf.load(tmp_path / "a", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)


def test_a_tied_model_writes_no_head_and_accepts_an_equal_one(tmp_path):
    write_checkpoint(tmp_path / "a", "llama32_tied")
    file = tmp_path / "a" / "model.safetensors"
    tensors = {name: np.array(reader()) for name, reader in hf.read_safetensors(file).items()}
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(file, tensors)
    hf.load(tmp_path / "a")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_safetensors(file, tensors)
    with pytest.raises(ValueError, match="tie_word_embeddings is true"):
        hf.load(tmp_path / "a")


def test_params_sha256_follows_values_names_and_dtype():
    params = random_params(LLAMA32_TIED)
    one = hf.params_sha256(params, LLAMA32_TIED)
    assert one == hf.params_sha256(jax.tree.map(jnp.copy, params), LLAMA32_TIED)
    params["layers"]["q"] = params["layers"]["q"].at[0, 0, 0].add(1e-7)
    assert one != hf.params_sha256(params, LLAMA32_TIED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "1 tensors are missing, the first is model.layers.2.mlp.up_proj"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(4, np.float32)}), "unknown to this model"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"model.norm.weight has shape \(3,\)"),
    ],
)
def test_damaged_weights_are_refused_by_name(damage, message, tmp_path):
    write_checkpoint(tmp_path / "a", "mqa")
    file = tmp_path / "a" / "model.safetensors"
    tensors = {name: np.array(reader()) for name, reader in hf.read_safetensors(file).items()}
    damage(tensors)
    write_safetensors(file, tensors)
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path / "a")


def test_truncated_and_missing_files_are_refused(tmp_path):
    write_checkpoint(tmp_path / "a", "llama3_fp16_shards")
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[0].read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        shards[0].write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated|header"):
            hf.load(tmp_path / "a")
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        hf.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "mamba"), ("hidden_act", "gelu"), ("attention_bias", True), ("rope_parameters", {"rope_type": "yarn"})],
)
def test_what_the_model_cannot_compute_is_refused(field, value):
    with pytest.raises(ValueError, match=str(value) if field != "rope_parameters" else "yarn|rope_theta"):
        hf.parse_config({**hf.config_json(LLAMA31, "float32"), field: value}, "config.json")


def test_an_export_never_overwrites_and_leaves_nothing_half_written(tmp_path):
    params = random_params(LLAMA31)
    hf.save(tmp_path / "a", params, LLAMA31, dtype="float32")
    with pytest.raises(FileExistsError, match="exists"):
        hf.save(tmp_path / "a", params, LLAMA31, dtype="float32")
    broken = {**params, "norm": "not an array"}
    with pytest.raises(AttributeError):
        hf.save(tmp_path / "b", broken, LLAMA31, dtype="float32")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_config_keeps_head_dim_and_scaling():
    config = dataclasses.replace(LLAMA31, head_dim=16)
    assert hf.parse_config(json.loads(json.dumps(hf.config_json(config, "float32"))), "x") == config


def write_safetensors(file, tensors):
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": weights.CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    blob = json.dumps(header).encode()
    file.write_bytes(len(blob).to_bytes(8, "little") + blob + b"".join(hf._bits(v).tobytes() for v in tensors.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json: missing hidden_size"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "lacks factor, original_max_position_embeddings",
        ),
    ],
)
def test_a_missing_constant_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        hf.parse_config({**hf.config_json(LLAMA31, "float32"), **change}, "config.json")


@pytest.mark.parametrize("damage", ["", '{"metadata": {}}', '{"weight_map": {"a'])
def test_a_broken_index_is_named(damage, tmp_path):
    write_checkpoint(tmp_path / "a", "llama3_fp16_shards")
    (tmp_path / "a" / "model.safetensors.index.json").write_text(damage)
    with pytest.raises(ValueError, match=r"index.json: truncated, or no index"):
        hf.load(tmp_path / "a")


@pytest.mark.parametrize("block", [1 << 9, 1 << 13])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_small_blocks_give_the_same_arrays_and_hash(block, dtype, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a", "llama31")
    whole, config = hf.load(tmp_path / "a", dtype=dtype)
    before = hf.params_sha256(whole, config)
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)
    assert hf.params_sha256(hf.load(tmp_path / "a", dtype=dtype)[0], config) == before
    hf.save(tmp_path / "b", whole, config, dtype=dtype or "bfloat16")
    assert weights.sha256(hf.open_weights(tmp_path / "b", config)) == before
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["params_sha256"] == before


def test_an_import_holds_no_second_copy_on_the_cpu(tmp_path):
    """The device's memory is the memory that the file was read into: one buffer of numpy's, not copied."""
    write_checkpoint(tmp_path / "a", "llama31")
    made = []
    real = placing._aligned
    placing._aligned = lambda *args: made.append(real(*args)) or made[-1]
    try:
        params, _ = hf.load(tmp_path / "a")
    finally:
        placing._aligned = real
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)} == {a.ctypes.data for a in made}


def test_arrays_are_filled_on_other_devices_block_by_block(tmp_path, monkeypatch):
    """What a GPU or TPU gets: small pieces put into an array that lies there."""
    write_checkpoint(tmp_path / "a", "mqa")
    wanted, _ = hf.load(tmp_path / "a")
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(placing._Shard, "on_host", lambda self: self.on_device(jax.devices()[0]))
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "a")[0], wanted)


def test_four_devices_hold_what_one_holds(tmp_path):
    """Each device reads its own rows and columns; in a process of its own, for the number of devices is fixed at its start."""
    write_checkpoint(tmp_path / "a", "llama31")
    program = (
        "import jax, numpy as np\n"
        "from swallow_jax import hf, mesh\n"
        "one, config = hf.load({folder!r})\n"
        "for sizes in ((1, 2, 2, 1), (2, 2, 1, 1)):\n"
        "    placed, _ = hf.load({folder!r}, mesh=mesh.build(mesh.MeshConfig(**dict(zip(mesh.AXES, sizes)))))\n"
        "    jax.tree.map(np.testing.assert_array_equal, placed, one)\n"
        "    assert hf.params_sha256(placed, config) == hf.params_sha256(one, config)\n"
        "    shapes = {{s.data.shape for s in placed['layers']['q'].addressable_shards}}\n"
        "    assert shapes == {{(3, 128 // sizes[2], 64 // sizes[1])}}, shapes\n"
    ).format(folder=str(tmp_path / "a"))
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
