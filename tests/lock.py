"""tests/requirements.lock: the versions that the tests were last seen green with, for each Python.

    .venv/bin/python -m tests.lock          # writes this Python's versions anew, keeps the other Pythons' lines
    pip install -c tests/requirements.lock -e '.[test]'

A constraints file: it installs nothing by itself, and says which version of what is installed.
"""

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).with_name("requirements.lock")
_HEAD = "# Constraints of the tests, made by `python -m tests.lock`; "
_PYTHONS = re.compile(r"Pythons: (.+)")
_LINE = re.compile(r'([a-z0-9.-]+)==(\S+?)(?:; python_version == "([\d.]+)")?')


def closure(requirement: str, extra: str = "") -> set[str]:
    """The distributions that `pip install requirement[extra]` brings, by what is installed here."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    left = [(canonicalize_name(requirement), ""), (canonicalize_name(requirement), extra)]
    while left:
        name, wanted = left.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            declared = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        for line in map(Requirement, declared):
            if line.marker is None or line.marker.evaluate({"extra": wanted}):
                left += [(canonicalize_name(line.name), one) for one in ("", *line.extras)]
    return found


def read(text: str) -> dict[str, dict[str, str]]:
    """Name -> Python -> version."""
    pythons = _PYTHONS.search(text)[1].split()
    pins: dict[str, dict[str, str]] = {}
    for line in filter(lambda line: line and not line.startswith("#"), text.splitlines()):
        name, version, python = _LINE.fullmatch(line).groups()
        pins.setdefault(name, {}).update(dict.fromkeys([python] if python else pythons, version))
    return pins


def written(pins: Mapping[str, Mapping[str, str]]) -> str:
    """The file's text: one line for a version that all Pythons share, else one a Python."""
    pythons = sorted({python for versions in pins.values() for python in versions})
    lines = [f"{_HEAD}Pythons: {' '.join(pythons)}"]
    for name, versions in sorted(pins.items()):
        if len(versions) == len(pythons) and len(set(versions.values())) == 1:
            lines.append(f"{name}=={versions[pythons[0]]}")
        else:
            lines += [f'{name}=={version}; python_version == "{python}"' for python, version in sorted(versions.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    here = ".".join(platform.python_version_tuple()[:2])
    pins = read(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else {}
    pins = {name: {python: v for python, v in versions.items() if python != here} for name, versions in pins.items()}
    for name in closure("swallow_jax", "test") - {"swallow-jax"}:
        pins.setdefault(name, {})[here] = importlib.metadata.version(name).partition("+")[0]
    LOCK.write_text(written({name: versions for name, versions in pins.items() if versions}), encoding="utf-8")
    print(f"{LOCK}: {sum(here in versions for versions in pins.values())} distributions for Python {here}")


if __name__ == "__main__":
    main()
