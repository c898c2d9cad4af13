#!/usr/bin/env bash
# Make .venv, install, run the tests in two processes. Nothing else is needed on a fresh machine with Python 3.11 or 3.12.
#   bash tools/test.sh [pytest arguments]      -n 0 runs them in one process
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-test}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q --disable-pip-version-check -c tests/requirements.lock -e ".[$EXTRAS]"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal "$@"
