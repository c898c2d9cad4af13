"""Check that a checkpoint computes here what it computes in transformers, and comes out bit for bit as it went in.

    python -m tools.verify --hf=DIR

Against transformers where torch is installed; elsewhere against values recorded from it (--golden=FILE.npz, written
with --write_golden). The last line is JSON: `max_rel_logit_diff` (largest difference of float32 logits over their standard
deviation, on a short prompt and on one sequence of --long tokens), `inv_freq_equal`, `round_trip_bitwise`.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import door
from swallow_jax import hf, llama
from swallow_jax.llama import Compute, LlamaConfig, Params

_HF = flags.DEFINE_string("hf", None, "HF folder to verify")
_LONG = flags.DEFINE_integer("long", 16000, "length of the long sequence")
_GOLDEN = flags.DEFINE_string("golden", None, "compare with the values in this file instead of torch")
_WRITE = flags.DEFINE_string("write_golden", None, "record transformers' values in this file")

SHORT = 48
TOLERANCE = 1e-4  # float32 rounding over a few dozen layers; every mutant of the architecture lies far above
FLOAT32 = Compute(dtype="float32", remat="none", scan_layers=True, attention="xla")


def main() -> dict[str, Any]:
    """Verify --hf; raises ValueError when a check fails."""
    if not _HF.value:
        raise ValueError("--hf=DIR is missing; --help shows an example")
    params, config = hf.load(_HF.value)
    if _GOLDEN.value:
        reference = dict(np.load(_GOLDEN.value))
    else:
        reference = transformers_values(_HF.value, config, min(_LONG.value, config.max_position_embeddings))
        if _WRITE.value:
            np.savez_compressed(_WRITE.value, **reference)
    params32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    result = {
        "hf": str(_HF.value),
        "against": "golden values" if _GOLDEN.value else "transformers",
        "max_rel_logit_diff": logit_difference(params32, config, reference),
        "long_tokens": int(reference["long_tokens"].shape[0]),
        "inv_freq_equal": bool(np.array_equal(np.asarray(llama.inverse_frequencies(config)), reference["inv_freq"])),
        "round_trip_bitwise": round_trip_bitwise(_HF.value, params, config),
        "params_sha256": hf.params_sha256(params, config),
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    # inv_freq may differ by one rounding of torch's float32 power where theta and head_dim are unusual; the logits decide.
    if result["max_rel_logit_diff"] > TOLERANCE or not result["round_trip_bitwise"]:
        raise ValueError(f"{_HF.value} does not compute what transformers computes: {result}")
    return result


def logit_difference(params: Params, config: LlamaConfig, reference: dict[str, np.ndarray]) -> float:
    """Largest |ours - reference| over the reference's standard deviation, at the recorded positions."""
    worst = 0.0
    for name in ("short", "long"):
        ours = _logits_at(params, config, reference[f"{name}_tokens"], reference[f"{name}_positions"])
        wanted = reference[f"{name}_logits"]
        worst = max(worst, float(np.abs(ours - wanted).max() / wanted.std()))
    return worst


def round_trip_bitwise(source: str, params: Params, config: LlamaConfig) -> bool:
    """Whether saving what was loaded gives the source's tensors: names, dtypes and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Path(folder) / "copy", params, config, dtype="source", source_folder=source)
        before, after = hf.open_tensors(source), hf.open_tensors(Path(folder) / "copy")
        if config.tie_word_embeddings:
            before.pop("lm_head.weight", None)
        return before.keys() == after.keys() and all(
            reader().dtype == after[name]().dtype and reader().tobytes() == after[name]().tobytes()
            for name, reader in before.items()
        )


def transformers_values(folder: str, config: LlamaConfig, long: int) -> dict[str, np.ndarray]:
    """Float32 logits of transformers on a short prompt and a long sequence of pseudo-random tokens, and its inv_freq."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError("torch is not installed; pip install torch, or give --golden=FILE.npz") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {"inv_freq": model.model.rotary_emb.inv_freq.numpy().astype(np.float32)}
    for name, length in (("short", SHORT), ("long", long)):
        tokens = rng.integers(0, config.vocab_size, length)
        # The long sequence is compared where scaling, theta and layout show: at its end and thinly over its length.
        positions = np.arange(length) if name == "short" else np.unique(np.linspace(0, length - 1, 24).astype(int))
        with torch.inference_mode():
            out = model(torch.tensor(tokens)[None], logits_to_keep=torch.tensor(positions)).logits[0]
        values |= {f"{name}_tokens": tokens, f"{name}_positions": positions, f"{name}_logits": out.numpy()}
    return values


def _logits_at(params: Params, config: LlamaConfig, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        hidden, _ = llama.forward(params, config, FLOAT32, tokens, jnp.arange(tokens.shape[1])[None])
        return llama.logits(params, config, hidden[:, positions])[0]

    return np.asarray(run(params, jnp.asarray(tokens)[None]))


if __name__ == "__main__":
    door.tool(main, __doc__)
