"""The run folder: atomic files, config, manifest and lineage, metrics as lines of JSON.

Every program writes one folder that tells how to make it again: `config.json` (resolved), `manifest.json` (hash of each
input, parents, commit, versions, devices, licences inherited, and the result once the program has finished).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

FORMAT_VERSION = 1
# Names of fields, and URLs, that hold what belongs in an environment variable.
_SECRET = re.compile(r"(^|_)(api_?key|password|secret|token|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/\s@]+:[^/\s@]+@")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "grain")
T = TypeVar("T")


# Files: whole or absent.


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename: a reader sees all of it or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Atomic UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Atomic, indented JSON in UTF-8."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, default=_plain) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Atomic JSON lines in UTF-8."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; a line that is no JSON object raises ValueError with file and line number."""
    return list(iter_jsonl(path))


def iter_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, one at a time."""
    return (row for _, row in numbered_jsonl(path))


def numbered_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSON-lines file, one at a time; blank lines count, but give no row."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
                raise ValueError(f"{path}:{number}: not JSON ({reason}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a JSON object is wanted, this is {type(row).__name__}")
            yield number, row


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, UTF-8, no spaces)."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_path(path: str | os.PathLike) -> str:
    """Hash of an input: of the bytes of a file, or of the names and bytes of a folder's files (sorted, dot files left out)."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"input {path} does not exist; make it first, or correct the path in the config")
    manifest = path / "manifest.json"
    if manifest.is_file() and "inputs" in json.loads(manifest.read_text(encoding="utf-8")):
        return sha256_file(manifest)  # a run folder: its manifest already names its inputs and result
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.relative_to(path).parts))
    return sha256_json({str(p.relative_to(path)): sha256_file(p) for p in files})


# Config sections become dataclasses.


