"""Imports only go down (the picture in the README): no room knows the rooms above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Room -> rooms of ours that it may import, lazily or not.
MAY = {
    "mesh": set(),
    "run": set(),
    "stats": set(),
    "vocabulary": set(),
    "text": {"vocabulary"},
    "figures": set(),
    "quant": set(),
    "kernels": {"mesh"},
    "loss": {"mesh"},
    "attention": {"kernels", "mesh"},
    "llama": {"attention", "mesh"},
    "optim": set(),
    "weights": {"run"},
    "placing": {"weights"},
    "gguf_files": {"llama", "weights"},
    "hf": {"gguf_files", "llama", "mesh", "placing", "run", "text", "weights"},
    "lora": {"hf", "llama", "run", "weights"},
    "hosts": {"run"},
    "checkpoint": {"hf", "hosts", "llama", "lora", "mesh", "run", "weights"},
    "train": {"llama", "loss", "lora", "optim", "checkpoint", "hosts", "mesh", "run", "hf"},
    "task": {"run"},
    "lineage": {"run"},
    "launch": set(),
    "sweep": {"run", "stats"},
    "report": {"run", "stats", "figures"},
    "versions": {"report", "run", "stats"},
    "browser": {"figures"},
    "page": {"browser", "figures", "report", "run", "stats", "versions"},
    "data": {"data", "text", "run"},
    "generate": {"generate", "llama", "mesh", "text", "hf", "checkpoint", "quant", "run"},
    "synth": {"synth", "task", "generate", "text", "run", "stats", "data", "figures"},
    "evaluate": {"evaluate", "task", "generate", "text", "run", "stats"},
    "check": {"data", "evaluate", "run", "stats", "task"},
    "audit": {"check", "run", "stats", "task"},
    "verdict_script": set(),
    "verdict_page": {"check", "figures", "task", "verdict_script"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_only_go_down():
    for file in sorted((ROOT / "swallow_jax").rglob("*.py")):
        parts = file.relative_to(ROOT / "swallow_jax").with_suffix("").parts
        if parts == ("__init__",):
            continue
        rooms = {name.split(".")[1] for name in imported(file) if name.startswith("swallow_jax.")}
        assert rooms <= MAY[parts[0]], f"{file.relative_to(ROOT)} imports {sorted(rooms - MAY[parts[0]])}"
        above = {name for name in imported(file) if name.split(".")[0] in ("experiments", "tools", "configs", "tests")}
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_only_the_loader_of_the_data_room_touches_devices():
    for file in (ROOT / "swallow_jax" / "data").glob("*.py"):
        assert file.stem == "loader" or not {n for n in imported(file) if n.split(".")[0] == "jax"}, file.name


def test_configs_hold_numbers_alone():
    for file in (ROOT / "configs").rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(file)} - {
            "collections",
            "configs",
            "itertools",
            "ml_collections",
            "typing",
        }
        assert not outside, f"{file.relative_to(ROOT)} imports {outside}"


def test_the_trainer_and_sampler_need_no_text_libraries():
    """A bare accelerator image has neither datasets nor grain nor torch; at module level nothing may ask for them."""
    for name in ("train", "llama", "generate/engine", "generate/steps", "generate/scorer", "hf", "checkpoint"):
        tree = ast.parse((ROOT / "swallow_jax" / f"{name}.py").read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in top} & {"datasets", "datatrove", "grain", "torch", "transformers"}, name
