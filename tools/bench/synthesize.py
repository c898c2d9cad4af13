"""How long synthesis takes beside its teacher: a recorded teacher of any size, milliseconds a row by stage, and memory.

    OPENBLAS_NUM_THREADS=1 python -m tools.bench synthesize --rows=100000

A task of 20 categories, conversations of 8 turns that share nothing, answers made as they are asked for and taken off the
clock; at a fifth of the rows and at all of them, each in a process of its own. Then the demo's job (configs/synthesize/demo.py,
--nodemo leaves it out): the share of its time that is not the teachers'. Prints one JSON object: for each size ms_a_row
(processor time, so that a busy machine matters little), by_stage, wall_s, peak_mb; bytes_a_row by which the larger job needs
more memory; demo.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CATEGORIES = 20
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのまみむめもやゆよらりるれろ山川空店本時金車"


class Stages:
    """Seconds of each stage, without those of the stages inside it; `clock` is time.process_time or time.perf_counter."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds, self._open = clock, {}, []

    def enter(self, stage: str) -> None:
        self._charge()
        self._open.append(stage)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count the calls of owner.name as this stage; of a function that yields, the time of each step."""
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            self.enter(stage)
            try:
                made = inner(*args, **kwargs)
            finally:
                self.leave()
            return self.steps(made, stage) if isinstance(made, Iterator) else made

        setattr(owner, name, watched)

    def steps(self, made: Iterator, stage: str) -> Iterator:
        while True:
            self.enter(stage)
            try:
                value = next(made)
            except StopIteration:
                return
            finally:
                self.leave()
            yield value


def watch_stages(stages: Stages) -> None:
    """What synthesis does, by the functions that do it."""
    from swallow_jax.synth import checks, files, page, pipeline, probes, rounds, sft

    for owner, name, stage in (
        (rounds, "prepare", "plan"),
        (files.Answers, "ask", "keep answers"),
        (pipeline, "request", "write requests"),
        (rounds.Job, "_written", "read answers"),
        (files.Answers, "get", "read answers"),
        (checks, "first_problem", "check"),
        (checks.Protected, "contaminated", "contamination"),
        (checks.Seen, "sketch", "near duplicates"),
        (checks.Seen, "nearest", "near duplicates"),
        (checks.Seen, "add", "near duplicates"),
        (rounds.Job, "_decide_pair", "decide"),
        (files.Writer, "write", "write rows"),
        (sft, "chat_samples", "samples"),
        (probes, "sampled_pairs", "probes"),
        (probes, "probe", "probes"),
        (page, "build", "page"),
    ):
        stages.watch(owner, name, stage)


class Teacher:
    """Answers at once."""

    name = "bench"

    def generate(self, requests):
        from swallow_jax.generate import backends

        for request in requests:
            yield backends.Result(request.key, conversation(request.messages[-1]["content"]), "stop", 400, 300, None)

    def describe(self):
        return {"kind": "bench", "model": self.name, "revision": None, "licence": None, "sha256": None}


def conversation(content: str) -> str:
    rng = random.Random(hashlib.sha256(content.encode()).digest())
    label = content.rsplit("[", 1)[1].rstrip("]\n ").strip('"')
    turns = [
        {"speaker": ("店員", "客")[i % 2], "text": "".join(rng.choices(KANA, k=rng.randint(25, 45))) + "。"} for i in range(8)
    ]
    evidence = [{"category": label, "turn": 2, "quote": turns[2]["text"][3:15]}] if label else []
    found = {"turns": turns, "labels": [label] if label else [], "evidence": evidence, "missing_items": []}
    return json.dumps(found, ensure_ascii=False)


def write_task(folder: Path) -> None:
    import yaml

    from swallow_jax import run

    prompts = {
        "c.md": "## user\n{{conversation}}\n",
        "t.md": "## user\n{{guideline}} {{channel}} {{product}} {{seed}} [{{label_json}}]\n",
        "g.md": "## text\n破る: {{definition}} {{includes}}\n",
        "k.md": "## text\n守る: {{definition}}\n",
    }
    for name, text in prompts.items():
        (folder / name).write_text(text, encoding="utf-8")
    categories = [
        {"id": f"c{i}", "label": f"区分{i:02d}番", "name_ja": f"第{i:02d}の区分", "kind": "utterance",
         "definition": f"定義{i}。" * 9,
         "includes": [f"例{i}"], "excludes": []}
        for i in range(CATEGORIES)
    ]  # fmt: skip
    task = {
        "id": "bench", "version": "v1", "language": "ja", "speakers": ["店員", "客"], "turn_format": "{speaker}：{text}",
        "label_policy": "single_primary", "compliant": {"label": "問題なし", "name_ja": "なし", "definition": "どれでもない。"},
        "categories": categories, "prompts": {"classify": "c.md", "teacher": "t.md", "guideline_utterance": "g.md",
        "guideline_compliant": "k.md"}, "default_prompt": "classify",
        "attributes": {"channel": {"店頭": 3, "電話": 1}, "product": {"靴": 1, "傘": 1, "帽子": 2}},
        "metric": {"primary": "accuracy"}, "test_sets": {"bench": "test.jsonl"},
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")
    tests = [{"conversation_id": str(i), **json.loads(conversation(f"test {i} []"))} for i in range(344)]
    run.write_jsonl(folder / "test.jsonl", tests)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.bench synthesize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--nodemo", action="store_true", help="leave the demo's job out")
    parser.add_argument("--part", choices=("rows", "demo"), help=argparse.SUPPRESS)  # what a process of its own measures
    given = parser.parse_args(argv)
    if given.part:
        print(json.dumps(measure(given.rows) if given.part == "rows" else measure_demo()))
        return 0
    small, large = (_alone("rows", rows) for rows in (max(2 * CATEGORIES, given.rows // 5), given.rows))
    found = {
        "sizes": [small, large],
        "bytes_a_row": round(1e6 * (large["peak_mb"] - small["peak_mb"]) / max(1, large["rows"] - small["rows"])),
    }
    if not given.nodemo:
        found["demo"] = _alone("demo", 0)
    print(json.dumps(found))
    return 0


def _alone(part: str, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench", "synthesize", f"--part={part}", f"--rows={rows}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def measure(rows: int) -> dict[str, Any]:
    """A job of so many rows with a teacher whose time is taken off."""
    from experiments import door, synthesize
    from swallow_jax.generate import backends

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").mkdir()
        write_task(folder / "task")
        config = door.load_config(f"configs/synthesize/own.py:{folder / 'task'}")
        with config.unlocked():
            config.teachers.teacher.asking.twin = None
            config.teachers.teacher.quotas = {"train_pairs": rows // (2 * CATEGORIES), "dev_pairs": 0}
        config.budget.update({"rounds": 1, "requests": 2 * rows})
        config.checks.update({"min_chars": 60, "max_chars": 600, "max_twin_turns": 0})
        stages = Stages(time.process_time)
        teacher = Teacher()
        stages.watch(teacher, "generate", "teacher")
        watch_stages(stages)
        backends.open_backend = lambda section: teacher
        wall = time.perf_counter()
        stages.enter("rest")
        result = synthesize.main(config, folder / "run")
        stages.leave()
        wall = time.perf_counter() - wall
    seconds = {stage: s for stage, s in sorted(stages.seconds.items(), key=lambda item: -item[1]) if stage != "teacher"}
    planned = result["planned"]
    return {
        "rows": planned,
        "accepted": result["accepted"],
        "ms_a_row": round(1000 * sum(seconds.values()) / planned, 3),
        "by_stage": {stage: round(1000 * s / planned, 3) for stage, s in seconds.items()},
        "wall_s": round(wall, 1),
        "teacher_s": round(stages.seconds["teacher"], 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def measure_demo() -> dict[str, Any]:
    """The demo's job on the clock of the wall; opening a teacher and what it generates is the teacher's."""
    from experiments import door, synthesize
    from swallow_jax.generate import backends

    stages = Stages(time.perf_counter)
    inside = backends.open_backend

    def opened(section):
        stages.enter("teacher")
        try:
            teacher = inside(section)
            teacher.describe()  # hashes its weights, once
        finally:
            stages.leave()
        stages.watch(teacher, "generate", "teacher")
        return teacher

    with tempfile.TemporaryDirectory() as name:
        config = door.load_config("configs/synthesize/demo.py")
        stages.enter("imports")
        from swallow_jax.synth import page, rounds  # noqa: F401 (what the program imports, on its own account)

        backends.open_backend = opened
        watch_stages(stages)
        stages.enter("rest")
        result = synthesize.main(config, Path(name) / "run")
        stages.leave()
        stages.leave()
    whole = sum(stages.seconds.values())
    ours = whole - stages.seconds["teacher"]
    order = sorted(stages.seconds.items(), key=lambda item: -item[1])
    return {
        "rows": result["planned"],
        "seconds": round(whole, 2),
        "teacher_s": round(stages.seconds["teacher"], 2),
        "share_beside_the_teacher": round(ours / whole, 4),
        "by_stage_s": {stage: round(s, 3) for stage, s in order if stage != "teacher"},
    }
