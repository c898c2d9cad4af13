"""Lineage: from a row of a table back to the documents, by the manifests that every program writes, and a run made again.

A node of the tree is a folder that a program wrote, or a file or folder that came from outside. What a manifest says of an
input (its SHA-256 when the program ran) is compared with what lies there now.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swallow_jax import run

# A field that the config of one program alone has; what must be equal when it runs again (globs; none: params_sha256).
_PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "report": ("evaluations", ("results.json", "index.html")),
    "pipeline": ("stages", ()),  # a report's config has such a field too
    "evaluate": ("comparisons", ("*predictions*.jsonl", "questions.jsonl", "slices.jsonl", "scores.json")),
    "synthesize": ("teachers", ("plan.jsonl", "accepted.jsonl", "rejected.jsonl", "train.jsonl", "dev.jsonl")),
    "prepare": ("pack", ("train/*", "heldout/*", "tokenizer/*", "documents/*")),
    "sft": ("data.samples", ()),
    "cpt": ("data.mixture", ()),
}
_FILES = 20  # of a folder from outside, listed by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """`names`: what its parent calls it; `state` against the parent's manifest: 'unchanged', 'changed', 'missing'."""

    path: str
    names: tuple[str, ...]
    program: str | None  # that wrote the folder; None: from outside
    facts: tuple[str, ...]
    state: str
    again: bool  # shown above; its children stand there
    children: tuple["Node", ...]


def program_of(config: Mapping[str, Any]) -> str:
    """Which program of experiments/ a config.json belongs to; "a tool" for another one."""
    for program, (field, _) in _PROGRAMS.items():
        value: Any = config
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return program
    return "a tool"


# The tree


def trace(folder: str | Path, model: str | None = None) -> Node:
    """The tree behind a run folder; with `model`, behind that model's rows in its table alone.

    Raises FileNotFoundError for a folder without manifest.json, ValueError for a model that the table does not have.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder / 'manifest.json'} does not exist; name a folder that a program of experiments/ wrote")
    if model is not None:
        rows(folder, model)
    return _Tracer(model).node(str(folder), (), "unchanged")


def rows(folder: str | Path, model: str) -> list[dict[str, Any]]:
    """The rows of a model in results.json or scores.json of a folder."""
    folder = Path(folder)
    table = next((folder / name for name in ("results.json", "scores.json") if (folder / name).is_file()), None)
    if table is None:
        raise FileNotFoundError(f"{folder} holds neither results.json nor scores.json; a row is named as REPORT_FOLDER#MODEL")
    found = _json(table)["scores"]
    if not (chosen := [row for row in found if row["model"] == model]):
        known = ", ".join(dict.fromkeys(row["model"] for row in found))
        raise ValueError(f"{table} has no row of {model!r}; it has: {known}")
    return chosen


class _Tracer:
    def __init__(self, model: str | None):
        self.model = model
        self.seen: set[str] = set()
        self.hashes: dict[str, str | None] = {}

    def node(self, path: str, names: tuple[str, ...], state: str) -> Node:
        manifest = _manifest(Path(path))
        program = program_of(_json(Path(path) / "config.json")) if manifest else None
        again = path in self.seen
        self.seen.add(path)
        children = () if again else tuple(self.inputs(Path(path), manifest) if manifest else _files(Path(path)))
        facts = _facts(manifest) if manifest else ()
        return Node(path=path, names=names, program=program, facts=facts, state=state, again=again, children=children)

    def inputs(self, folder: Path, manifest: Mapping[str, Any]) -> Iterator[Node]:
        """A child for each run folder among the inputs (whatever files of it were read), and for each input from outside."""
        if "stages" in manifest:  # a pipeline: its last stage has read the others
            yield self.node(str(folder / list(manifest["stages"])[-1]), (), "unchanged")
            return
        left_out = _of_other_models(folder, self.model)
        owners: dict[str, dict[str, str]] = {}  # path of a node -> name of an input -> its state
        for name, path, sha256 in _recorded(manifest):
            if path in left_out or (self.model and self._without_the_model(path)):
                continue
            now = self._hash(path)
            state = "missing" if now is None else "unchanged" if now == sha256 else "changed"
            states = owners.setdefault(_maker(path) or path, {})
            states[name] = max(states.get(name, ""), state, key=("", "unchanged", "changed", "missing").index)
        for owner, states in owners.items():
            worst = next(s for s in ("missing", "changed", "unchanged") if s in states.values())
            names = tuple(name for name in states if name != owner)
            yield self.node(owner, names, worst)

    def _without_the_model(self, path: str) -> bool:
        """Whether this is an evaluation (of several in a report) in which the model took no part."""
        scores = Path(path) / "scores.json"
        return scores.is_file() and all(row["model"] != self.model for row in _json(scores)["scores"])

    def _hash(self, path: str) -> str | None:
        if path not in self.hashes:
            self.hashes[path] = run.sha256_path(path) if Path(path).exists() else None
        return self.hashes[path]


def _recorded(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, path, SHA-256) of parents and inputs; one that is both comes once."""
    for path, sha256 in manifest["parents"].items():
        yield "parent", path, sha256
    for name, entry in manifest["inputs"].items():
        if entry["path"] not in manifest["parents"]:
            yield name, entry["path"], entry["sha256"]


