"""Live parity with transformers and torch: tools.verify at 16,000 tokens, and the real SmolLM2-135M from its GGUF file."""

import json
import subprocess
import sys

import pytest

from tests.helpers import KINDS, write_checkpoint

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kind", KINDS)
def test_verify_at_sixteen_thousand_tokens(kind, tmp_path):
    write_checkpoint(tmp_path / kind, kind)
    command = [sys.executable, "-m", "tools.verify", f"--hf={tmp_path / kind}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["against"] == "transformers" and result["long_tokens"] == 16000
    assert result["max_rel_logit_diff"] <= 1e-4 and result["round_trip_bitwise"] and result["inv_freq_equal"]
