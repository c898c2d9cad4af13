"""GGUF files: rows are read alone, q and k come back in HF's order, and a broken file is told in a sentence."""

import numpy as np
import pytest

from swallow_jax import gguf_files, hf, weights
from tests.helpers import LLAMA3_FP16, random_params

gguf = pytest.importorskip("gguf")

CONSTANTS = {
    "block_count": ("uint32", LLAMA3_FP16.num_layers),
    "context_length": ("uint32", LLAMA3_FP16.max_position_embeddings),
    "embedding_length": ("uint32", LLAMA3_FP16.hidden_size),
    "feed_forward_length": ("uint32", LLAMA3_FP16.intermediate_size),
    "attention.head_count": ("uint32", LLAMA3_FP16.num_heads),
    "attention.head_count_kv": ("uint32", LLAMA3_FP16.num_kv_heads),
    "attention.key_length": ("uint32", LLAMA3_FP16.head_dim),
    "attention.layer_norm_rms_epsilon": ("float32", LLAMA3_FP16.rms_norm_eps),
    "rope.freq_base": ("float32", LLAMA3_FP16.rope_theta),
}
OURS = {hf_name: name for name, hf_name in {**gguf_files._OUTSIDE, **gguf_files._INSIDE}.items()}


def write(path, params, *, leave_out=(), quantise=False, **change):
    """A GGUF file of a model, as llama.cpp's converter lays it out: q and k interleaved."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in CONSTANTS.items():
        if key not in leave_out:
            getattr(writer, f"add_{kind}")(f"llama.{key}", change.get(key.replace(".", "_"), value))
    for name, tensor in hf.tensors_of(params).items():
        value = np.array(tensor())
        parts = name.removesuffix(".weight").split(".")
        if "layers" in parts:
            new = f"blk.{parts[2]}.{OURS['.'.join(parts[3:])]}.weight"
        else:
            new = f"{OURS['.'.join(parts)]}.weight"
        heads = {"q_proj": LLAMA3_FP16.num_heads, "k_proj": LLAMA3_FP16.num_kv_heads}.get(parts[-1])
        if heads:
            out, into = value.shape
            value = value.reshape(heads, 2, out // heads // 2, into).swapaxes(1, 2).reshape(out, into)
        if new in leave_out:
            continue
        if quantise and value.ndim == 2 and value.shape[1] % 32 == 0:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quants.quantize(value, q8), raw_dtype=q8)
        else:
            writer.add_tensor(new, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_comes_in_as_the_model_it_was_made_of(tmp_path):
    params = random_params(LLAMA3_FP16)
    read, config = hf.load(write(tmp_path / "m.gguf", params))
    assert config == LLAMA3_FP16
    assert hf.params_sha256(read, config) == hf.params_sha256(params, config)


def test_rows_of_quantised_tensors_are_those_of_the_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", random_params(LLAMA3_FP16), quantise=True)
    config = hf.read_config(path)
    tensors = hf.open_weights(path, config)
    whole = {name: np.array(tensor()) for name, tensor in tensors.items()}
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1 << 11)
    for name, tensor in tensors.items():
        blocks = [tensor.rows(*block) for block in tensor.blocks()]
        assert len(blocks) > 1 or tensor.nbytes <= 1 << 11
        assert np.array_equal(np.concatenate(blocks), whole[name]), name
    hf.save_tensors(tmp_path / "out", tensors, config, dtype="float32", manifest={"licences": []})
    assert all(np.array_equal(t(), whole[name]) for name, t in hf.open_tensors(tmp_path / "out").items())


@pytest.mark.parametrize(
    "missing", [k for k in CONSTANTS if k.split(".")[-1] not in ("head_count_kv", "key_length", "freq_base")]
)
def test_a_missing_constant_is_named(missing, tmp_path):
    path = write(tmp_path / "m.gguf", random_params(LLAMA3_FP16), leave_out=(missing,))
    with pytest.raises(ValueError, match=rf"m.gguf: llama\.{missing} is None; a whole file has this constant"):
        hf.load(path)


def test_broken_files_are_told_in_a_sentence(tmp_path):
    params = random_params(LLAMA3_FP16)
    path = write(tmp_path / "m.gguf", params, leave_out=("token_embd.weight",))
    with pytest.raises(ValueError, match=r"no token_embd.weight of two axes"):
        hf.load(path)
    path = write(tmp_path / "n.gguf", params, leave_out=("blk.1.attn_q.weight",))
    with pytest.raises(ValueError, match=r"1 tensors are missing, the first is model.layers.1.self_attn.q_proj.weight"):
        hf.load(path)
    path = write(tmp_path / "z.gguf", params, attention_head_count=0)
    with pytest.raises(ValueError, match=r"llama.attention.head_count is 0"):
        hf.load(path)
    whole = write(tmp_path / "o.gguf", params).read_bytes()
    for size in (0, 3, 23, 100, 600, len(whole) // 2, len(whole) - 4):
        (tmp_path / "o.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"o.gguf: not a whole GGUF file"):
            hf.load(tmp_path / "o.gguf")
    rng = np.random.default_rng(0)
    for _ in range(60):  # damaged bytes of the header: a sentence, or a model that still loads
        raw = bytearray(whole)
        for at in rng.integers(4, 700, 3):
            raw[at] = rng.integers(256)
        (tmp_path / "o.gguf").write_bytes(raw)
        try:
            hf.load(tmp_path / "o.gguf")
        except ValueError as error:
            assert "\n" not in str(error)
