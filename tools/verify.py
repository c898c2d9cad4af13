"""Check that a checkpoint computes here what it computes in transformers, and comes out bit for bit as it went in.

    python -m tools.verify --hf=DIR --text=README.md
    python -m tools.verify --hf=FILE.gguf

Against transformers where torch is installed; elsewhere against values recorded from it (--golden=FILE.npz, written
with --write_golden). A table, then one line of JSON: `max_rel_logit_diff` (largest difference of float32 logits over their
standard deviation, on a short prompt and on one sequence of --long tokens), `bf16_kl` (mean divergence of bfloat16 from
float32 in nats, beside transformers' own), `round_trip_bitwise`, `tokenizer`, `chat_template`, `generation_config`, `tied`,
`perplexity` of --text, `perplexity_int8` with the sampler's int8 weights. A check that fails is named and ends the
program with an error.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import door
from swallow_jax import hf, llama, text
from swallow_jax.generate import steps
from swallow_jax.llama import Compute, LlamaConfig, Params

_HF = flags.DEFINE_string("hf", None, "HF folder or GGUF file to verify")
_LONG = flags.DEFINE_integer("long", 16000, "length of the long sequence")
_TEXT = flags.DEFINE_string("text", None, "UTF-8 text whose perplexity is compared")
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 8192, "tokens of --text that are read")
_GOLDEN = flags.DEFINE_string("golden", None, "compare with the values in this file instead of torch")
_WRITE = flags.DEFINE_string("write_golden", None, "record transformers' values in this file")

SHORT = 48
WINDOW = 1024  # tokens of --text that are read together
TOLERANCE = 1e-4  # float32 rounding over a few dozen layers; every mutant of the architecture lies far above
# torch's vectorised power is off by one rounding from its scalar one (see llama.inverse_frequencies); the llama3 blend may
# carry that to the next bit.
ULPS = 2
FLOAT32 = Compute(dtype="float32", remat="none", scan_layers=True, attention="xla")
BFLOAT16 = Compute(dtype="bfloat16", remat="none", scan_layers=True, attention="xla")
TEXTS = (
    "保険料は月々3,000円です。解約返戻金はありません。",
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 2026-11-22.",
    "two  spaces,\ttabs\n\nand\r\nlines   ",  # none in front: there transformers 5 forgets SentencePiece's dummy prefix
    "ﾃﾞｨｽｸﾛｰｼﾞｬｰ誌、髙橋・﨑山 ①Ⅳ㌢ ―～〜",
    "def f(x):\n    return x**2  # 二乗",
    "👩‍👩‍👧 🇯🇵 naïve Ångström Ж ع ไ",
    "",
)
_ASK = {"role": "user", "content": "保険の見直しを  考えています。\nWhat now? "}
_TELL = {"role": "assistant", "content": "まず目的を確認しましょう。"}
_RULE = {"role": "system", "content": "You are a careful adviser.\n"}
CHATS = ([_ASK], [_RULE, _ASK], [_ASK, _TELL, _ASK], [_ASK, _TELL])


def main() -> dict[str, Any]:
    """Verify --hf; raises ValueError naming the checks that fail."""
    if not _HF.value:
        raise ValueError("--hf=DIR is missing; --help shows an example")
    source = Path(_HF.value)
    if not _GOLDEN.value:
        require_torch()
    params, config = hf.load(source)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        hf.save(copy, params, config, dtype="float32" if source.suffix == ".gguf" else "source", source_folder=source)
        try:
            tokenizer = text.load_tokenizer(copy)
        except FileNotFoundError:
            tokenizer = None
        windows = _windows(tokenizer) if _TEXT.value else []
        if _GOLDEN.value:
            reference = dict(np.load(_GOLDEN.value))
        else:
            # Of a GGUF file transformers reads the weights, not the tokenizer: it forgets how text is cut before merges.
            words = copy if source.suffix == ".gguf" else source
            reference = transformers_values(source, words, config, min(_LONG.value, config.max_position_embeddings), windows)
            if _WRITE.value:
                np.savez_compressed(_WRITE.value, **reference)
        checks = Checks()
        checks.weights(source, copy, config)
        checks.numbers(jax.tree.map(lambda x: x.astype(jnp.float32), params), config, reference, windows)
        checks.words(tokenizer, reference)
    against = "golden values" if _GOLDEN.value else "transformers"
    print(f"{source} against {against}\n" + checks.table(), flush=True)
    if checks.failed:
        raise ValueError(f"{source} does not compute what transformers computes: {', '.join(checks.failed)}")
    facts = {"hf": str(source), "against": against, "long_tokens": int(reference["long_tokens"].shape[0])}
    return facts | checks.values | {"params_sha256": hf.params_sha256(params, config)}


class Checks:
    """Each check adds its value, and a row of the table: what it is, what is wanted, whether it holds."""

    def __init__(self):
        self.values: dict[str, Any] = {}
        self.failed: list[str] = []
        self._rows: list[tuple[str, str, str, str]] = []

    def add(self, name: str, value: Any, wanted: str, holds: bool) -> None:
        self.values[name] = value
        self._rows.append(("ok" if holds else "FAILS", name, f"{value:.6g}" if isinstance(value, float) else str(value), wanted))
        if not holds:
            self.failed.append(f"{name} is {value}, {wanted} is wanted")

    def table(self) -> str:
        widths = [max(len(row[i]) for row in self._rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in self._rows)

    def weights(self, source: Path, copy: Path, config: LlamaConfig) -> None:
        """Saving what was loaded gives the source's tensors: names, dtypes and bytes (of a GGUF file: as dequantised)."""
        before, after = hf.open_weights(source, config), hf.open_weights(copy, config)
        bitwise = before.keys() == after.keys() and all(
            tensor.dtype == after[name].dtype and tensor().tobytes() == after[name]().tobytes() for name, tensor in before.items()
        )
        self.add("round_trip_bitwise", bitwise, "True", bitwise)

    def numbers(self, params: Params, config: LlamaConfig, reference: dict[str, np.ndarray], windows: Sequence) -> None:
        """Float32 and bfloat16 logits, inverse frequencies, tying, perplexity."""
        worst = logit_difference(params, config, reference)
        self.add("max_rel_logit_diff", worst, f"<= {TOLERANCE}", worst <= TOLERANCE)
        ours, theirs = np.asarray(llama.inverse_frequencies(config)), reference["inv_freq"]
        ulps = int(np.abs(ours.view(np.int32) - theirs.view(np.int32)).max())
        self.values["inv_freq_equal"] = ulps == 0
        self.add("inv_freq_ulps", ulps, f"<= {ULPS}", ulps <= ULPS)
        if "tied" in reference:
            tied = bool(reference["tied"])
            self.add("tied", config.tie_word_embeddings, str(tied), config.tie_word_embeddings == tied)
        if "bf16_kl" in reference:
            rough = _logits_at(params, config, reference["short_tokens"], reference["short_positions"], BFLOAT16)
            kl, limit = divergence(reference["short_logits"], rough), 2 * float(reference["bf16_kl"])
            self.values["bf16_kl_reference"] = float(reference["bf16_kl"])
            self.add("bf16_kl", kl, f"<= {limit:.3g}, twice transformers'", kl <= limit)
        if windows:
            ours = perplexity(lambda ids: _logits_at(params, config, ids, np.arange(len(ids))), windows)
            self.values["perplexity_tokens"] = sum(len(ids) - 1 for ids in windows)
            theirs = float(reference["perplexity"]) if "perplexity" in reference else None
            holds = theirs is None or abs(ours / theirs - 1) <= TOLERANCE
            self.add("perplexity", ours, f"{theirs:.6g}" if theirs else "not compared", holds)
            eighth = steps.decode_form(params, "float32", int8=True)
            rough = perplexity(lambda ids: _logits_at(eighth, config, ids, np.arange(len(ids))), windows)
            self.add("perplexity_int8", rough, f"{100 * (rough / ours - 1):+.2f} % by int8 weights", True)

    def words(self, tokenizer: text.Tokenizer | None, reference: dict[str, np.ndarray]) -> None:
        """Ids and texts of the tokenizer, ids of rendered chats, and what ends a generation."""
        theirs = json.loads(str(reference["words"])) if "words" in reference else None
        if tokenizer is None or theirs is None:
            self.values |= {"tokenizer": None, "chat_template": None, "generation_config": None}
            return
        encoded = [tokenizer.encode(t) for t in TEXTS]
        rows = list(zip(TEXTS, encoded, theirs["encoded"], theirs["decoded"], strict=True))
        differing = [
            t for t, ids, wanted, spelled in rows if ids != wanted or tokenizer.decode(ids, skip_special=False) != spelled
        ]
        value = f"differs on {differing[0]!r}" if differing else "equal"
        self.add("tokenizer", value, f"equal on {len(TEXTS)} texts", not differing)
        chats = [_render(tokenizer, chat, prompt) for chat in CHATS for prompt in (False, True)]
        if any(theirs["chats"]) or any(chats):
            differing = [i for i, (ids, wanted) in enumerate(zip(chats, theirs["chats"], strict=True)) if ids != wanted]
            value = f"differs on {[m['role'] for m in CHATS[differing[0] // 2]]}" if differing else "equal"
            self.add("chat_template", value, f"equal on {len(chats)} dialogues", not differing)
        ends = set(theirs["eos_ids"]) <= set(tokenizer.eos_ids) and theirs["bos_id"] in (None, tokenizer.bos_id)
        named = f"stops at {list(tokenizer.eos_ids)}, begins with {tokenizer.bos_id}"
        self.add("generation_config", named, f"stops at {theirs['eos_ids']}, begins with {theirs['bos_id']}", ends)


