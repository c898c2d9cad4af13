"""Write a run's model (an HF folder's, a GGUF file's) as an HF folder that transformers 4 and 5, vLLM and harnesses load.

    python -m tools.export --run=runs/sft/tiny --out=exported --dtype=bfloat16
    python -m tools.export --run=runs/sft/fin --out=Llama-3.1-Fin-8B --scores=runs/evaluate/fin --max_shard_gb=2
    python -m tools.export --run=runs/sft/lora_tiny --out=adapter --adapter
    python -m tools.export --run=runs/cpt/fin --add=INSTRUCT --minus=BASE --scale=0.7 --out=Llama-3.1-Fin-8B-Instruct

The best checkpoint by held-out loss is taken unless --which=last; a half-trained run needs --unfinished. A run with a `lora`
section is written merged into its base, or with --adapter as an adapter that peft and vLLM load. --add gives
run + scale * (add - minus), parameter by parameter in float32, with the tokenizer and chat template of --add: instruction
tuning carried over to a model that was continued from its base. Weights pass in blocks, so a model may be larger than memory.
The folder gets manifest.json (hashes, licences and attributions inherited) and a model card, README.md, with the table of
--scores (a folder with scores.json). An existing --out is refused; a name against the Llama licence's rule is warned of.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door

_RUN = flags.DEFINE_string("run", None, "run folder, HF folder, peft adapter or GGUF file")
_OUT = flags.DEFINE_string("out", None, "HF folder to write")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "dtype of the weights written")
_WHICH = flags.DEFINE_enum("which", "best", ["best", "last"], "checkpoint of a run")
_ADAPTER = flags.DEFINE_boolean("adapter", False, "write the adapter of a LoRA run alone, in peft's format (float32)")
_UNFINISHED = flags.DEFINE_boolean("unfinished", False, "a half-trained run is meant")
_ADD = flags.DEFINE_string("add", None, "model whose difference from --minus is added")
_MINUS = flags.DEFINE_string("minus", None, "model that --add was tuned from")
_SCALE = flags.DEFINE_float("scale", None, "how much of the difference is added")
_NAME = flags.DEFINE_string("name", None, "name of the model (default: the folder's)")
_SCORES = flags.DEFINE_string("scores", None, "scores.json, or the folder of experiments.evaluate that holds it")
_SHARD = flags.DEFINE_float("max_shard_gb", 5.0, "largest weight file")


def main() -> dict[str, Any]:
    """Export; returns the folder, its parameter hash, size, licences and warnings."""
    if not _RUN.value or not _OUT.value:
        raise ValueError("--run and --out are needed; --help shows an example")
    arithmetic = [_ADD.value, _MINUS.value, _SCALE.value]
    if any(v is not None for v in arithmetic) and any(v is None for v in arithmetic):
        raise ValueError("--add, --minus and --scale go together: run + scale * (add - minus)")
    if _SHARD.value <= 0:
        raise ValueError(f"--max_shard_gb={_SHARD.value}: a positive size is wanted")
    if _ADAPTER.value:
        if _ADD.value:
            raise ValueError("--adapter and --add exclude each other; export the merged model, then add to that")
        return export_adapter(_RUN.value, _OUT.value, which=_WHICH.value, unfinished=_UNFINISHED.value)
    return export(
        _RUN.value,
        _OUT.value,
        dtype=_DTYPE.value,
        which=_WHICH.value,
        unfinished=_UNFINISHED.value,
        add=_ADD.value and (_ADD.value, _MINUS.value, _SCALE.value),
        name=_NAME.value,
        scores=_SCORES.value,
        max_shard_bytes=int(_SHARD.value * 1e9),
    )


def export(
    source: str,
    out: str,
    *,
    dtype: str,
    which: str,
    unfinished: bool = False,
    add: tuple[str, str, float] | None = None,
    name: str | None = None,
    scores: str | None = None,
    max_shard_bytes: int | None = None,
    check_values: bool = True,
    digest: bool = True,
) -> dict[str, Any]:
    """Save `source` (or source + scale * (instruct - base), `add` = (instruct, base, scale)) under `out`.

    The hash is that of the weights as written. Without `check_values` NaN passes, without `digest` nothing is hashed.
    """
    from swallow_jax import hf, run
    from tools import card

    if Path(out).exists():
        raise FileExistsError(f"{out} exists; choose another place or remove it")
    name = name or Path(out).resolve().name
    rows = card.read_scores(scores) if scores else []
    tensors, config, companions = open_source(source, which, unfinished=unfinished)
    method, base = card.history(source)
    parents = [source]
    if add is not None:
        instruct, minus, scale = add
        tensors, companions = plus_difference(tensors, config, instruct, minus, scale, which)
        method.append({"kind": "model arithmetic", "added": instruct, "subtracted": minus, "scale": scale})
        parents += [instruct, minus]
    inherited = run.inherited(parents)
    warnings = card.naming_warnings(name, inherited["licences"])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    facts = {
        "name": name,
        "base": base,
        "method": method,
        **inherited,
        "parents": {str(path): run.sha256_path(path) for path in parents} if digest else {},
    }
    manifest = hf.save_tensors(
        out,
        tensors,
        config,
        dtype=dtype,
        source_folder=companions,
        manifest=facts,
        card=functools.partial(card.text, scores=rows, warnings=warnings),
        max_shard_bytes=max_shard_bytes,
        check_values=check_values,
        digest=digest,
    )
    return {
        "out": str(out),
        "dtype": dtype,
        "bytes": sum(file.stat().st_size for file in Path(out).glob("*.safetensors")),
        "params_sha256": manifest["params_sha256"],
        "licences": manifest["licences"],
        "warnings": warnings,
    }


def export_adapter(source: str, out: str, *, which: str, unfinished: bool = False) -> dict[str, Any]:
    """Save the adapter of a LoRA run under `out`, in peft's format."""
    from swallow_jax import checkpoint, lora

    if (opened := checkpoint.open_adapter(source, which=which, unfinished=unfinished)) is None:
        raise ValueError(f"{source} is no run with a `lora` section; without --adapter its whole model is written")
    adapter, settings, base = opened
    lora.save(out, adapter, settings, base=base)
    return {"out": str(out), "base": base, "rank": settings.rank, "adapter_sha256": lora.adapter_sha256(adapter)}


