"""Checkpoints of a run (Orbax), and the one place that says where parameters come from.

Order of initialisation of a training run: its own last checkpoint; else the model it starts from (an HF folder or another
run); else random weights. A run folder holds `model/` (config.json and tokenizer files of the model it trains) and
`checkpoints/<step>/`; Orbax renames a step's folder when it is whole, so a killed save is never taken for one.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from swallow_jax import hf, llama
from swallow_jax.llama import LlamaConfig, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every: int  # steps; a multiple of the held-out interval, so that every checkpoint has a held-out loss
    keep_last: int
    keep_best: int  # by held-out loss


class Checkpoints:
    """The `checkpoints/` of a run folder: state and data position of a step, saved and restored together."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        self.save_every = config.save_every
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_best:
            # Orbax's "best" is the largest; reverse=True makes it the smallest held-out loss.
            keep.append(policies.BestN(get_metric_fn=lambda m: m["heldout_loss"], reverse=True, n=config.keep_best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=lambda m: m["heldout_loss"],  # makes Orbax keep the metrics that BestN reads after a restart
            best_mode="min",
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)

    def latest_step(self) -> int | None:
        """The last whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any], heldout_loss: float) -> None:
        """Save `state` and the data position after `step`; returns while the files are still being written."""
        data = {**data, "heldout_loss": heldout_loss}
        args = self._ocp.args.Composite(state=self._ocp.args.StandardSave(state), data=self._ocp.args.JsonSave(data))
        with self._writing():
            self._manager.save(step, args=args, metrics={"heldout_loss": heldout_loss}, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of a step; `abstract` carries shapes, dtypes and the placement wanted now."""
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract), data=self._ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk as OSError: Orbax gives the error of its writing thread, a ValueError of many lines, to the next call."""
        try:
            yield
        except ValueError as error:
            if (found := re.search(r"os_error_code='(\d+)'", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(self._manager.directory)) from None


def model_folder(path: str | Path) -> Path:
    """The folder with config.json and tokenizer of a model given as an HF folder, a GGUF file's folder or a run folder."""
    path = Path(path)
    if path.is_file():
        if not (path.parent / "tokenizer.json").is_file():
            raise ValueError(
                f"{path} has no tokenizer files beside it; python -m tools.export --run={path} --out=DIR, and give DIR"
            )
        return path.parent
    inner = path / "model"
    if (inner / "config.json").is_file():
        return inner
    if not path.is_dir():
        raise FileNotFoundError(f"model {path} does not exist; give an HF folder, a GGUF file or a run folder")
    return path


def open_model(path: str | Path, *, dtype: Any = None, mesh: Any = None, which: str = "best") -> tuple[Params, LlamaConfig]:
    """Parameters and config of an HF folder, a GGUF file or a training run (its `best` or `last` checkpoint)."""
    path = Path(path)
    if not (path / "checkpoints").is_dir():
        return hf.load(path, dtype=dtype, mesh=mesh)
    import json

    import orbax.checkpoint as ocp

    config = hf.read_config(model_folder(path))
    root = (path / "checkpoints").resolve()
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"{root} holds no whole checkpoint; train the run first")
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r}; known: best, last")
    losses = {s: json.loads((root / str(s) / "data" / "metadata").read_text())["heldout_loss"] for s in steps}
    step = steps[-1] if which == "last" else min(steps, key=lambda s: (losses[s], s))
    shapes, _ = llama.abstract_params(config, dtype or jax.numpy.float32)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, hf.placements(config, mesh))
    restore_args = jax.tree.map(lambda t: ocp.ArrayRestoreArgs(dtype=t.dtype, sharding=t.sharding), target)
    partial = ocp.args.PyTreeRestore(item={"params": target}, restore_args={"params": restore_args}, partial_restore=True)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(root, options=options) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(state=partial))
    return restored["state"]["params"], config