def logit_difference(params: Params, config: LlamaConfig, reference: dict[str, np.ndarray]) -> float:
    """Largest |ours - reference| over the reference's standard deviation, at the recorded positions."""
    worst = 0.0
    for name in ("short", "long"):
        ours = _logits_at(params, config, reference[f"{name}_tokens"], reference[f"{name}_positions"])
        wanted = reference[f"{name}_logits"]
        worst = max(worst, float(np.abs(ours - wanted).max() / wanted.std()))
    return worst


def divergence(exact: np.ndarray, rough: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of `rough` from `exact` logits [T, V], in nats."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (exact, rough))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def perplexity(logits: Callable[[np.ndarray], np.ndarray], windows: Sequence[np.ndarray]) -> float:
    """exp of the mean negative log-probability of each window's tokens after its first."""
    total = 0.0
    for ids in windows:
        logp = jax.nn.log_softmax(jnp.asarray(logits(ids))[:-1])
        total -= float(jnp.take_along_axis(logp, jnp.asarray(ids)[1:, None], axis=-1).sum())
    return float(np.exp(total / sum(len(ids) - 1 for ids in windows)))


def require_torch() -> None:
    """Before anything is loaded."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError("torch is not installed; pip install torch, or give --golden=FILE.npz") from None


def transformers_values(
    source: Path, words: Path, config: LlamaConfig, long: int, windows: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What transformers makes of a checkpoint, whose tokenizer lies in the folder `words`.

    Float32 logits of a short prompt and of a long sequence of pseudo-random tokens, its bfloat16's divergence from them,
    inv_freq, whether it ties, perplexity of `windows`, and ids of TEXTS and CHATS (`words`, JSON).
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": source}
    if source.suffix == ".gguf":  # read by transformers' own code
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}

    def open_model(dtype: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, attn_implementation="sdpa")

    def logits(model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out = model(torch.tensor(tokens)[None], logits_to_keep=torch.tensor(positions))
        return out.logits[0].float().numpy()

    model = open_model(torch.float32)
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {"inv_freq": model.model.rotary_emb.inv_freq.numpy().astype(np.float32)}
    values["tied"] = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, length in (("short", SHORT), ("long", long)):
        tokens = rng.integers(0, config.vocab_size, length)
        # The long sequence is compared where scaling, theta and layout show: at its end and thinly over its length.
        positions = np.arange(length) if name == "short" else np.unique(np.linspace(0, length - 1, 24).astype(int))
        values |= {f"{name}_tokens": tokens, f"{name}_positions": positions}
        values[f"{name}_logits"] = logits(model, tokens, positions)
    if windows:
        values["perplexity"] = perplexity(lambda ids: logits(model, ids, np.arange(len(ids))), windows)
    generation, model = model.generation_config, None  # one model in memory at a time
    model = open_model(torch.bfloat16)
    rough = logits(model, values["short_tokens"], values["short_positions"])
    values["bf16_kl"] = divergence(values["short_logits"], rough)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    except (OSError, ValueError):
        return values  # no tokenizer in this folder
    return values | {"words": json.dumps(_transformers_words(tokenizer, generation))}


def _transformers_words(tokenizer: Any, generation: Any) -> dict[str, Any]:
    import jinja2

    encoded = [tokenizer.encode(t, add_special_tokens=False) for t in TEXTS]
    chats = []
    for chat in CHATS:
        for prompt in (False, True):
            try:
                given = {"add_generation_prompt": prompt, "return_dict": True, "date_string": f"{text.TEMPLATE_DATE:%d %b %Y}"}
                chats.append(tokenizer.apply_chat_template(chat, **given)["input_ids"])
            except (jinja2.TemplateError, ValueError):  # refuses this dialogue, or there is no template
                chats.append(None)
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    return {
        "encoded": encoded,
        "decoded": [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in encoded],
        "chats": chats,
        "eos_ids": eos if isinstance(eos, list) else [eos] if eos is not None else [],
        "bos_id": tokenizer.bos_token_id,
    }


def _render(tokenizer: text.Tokenizer, chat: list[dict[str, str]], prompt: bool) -> list[int] | None:
    try:
        return tokenizer.render_chat(chat, add_generation_prompt=prompt)
    except ValueError:
        return None


def _windows(tokenizer: text.Tokenizer | None) -> list[np.ndarray]:
    """The first --text_tokens of --text, cut into windows."""
    if tokenizer is None:
        raise ValueError("--text needs a tokenizer beside the weights")
    ids = tokenizer.encode(Path(_TEXT.value).read_text(encoding="utf-8"))[: _TEXT_TOKENS.value]
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    windows = [np.asarray(first + ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]
    if not (windows := [ids for ids in windows if len(ids) > 1]):
        raise ValueError(f"{_TEXT.value} holds no text to predict")
    return windows


def _logits_at(
    params: Params, config: LlamaConfig, tokens: np.ndarray, positions: np.ndarray, compute: Compute = FLOAT32
) -> np.ndarray:
    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        hidden, _ = llama.forward(params, config, compute, tokens, jnp.arange(tokens.shape[1])[None])
        return llama.logits(params, config, hidden[:, positions])[0]

    return np.asarray(run(params, jnp.asarray(tokens)[None]))


if __name__ == "__main__":
    door.tool(main, __doc__)
