"""Measure one room of the house; the last line of output is JSON.

    python -m tools.bench load --size=tiny --peer=cp

names: load, sample, prepare, synthesize, train (each has its own --help).
"""

import importlib
import sys

NAMES = ("load", "sample", "prepare", "synthesize", "train")


def main(argv: list[str]) -> int:
    """Run the benchmark `argv[0]` with the other arguments; 2 for an unknown name."""
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    if argv[0] not in NAMES:
        print(f"error: no benchmark {argv[0]!r}; known: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"tools.bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
