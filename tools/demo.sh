#!/usr/bin/env bash
# Make .venv, install, and run the whole method at toy size: base -> CPT -> synthesis -> SFT -> evaluation -> table and page.
#   bash tools/demo.sh            about ten minutes on two cores; a second run resumes and ends in seconds
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -c "import swallow_jax, sklearn, rensa, jax" 2>/dev/null ||
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e ".[baselines]"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$VENV/bin/python" -m experiments.pipeline --config=configs/pipeline/demo.py --workdir=runs/demo "$@"