def _of_other_models(folder: Path, model: str | None) -> set[str]:
    """Paths that only other models of an evaluation need."""
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    entries = config.get("models") or ()
    if model is None or not any(entry.get("name") == model for entry in entries):
        return set()
    used = {entry.get("path") for entry in entries if entry["name"] == model}
    return {entry["path"] for entry in entries if entry.get("path")} - used


def _maker(path: str) -> str | None:
    """The run folder in which this lies (or which it is), or None for what came from outside."""
    for folder in (Path(path), *Path(path).parents):
        if _manifest(folder):
            return str(folder)
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a program's folder; {} for a folder of ours that no program wrote (configs/base), or of others."""
    file = folder / "manifest.json"
    found = _json(file) if file.is_file() and (folder / "config.json").is_file() else {}
    return found if "stages" in found or {"inputs", "parents", "started_at"} <= set(found) else {}


def _files(folder: Path) -> Iterator[Node]:
    """The files of a folder from outside."""
    if not folder.is_dir():
        return
    inside = ((file, file.relative_to(folder).parts) for file in sorted(folder.rglob("*")) if file.is_file())
    files = [file for file, parts in inside if not any(part.startswith(".") for part in parts)]
    for file in files[:_FILES]:
        size = f"{file.stat().st_size:,} bytes"
        facts = (size, f"sha256 {run.sha256_file(file)[:12]}") if file.stat().st_size < 1 << 26 else (size,)
        name = file.relative_to(folder).as_posix()
        yield Node(path=name, names=(), program=None, facts=facts, state="unchanged", again=False, children=())
    if (rest := len(files) - _FILES) > 0:
        yield Node(path=f"{rest:,} more files", names=(), program=None, facts=(), state="unchanged", again=False, children=())