def build(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """`cls(**section)` with its field types checked; a missing, unknown or mistyped field raises ValueError naming it."""
    hints = typing.get_type_hints(cls)
    given = dict(section)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(fields)}")
    if missing := sorted(required - set(given)):
        raise ValueError(f"{where}: missing field {', '.join(missing)}; write it in the config (no default hides underneath)")
    return cls(**{name: _typed(value, hints[name], f"{where}.{name}") for name, value in given.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif dataclasses.is_dataclass(option):
            if isinstance(value, option):
                return value
            if isinstance(value, Mapping) or hasattr(value, "items"):
                return build(option, dict(value), where)
        elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        elif (
            option is Any
            or typing.get_origin(option) is not None
            or (isinstance(value, option) and (option is bool or not isinstance(value, bool)))
        ):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{where}: {value!r} is {type(value).__name__}, {names} is wanted")


# The folder.


class Run:
    """A folder that one program writes. `finished` says whether its result is already there."""

    def __init__(self, folder: Path, manifest: dict[str, Any], *, writes: bool = True):
        self.folder = folder
        self.manifest = manifest
        self.writes = writes  # of many processes, one does

    @property
    def finished(self) -> bool:
        return "result" in self.manifest

    @property
    def result(self) -> dict[str, Any]:
        return self.manifest["result"]

    def note(self, **fields: Any) -> None:
        """Add facts to the manifest (licences, counts, hashes)."""
        self.manifest.update(fields)
        if self.writes:
            write_json(self.folder / "manifest.json", self.manifest)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record the result; from now on the folder counts as whole."""
        started = self.manifest["started_at"]
        self.note(
            result=result, finished_at=_now(), seconds=round(time.time() - self.manifest["started_unix"], 1), started_at=started
        )
        return result


def open_run(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    inputs: Mapping[str, str | os.PathLike],
    parents: Iterable[str | os.PathLike] = (),
    free: Iterable[str] = (),
) -> Run:
    """Open (or continue) the run folder `workdir` for this config and these inputs.

    Raises ValueError, naming the first difference, when the folder holds another config or was made from other inputs. Sections
    of the config in `free` may change while the run is under way (where it runs, not what); the manifest keeps each change.
    """
    folder = Path(workdir)
    config = json.loads(json.dumps(config, default=_plain))
    if where := _secret(config, "config"):  # it would be written down
        raise ValueError(f"{where} holds a key or password; put it in an environment variable and name that one (api_key_env)")
    hashes = {name: {"path": str(path), "sha256": sha256_path(path)} for name, path in inputs.items()}
    lineage = {str(path): sha256_path(path) for path in parents}
    existing = folder / "manifest.json"
    others = {p.name for p in folder.iterdir() if not p.name.startswith(".")} if folder.is_dir() else set()
    if not existing.is_file() and others - {"config.json"}:
        raise ValueError(f"{folder} is not empty and holds no manifest.json; choose another --workdir")
    if "config.json" in others:  # alone: a run killed between its first two files
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fixed, wanted = ({k: v for k, v in c.items() if k not in set(free)} for c in (before, config))
        if difference := _difference(fixed, wanted):
            raise ValueError(f"{folder} holds another config ({difference}); choose another --workdir or remove the folder")
        moved = _difference(before, config)
    if existing.is_file():
        manifest = json.loads(existing.read_text(encoding="utf-8"))
        for path, sha256 in lineage.items():
            if manifest["parents"].get(path) != sha256:
                raise ValueError(f"{folder} was made from another {path} (it has changed since); choose another --workdir")
        for name, entry in hashes.items():
            if manifest["inputs"].get(name, {}).get("sha256") != entry["sha256"]:
                raise ValueError(f"{folder} was made from another {name} ({entry['path']} has changed); choose another --workdir")
        run = Run(folder, manifest)
        if moved and not run.finished:
            run.note(moved=[*manifest.get("moved", []), {"at": _now(), "to": moved}])
            write_json(folder / "config.json", config)
        return run
    write_json(folder / "config.json", config)
    manifest = {
        "format_version": FORMAT_VERSION,
        "inputs": hashes,
        "parents": lineage,
        **inherited([*inputs.values(), *lineage]),
        "git_commit": _git_commit(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "started_at": _now(),
        "started_unix": time.time(),
    }
    run = Run(folder, manifest)
    run.note()
    return run


class Metrics:
    """`metrics.jsonl`: one line a step, appended and flushed; on resume, lines after the restored step are cut away.

    With `tensorboard` the same numbers go to the folder tensorboard/ beside it. `tail`: the last 64 lines kept.
    """

    def __init__(self, path: str | os.PathLike, *, from_step: int, writes: bool = True, tensorboard: bool = False):
        self._board = _tensorboard(Path(path).parent / "tensorboard", from_step) if tensorboard and writes else None
        path = Path(path if writes else os.devnull)
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                # A kill may leave half a line; it belongs to a step after the checkpoint, so it goes too.
                if line.endswith("\n") and json.loads(line)["step"] <= from_step:
                    kept.append(line)
        if writes:
            write_text(path, "".join(kept))
        self.tail: list[dict[str, Any]] = [json.loads(line) for line in kept[-64:]]
        self.last: dict[str, Any] = self.tail[-1] if kept else {}
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, **values}, default=_plain) + "\n")
        self._file.flush()
        if self._board:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _tensorboard(folder: Path, from_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise ValueError("train.tensorboard wants tensorboardX: pip install 'swallow_jax[watch]', or set it to False") from None
    return tensorboardX.SummaryWriter(logdir=str(folder), purge_step=from_step + 1)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in nested dicts, names joined with slashes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def _secret(value: Any, where: str) -> str | None:
    """The first field that holds a key, a password, or a URL with a login in it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in parts:
        place = f"{where}[{name}]" if isinstance(name, int) else f"{where}.{name}"
        if isinstance(inner, str) and inner and (_SECRET.search(str(name)) or _LOGIN.search(inner)):
            return place
        if found := _secret(inner, place):
            return found
    return None


def _difference(before: Any, after: Any, path: str = "config") -> str | None:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(set(before) | set(after)):
            if key not in before or key not in after:
                return f"{path}.{key} is only in the {'new' if key in after else 'old'} one"
            if found := _difference(before[key], after[key], f"{path}.{key}"):
                return found
        return None
    return None if before == after else f"{path}: {before!r} there, {after!r} now"


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (Path, frozenset, set)):
        return str(value) if isinstance(value, Path) else sorted(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def inherited(paths: Iterable[str | os.PathLike]) -> dict[str, Any]:
    """What comes with these inputs: `licences` (sorted), `attributions` of texts, and `teachers` that wrote some of them."""
    licences, attributions, teachers = set(), {}, {}
    for path in map(Path, paths):
        facts = _declared(path)
        licences |= set(facts.get("licences", []))
        attributions |= {json.dumps(row, sort_keys=True): row for row in facts.get("attributions", [])}
        teachers |= facts.get("teachers", {})
    return {"licences": sorted(licences), "attributions": list(attributions.values()), "teachers": teachers}


def _declared(path: Path) -> dict[str, Any]:
    """The manifest of what made this file or folder; else the licence that a Hugging Face card (README.md) states."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "manifest.json").is_file():
            return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if found := card_licences(folder):
            return {"licences": found}
        if folder == path and (path.suffix == ".gguf" or (path / "config.json").is_file()):
            return {"licences": ["not stated"]}  # a model that somebody else made; its terms must be looked up
    return {}


def card_licences(folder: Path) -> list[str]:
    """`license` in the YAML head of a folder's README.md, as the Hugging Face hub writes it ("llama3.1", "apache-2.0")."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---") or "\n---" not in text:
        return []
    try:
        head = yaml.safe_load(text[3 : text.index("\n---")])
    except yaml.YAMLError:
        return []  # not a card's head
    if not isinstance(head, dict):
        return []
    stated = head.get("license") or []
    stated = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    return sorted({str(head.get("license_name") or name) if name == "other" else str(name) for name in stated})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


class Trace:
    """A profiler trace of the steps first ... last, for TensorBoard's profile plugin or Perfetto."""

    def __init__(self, folder: Path, window: tuple[int, ...]):
        self.folder, self.window, self.running = folder, window, False

    def before(self, step: int) -> None:
        if self.window and step == self.window[0]:
            import jax

            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int) -> None:
        if self.window and step >= self.window[1]:
            self.close()

    def close(self) -> None:
        if self.running:
            import jax

            jax.profiler.stop_trace()
            self.running = False


class Progress:
    """A line with step, loss, speed and ETA: rewritten on a terminal, every `log_every` steps elsewhere."""

    def __init__(self, first: int, total: int, every: int, *, speaks: bool):
        self.first, self.total, self.every, self.speaks, self.began = first, total, every, speaks, time.perf_counter()

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        terminal = sys.stderr.isatty()
        if not self.speaks or (not terminal and step % self.every and step != self.total):
            return
        left = (time.perf_counter() - self.began) / max(step - self.first, 1) * (self.total - step)
        heldout = f"  held-out {values['heldout_loss']:.4f}" if "heldout_loss" in values else ""
        line = (
            f"step {step}/{self.total}  loss {values['loss']:.4f}{heldout}  grad {values['grad_norm']:.2f}"
            f"  {values['tokens_per_s']:,.0f} tokens/s  MFU {values['mfu']:.0%}  ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        end = "\n" if not terminal or step == self.total or heldout else "\r"
        print(f"\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)
