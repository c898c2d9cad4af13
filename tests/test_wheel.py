"""The wheel carries the library alone, and the library needs nothing but its base dependencies."""

import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import swallow_jax
from tests.lock import closure

ROOT = Path(__file__).parent.parent
# Run in an empty folder: every module of the package, imported; prints where it came from and how many there are.
EVERY_MODULE = """
import importlib, json, pkgutil, sys
import swallow_jax
names = [m.name for m in pkgutil.walk_packages(swallow_jax.__path__, "swallow_jax.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"version": swallow_jax.__version__, "file": swallow_jax.__file__, "modules": len(names)}))
"""

# Before it: top-level modules that are made impossible to import.
BLOCKER = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {hidden!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Hide())
"""


def test_every_module_imports_without_what_only_an_extra_brings(tmp_path):
    """What no base dependency needs is hidden from the import system of a fresh process."""
    from packaging.utils import canonicalize_name

    base = closure("swallow_jax")
    assert {"jax", "flax", "transformers", "datasets"} <= base and not base & {"openai", "pytest", "scikit-learn", "starlette"}
    owners = importlib.metadata.packages_distributions()
    hidden = sorted(module for module, names in owners.items() if not {canonicalize_name(name) for name in names} & base)
    assert {"openai", "sklearn", "starlette", "uvicorn", "pytest", "gguf"} <= set(hidden)
    blocker = BLOCKER.format(hidden=hidden)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", blocker + EVERY_MODULE], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["modules"] == len(modules())


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(swallow_jax.__path__, "swallow_jax.")]


def test_every_folder_of_the_library_is_a_package():
    """setup.py finds packages by their __init__.py; a folder without one would be missing from the wheel."""
    for file in (ROOT / "swallow_jax").rglob("*.py"):
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """dist/ by `python -m build`, from a copy of what git tracks and of what is new: building leaves traces in its tree."""
    folder = tmp_path_factory.mktemp("build")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if name.startswith(("swallow_jax/", "setup.py", "README.md", "LICENSE", "tests/helpers.py", "experiments/door.py")):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    python = clean_environment(folder.parent / "builder", "build")
    command = [python, "-m", "build", "--outdir", folder / "dist"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "dist"


def clean_environment(home: Path, *install: str | Path) -> Path:
    """A new virtual environment with these installed; returns its python."""
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *install]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


@pytest.mark.proof
def test_the_wheel_carries_the_library_alone(built):
    version = swallow_jax.__version__
    wheel = built / f"swallow_jax-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert {name.split("/")[0] for name in inside} == {"swallow_jax", f"swallow_jax-{version}.dist-info"}
    sources = {f.relative_to(ROOT).as_posix() for f in (ROOT / "swallow_jax").rglob("*") if f.is_file() and f.suffix != ".pyc"}
    assert {name for name in inside if name.startswith("swallow_jax/")} == sources
    assert any(name.endswith("LICENSE") for name in inside)


@pytest.mark.proof
def test_the_sdist_builds_what_the_wheel_holds(built):
    with tarfile.open(built / f"swallow_jax-{swallow_jax.__version__}.tar.gz") as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "README.md", "LICENSE", "PKG-INFO", "swallow_jax/llama.py", "swallow_jax/synth/rounds.py"} <= inside
    assert not any(name.split("/")[0] in ("configs", "experiments", "tools", "notebooks", "runs") for name in inside)


@pytest.mark.proof
def test_a_clean_environment_with_the_base_dependencies_imports_every_module(built, tmp_path):
    """pip install dist/*.whl into a new environment, then every module from an empty folder."""
    home = tmp_path / "venv"
    python = clean_environment(home, "-c", ROOT / "tests" / "requirements.lock", next(built.glob("*.whl")))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", EVERY_MODULE], cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == "0.1.0" and told["modules"] == len(modules())
    assert Path(told["file"]).is_relative_to(home)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    assert not {row["name"].lower() for row in json.loads(listed.stdout)} & {"openai", "torch", "scikit-learn", "pytest", "ray"}
