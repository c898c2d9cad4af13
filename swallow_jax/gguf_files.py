"""GGUF files in: config, tensors under HF's names, and the tokenizer, through the `gguf` package (extra [demo]).

llama.cpp keeps q and k in interleaved RoPE order; here they are put back into HF's half-split order. Quantised tensors
are dequantised to float32, one at a time.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from swallow_jax.llama import LlamaConfig
from swallow_jax.weights import Tensor

# llama.cpp's name of each tensor (gguf-py, MODEL_ARCH.LLAMA) -> HF's, first outside the layers, then inside.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# tokenizer.ggml.pre -> how text is cut before byte-pair merges (llama.cpp, llm_tokenizer_bpe).
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_config(path: Path) -> LlamaConfig:
    """The model config of a GGUF file of architecture "llama"."""
    reader = _open(path)
    if (architecture := _field(reader, "general.architecture")) != "llama":
        raise ValueError(f"{path}: architecture {architecture!r}; this model computes llama only")
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    if "rope_freqs.weight" in shapes:
        raise ValueError(f"{path} carries RoPE factors as a tensor, which lose the checkpoint's constants; import the HF folder")

    def get(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    def need(key: str) -> Any:
        if (value := get(key)) is None or (isinstance(value, (int, float)) and not value > 0):
            raise ValueError(f"{path}: llama.{key} is {value!r}; a whole file has this constant: take another, or the HF folder")
        return value

    if (scaling := get("rope.scaling.type")) not in (None, "none"):
        raise ValueError(f"{path}: RoPE scaling {scaling!r} is not computed for GGUF files; import the HF folder")
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise ValueError(f"{path}: no token_embd.weight of two axes; this is no whole model")
    heads, size = int(need("attention.head_count")), int(need("embedding_length"))
    # GGUF keeps float32: 9.999999747378752e-06 was 1e-05 in config.json.
    eps = float(str(np.float32(need("attention.layer_norm_rms_epsilon"))))
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][1],
        hidden_size=size,
        intermediate_size=int(need("feed_forward_length")),
        num_layers=int(need("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv") or heads),
        head_dim=int(get("attention.key_length") or size // heads),
        rope_theta=float(get("rope.freq_base") or 10000.0),  # llama.cpp's own value where the file has none
        rope_scaling=None,
        rms_norm_eps=eps,
        tie_word_embeddings="output.weight" not in shapes,
        max_position_embeddings=int(need("context_length")),
    )


def open_tensors(path: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Tensors by HF name, float32 in HF's layout; rows are dequantised when they are asked for."""
    import gguf

    def rows(tensor: Any, heads: int | None, first: int, last: int) -> np.ndarray:
        data = tensor.data if heads else tensor.data[first:last]  # q and k mix the rows of a head
        value = gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32)
        if heads is None:
            return value
        out, into = value.shape
        return value.reshape(heads, out // heads // 2, 2, into).swapaxes(1, 2).reshape(out, into)[first:last]

    tensors = {}
    for tensor in _open(path).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in _INSIDE:
            name = f"model.layers.{parts[1]}.{_INSIDE[parts[2]]}.weight"
        else:
            name = f"{_OUTSIDE[parts[0]]}.weight" if parts[0] in _OUTSIDE else tensor.name
        shape = tuple(int(n) for n in reversed(tensor.shape))
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(parts[2] if len(parts) == 4 else "")
        tensors[name] = Tensor(shape=shape, dtype=np.dtype(np.float32), rows=functools.partial(rows, tensor, heads))
    return tensors


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a GGUF file with a byte-level BPE vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    reader = _open(path)
    kind, cut = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer model {kind!r}; only byte-level BPE is converted; take the HF folder's files")
    cuts = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    }
    if cut not in cuts:
        raise ValueError(f"{path}: pre-tokenizer {cut!r}; known: {', '.join(cuts)}; take the HF folder's tokenizer files")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts[cut])
    tokenizer.decoder = decoders.ByteLevel()
    control = [i for i, t in enumerate(_field(reader, "tokenizer.ggml.token_type")) if t == 3]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id"), ("unk", "unknown_token_id")):
        if (i := _field(reader, f"tokenizer.ggml.{key}")) is not None:
            config[f"{name}_token"] = tokens[int(i)]
    tokenizer.save(str(folder / "tokenizer.json"))
    if template := _field(reader, "tokenizer.chat_template"):
        config["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        import gguf
    except ImportError:
        raise ValueError(f"reading {path.name} needs the gguf package: pip install gguf") from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error}); download it again") from None


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()