def open_source(source: str | Path, which: str, *, unfinished: bool = False) -> tuple[dict[str, Any], Any, Path]:
    """(tensors by HF name, config, folder or file with the tokenizer) of a run, HF folder, peft adapter or GGUF file.

    Nothing is read yet but adapters, which are merged into their base's rows as those pass.
    """
    from swallow_jax import checkpoint, hf, lora, weights

    source = Path(source)
    if source.suffix == ".gguf":
        config = hf.read_config(source)
        return hf.open_weights(source, config), config, source
    folder = checkpoint.model_folder(source)
    if (source / "adapter_config.json").is_file():
        tensors, config, _ = open_source(lora.read_settings(source)["base_model_name_or_path"], "best")
        return lora.merge_tensors(tensors, *lora.load(source, config)), config, folder
    if not (source / "checkpoints").is_dir():
        config = hf.read_config(folder)
        return hf.open_weights(folder, config), config, folder
    if not unfinished:
        checkpoint.require_finished(source)
    if opened := checkpoint.open_adapter(source, which=which, unfinished=True):
        adapter, settings, base = opened
        tensors, config, _ = open_source(base, "best")
        return lora.merge_tensors(tensors, adapter, settings), config, folder
    config = hf.read_config(folder)
    return hf.open_run_weights(weights.best_step(source, which), config), config, folder


def plus_difference(
    tensors: Mapping[str, Any], config: Any, instruct: str, base: str, scale: float, which: str
) -> tuple[dict[str, Any], Path]:
    """(tensors + scale * (instruct - base), folder with instruct's tokenizer); all three must have one architecture."""
    import numpy as np

    from swallow_jax.weights import Tensor

    (added, added_config, companions), (taken, taken_config, _) = open_source(instruct, which), open_source(base, which)
    for other, path, other_config in ((added, instruct, added_config), (taken, base, taken_config)):
        if different := [
            n for n in sorted({*tensors, *other}) if n not in other or n not in tensors or other[n].shape != tensors[n].shape
        ]:
            raise ValueError(f"{path} is of another shape ({different[0]}); only models of one architecture can be added")
        if fields := [f for f in vars(config) if f != "max_position_embeddings" and vars(config)[f] != vars(other_config)[f]]:
            raise ValueError(
                f"{path} has another {', '.join(fields)} in config.json; only models of one architecture can be added"
            )

    def rows(name: str, first: int, last: int) -> np.ndarray:
        sum_ = added[name].rows(first, last).astype(np.float32)
        sum_ -= taken[name].rows(first, last).astype(np.float32)
        sum_ *= np.float32(scale)
        sum_ += tensors[name].rows(first, last).astype(np.float32)
        return sum_

    made = {
        name: Tensor(shape=t.shape, dtype=np.dtype(np.float32), rows=functools.partial(rows, name), align=t.align)
        for name, t in tensors.items()
    }
    return made, companions


if __name__ == "__main__":
    door.tool(main, __doc__)