def _facts(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells one run from another, in a few words."""
    result = manifest.get("result")
    if result is None:
        return ("not finished",)
    found = [str(manifest.get("started_at", ""))[:10], f"commit {(manifest.get('git_commit') or 'unknown')[:10]}"]
    for name in ("params_sha256", "steps", "tokens", "documents_in", "kept", "accepted", "n"):
        value = result.get(name)
        if isinstance(value, str):
            found.append(f"{name} {value[:12]}")
        elif isinstance(value, int):
            found.append(f"{name.replace('_', ' ')} {value:,}")
    if sources := [f"{a['source']} ({a['licence']})" for a in manifest.get("attributions", ()) if "source" in a]:
        found.append("documents: " + ", ".join(sources))
    return tuple(filter(None, found))


def lines(node: Node, model: str | None = None) -> Iterator[str]:
    """The tree as text, one line a node, below the table's rows of `model`."""
    for row in rows(node.path, model) if model else ():
        ends = "" if not row.get("ci95") else " [{:.4g} to {:.4g}]".format(*row["ci95"])
        yield f"{row['model']}: {row['metric']} on {row['test_set']}, n {row['n']}: {row['value']:.4g}{ends}"
    yield from _lines(node, "", "")


def _lines(node: Node, head: str, tail: str) -> Iterator[str]:
    words = [f"{node.program}: {node.path}" if node.program else node.path]
    words += [f"as {', '.join(node.names)}"] if node.names else []
    words += [] if node.again else node.facts
    words += [f"** {node.state} since **"] if node.state != "unchanged" else []
    yield head + "; ".join(words) + (" (see above)" if node.again and (node.program or Path(node.path).is_dir()) else "")
    for number, child in enumerate(node.children, 1):
        last = number == len(node.children)
        yield from _lines(child, tail + ("└─ " if last else "├─ "), tail + ("   " if last else "│  "))


def summary(node: Node) -> dict[str, Any]:
    """Counts of a tree, and what is no more as the manifests say."""
    nodes = list(_walk(node))
    found = {state: sorted({n.path for n in nodes if n.state == state}) for state in ("changed", "missing")}
    runs = {n.path for n in nodes if n.program}
    return {"root": node.path, "runs": len(runs), "inputs": len({n.path for n in nodes} - runs), **found}


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


# Once more


def remake(folder: str | Path, make: Callable[[str, dict[str, Any], Path], Any]) -> dict[str, Any]:
    """Run a folder's program again, `make(program, config, workdir)`, in a hidden folder beside it, and compare.

    Inputs are held against the manifest first. The new folder is removed when all is equal, and kept and named when not; a
    remake that was killed goes on. Returns {"folder", "program", "equal", "compared", "differs", ...}.
    Raises ValueError for a folder that cannot be made again, saying why.
    """
    folder = Path(folder)
    node_manifest = _manifest(folder)
    if not node_manifest:
        raise FileNotFoundError(f"{folder} holds no config.json and manifest.json of a program; name a run folder")
    config = _json(folder / "config.json")
    program = program_of(config)
    _refuse(folder, program, config, node_manifest)
    again = folder.parent / f".{folder.name}.again"
    if "result" in _manifest(again):  # an earlier remake that came out differently
        shutil.rmtree(again)
    make(program, tuples(config), again)
    second = _manifest(again)
    compared, differs = _compare(folder, again, program, node_manifest, second)
    packages = {name: [node_manifest["packages"].get(name), version] for name, version in second["packages"].items()}
    found = {
        "folder": str(folder),
        "program": program,
        "equal": not differs,
        "compared": compared,
        "differs": differs,
        "commits": [node_manifest["git_commit"], second["git_commit"]],
        "other_versions": {name: pair for name, pair in packages.items() if pair[0] != pair[1]},
    }
    if not differs:
        shutil.rmtree(again)
        return found
    return found | {"kept": str(again)}


def _refuse(folder: Path, program: str, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    if program not in _PROGRAMS:
        raise ValueError(f"{folder} belongs to no program of experiments/; known are folders of {', '.join(_PROGRAMS)}")
    if program == "pipeline":
        stages = ", ".join(str(folder / name) for name in manifest["stages"])
        raise ValueError(f"{folder} is a pipeline; make its stages again one by one: {stages}")
    if "result" not in manifest:
        raise ValueError(f"{folder} is not finished; run its program again, it goes on where it stopped")
    for _, path, sha256 in _recorded(manifest):
        if not Path(path).exists():
            raise ValueError(f"{folder} cannot be made again: its input {path} is gone; bring it back")
        if run.sha256_path(path) != sha256:
            raise ValueError(f"{folder} cannot be made again: its input {path} has changed since; bring the old one back")
    if where := next(_endpoints(config), None):
        raise ValueError(
            f"{folder} cannot be made again: {where} is an endpoint, whose answers are not ours to repeat; replay the answers "
            "it gave (responses_*.jsonl) as a backend of kind 'recorded'"
        )


def _endpoints(value: Any, where: str = "config") -> Iterator[str]:
    if isinstance(value, Mapping):
        if value.get("kind") == "endpoint":
            yield where
        for name, inner in value.items():
            yield from _endpoints(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _endpoints(inner, f"{where}[{number}]")


def _compare(folder: Path, again: Path, program: str, first: Mapping, second: Mapping) -> tuple[list[str], list[str]]:
    globs = _PROGRAMS[program][1]
    if not globs:
        equal = first["result"]["params_sha256"] == second["result"]["params_sha256"]
        return ["params_sha256"], [] if equal else ["params_sha256"]
    names = sorted({
        file.relative_to(place).as_posix() for place in (folder, again) for pattern in globs for file in place.glob(pattern)
        if file.is_file()
    })  # fmt: skip
    if not names:
        raise ValueError(f"{folder} holds none of {', '.join(globs)}; nothing to compare")
    pairs = [(name, folder / name, again / name) for name in names]
    differs = [n for n, a, b in pairs if not (a.is_file() and b.is_file()) or run.sha256_file(a) != run.sha256_file(b)]
    return names, differs


def tuples(value: Any) -> Any:
    """A config as its file made it: JSON knows no tuples, configs know no lists."""
    if isinstance(value, Mapping):
        return {name: tuples(inner) for name, inner in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def split_row(given: str) -> tuple[str, str | None]:
    """FOLDER or FOLDER#MODEL (the rows of one model) -> (folder, model or None)."""
    if Path(given).is_dir():
        return given, None
    folder, sign, model = given.partition("#")
    if sign and not re.search(r"\S", model):
        raise ValueError(f"{given!r} names no model behind #; write FOLDER#MODEL")
    return folder, model or None


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}); mend or remove it") from None
