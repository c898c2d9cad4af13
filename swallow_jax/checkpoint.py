"""Checkpoints of a run (Orbax), and the one place that says where parameters come from.

Order of initialisation of a training run: its own last checkpoint; else the model it starts from (an HF folder or another
run); else random weights. A run folder holds `model/` (config.json and tokenizer files of the model it trains) and
`checkpoints/<step>/`; Orbax renames a step's folder when it is whole, so a killed save is never taken for one. A run with a
`lora` section holds the adapter alone: it is opened with the model it started from, which must be the same as then.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from swallow_jax import hf, llama, lora, run, weights
from swallow_jax import mesh as meshes
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
    """The folder with config.json and tokenizer of a model given as an HF folder, a GGUF file, a run or a peft adapter."""
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        return model_folder(lora.read_settings(path)["base_model_name_or_path"])
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


def require_finished(path: str | Path) -> None:
    """Raise ValueError, naming the step, where `path` is a training run that has not come to its end."""
    if not (Path(path) / "checkpoints").is_dir():
        return
    manifest, steps = _manifest(path), _steps(path)
    if "result" not in manifest and (not steps or steps[-1] != manifest.get("steps")):
        raise ValueError(
            f"{path} is half trained: step {steps[-1] if steps else 0} of {manifest.get('steps', 'more')}; let its own command"
            " finish it, or say that it is meant (init_unfinished=True in a config, --unfinished of a tool)"
        )


def open_model(
    path: str | Path, *, dtype: Any = None, mesh: Any = None, which: str = "best", unfinished: bool = False
) -> tuple[Params, LlamaConfig]:
    """Parameters and config of an HF folder, a GGUF file, a training run (its `best` or `last` checkpoint) or a peft adapter.

    Adapters come merged into their base. dtype None: that of the file; of a run or an adapter float32. Raises ValueError for
    a run that is half trained unless `unfinished`, and for an adapter whose base has changed since it was trained.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        base = lora.read_settings(path)["base_model_name_or_path"]
        params, config = open_model(base, dtype=dtype or jax.numpy.float32, mesh=mesh)
        return lora.merge(params, *lora.load(path, config)), config
    if not (path / "checkpoints").is_dir():
        return hf.load(path, dtype=dtype, mesh=mesh)
    if not unfinished:
        require_finished(path)
    dtype = dtype or jax.numpy.float32
    if opened := open_adapter(path, mesh=mesh, which=which, unfinished=True):
        adapter, settings, base = opened
        params, config = open_model(base, dtype=dtype, mesh=mesh)
        return lora.merge(params, adapter, settings), config
    config = hf.read_config(model_folder(path))
    shapes, _ = llama.abstract_params(config, dtype)
    return _restore(path, which, shapes, hf.placements(config, mesh)), config


def open_adapter(
    path: str | Path, *, mesh: Any = None, which: str = "best", unfinished: bool = False
) -> tuple[lora.Adapter, lora.LoraConfig, str] | None:
    """(adapter, its config, the model it belongs to) of a run with a `lora` section; None for any other run."""
    path = Path(path)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() else {}
    if not (path / "checkpoints").is_dir() or not settings.get("lora"):
        return None
    if not unfinished:
        require_finished(path)
    base = settings["init"]
    if run.sha256_path(base) != _manifest(path)["parents"][base]:
        raise ValueError(f"{path} is an adapter to {base}, which has changed since; bring back the model it was trained on")
    config, settings = hf.read_config(model_folder(path)), run.build(lora.LoraConfig, settings["lora"], "lora")
    shapes = jax.eval_shape(lambda: lora.init(config, settings, jax.random.key(0)))
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _, names: meshes.sharding(mesh, names) if mesh else one, shapes, lora.axes(config, settings))
    return _restore(path, which, shapes, places), settings, base


def _restore(path: Path, which: str, shapes: Any, places: Any) -> Any:
    """The trained parameters of a run's checkpoint, with these shapes and shardings."""
    import orbax.checkpoint as ocp

    folder = weights.best_step(path, which).resolve()
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)
    restore_args = jax.tree.map(lambda t: ocp.ArrayRestoreArgs(dtype=t.dtype, sharding=t.sharding), target)
    partial = ocp.args.PyTreeRestore(item={"params": target}, restore_args={"params": restore_args}, partial_restore=True)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder.parent, options=options) as manager:
        restored = manager.restore(int(folder.name), args=ocp.args.Composite(state=partial))
    return restored["state"]["params"]


def _steps(path: str | Path) -> list[int]:
    """The steps whose checkpoints are whole."""
    return sorted(int(p.name) for p in (Path(path) / "checkpoints").iterdir() if p.name.isdigit())


def _manifest(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
