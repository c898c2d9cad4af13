"""`--restarts=N` of every program: start it again, from its last checkpoint, when it was killed, lost a peer or hung.

    python -m experiments.cpt --config=configs/cpt/tiny.py --workdir=runs/cpt/tiny --restarts=5

The program runs in a process of its own. What a restart cannot mend (a refusal, a step that fails twice at one place) ends
it at once. On many hosts each process has its own supervisor: all end within the heartbeat, all come back.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOST = 75  # swallow_jax.hosts.LOST, without its imports


def keep_running(command: Sequence[str], *, restarts: int, wait_s: float, log: Path) -> int:
    """Run `command` until it ends well, at most `restarts` times anew; returns its exit code (128 + n for signal n).

    `log` (metrics.jsonl) tells whether a try that failed had come further than the one before.
    """
    child: subprocess.Popen | None = None
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        if child is not None and number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            child.send_signal(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for tried in range(restarts + 1):
            start = last_step(log)
            child = subprocess.Popen(command)
            if asked:
                child.terminate()
            code = child.wait()
            came = last_step(log)
            if code == 0 or asked or (code not in (LOST,) and code > 0 and came <= start):
                break
            cause = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            if tried == restarts:
                print(f"{cause} at step {came}; --restarts={restarts} are used up", file=sys.stderr, flush=True)
                break
            print(f"{cause} at step {came}; start {tried + 1} of {restarts} anew in {wait_s:g} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)
            if asked:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def last_step(log: Path) -> int:
    """The last whole line's step of a metrics.jsonl; 0 without one."""
    if not log.is_file():
        return 0
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0
