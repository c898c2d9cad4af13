"""Write a run's model (or a GGUF file's) as an HF folder that transformers 4 and 5, vLLM and harnesses load.

    python -m tools.export --run=runs/sft/tiny --out=exported --dtype=bfloat16

The best checkpoint by held-out loss is taken unless --which=last. An existing --out is refused.
"""

from typing import Any

from absl import flags

from experiments import door

_RUN = flags.DEFINE_string("run", None, "run folder, HF folder or GGUF file")
_OUT = flags.DEFINE_string("out", None, "HF folder to write")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "dtype of the weights written")
_WHICH = flags.DEFINE_enum("which", "best", ["best", "last"], "checkpoint of a run")


def main() -> dict[str, Any]:
    """Export; returns the folder, its parameter hash and size."""
    if not _RUN.value or not _OUT.value:
        raise ValueError("--run and --out are needed; --help shows an example")
    return export(_RUN.value, _OUT.value, dtype=_DTYPE.value, which=_WHICH.value)


def export(source: str, out: str, *, dtype: str, which: str) -> dict[str, Any]:
    """Open `source` and save it under `out`; the hash is that of the weights as written."""
    from pathlib import Path

    from swallow_jax import checkpoint, hf

    params, config = checkpoint.open_model(source, which=which)
    hf.save(
        out,
        params,
        config,
        dtype=dtype,
        source_folder=source if str(source).endswith(".gguf") else checkpoint.model_folder(source),
    )
    written, _ = hf.load(out)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    return {"out": str(out), "dtype": dtype, "bytes": size, "params_sha256": hf.params_sha256(written, config)}


if __name__ == "__main__":
    door.tool(main, __doc__)
