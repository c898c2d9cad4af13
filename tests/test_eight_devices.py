"""Runs eight_devices.py: the number of CPU devices is fixed when JAX starts, and changes bits, so they get their own process."""

import os
import subprocess
import sys
from pathlib import Path


def test_claims_on_eight_devices():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "tests/eight_devices.py"],
        cwd=root,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
