"""How long synthesis takes beside its teacher: a recorded teacher of any size, milliseconds a row and memory by row.

    python -m tools.bench synthesize --rows=100000

A task of 20 categories, conversations of 8 turns that share nothing, answers made as they are asked for and taken off the
clock. Prints one JSON object: ms_a_row (processor time, so that a busy machine matters little), wall_s, peak_mb, and the bytes
a row by which memory grew behind the first fifth of the rows.
"""

import argparse
import hashlib
import json
import random
import resource
import tempfile
import time
from pathlib import Path

CATEGORIES = 20
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのまみむめもやゆよらりるれろ山川空店本時金車"


class Teacher:
    """Answers at once; `seconds` is what it took for itself."""

    name = "bench"

    def __init__(self):
        self.seconds, self.answered, self.watch = 0.0, 0, []

    def generate(self, requests):
        from swallow_jax.generate import backends

        for request in requests:
            began = time.process_time()
            text = conversation(request.messages[-1]["content"])
            self.answered += 1
            result = backends.Result(request.key, text, "stop", 400, 300, None)
            self.seconds += time.process_time() - began
            yield result

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
    parser = argparse.ArgumentParser(prog="tools.bench synthesize", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args(argv).rows

    from experiments import door, synthesize
    from swallow_jax.generate import backends
    from swallow_jax.synth import rounds

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
        teacher, memory = Teacher(), []
        backends.open_backend = lambda section: teacher
        decide = rounds.Job._decide_pair

        def watched(self, pair, number):
            if self._accepted.rows % 1000 == 0:
                memory.append(_resident())
            return decide(self, pair, number)

        rounds.Job._decide_pair = watched
        began, wall = time.process_time(), time.perf_counter()
        result = synthesize.main(config, folder / "run")
        seconds = time.process_time() - began - teacher.seconds
        wall = time.perf_counter() - wall
    late = memory[len(memory) // 5 :]
    print(json.dumps({
        "rows": result["planned"], "accepted": result["accepted"], "ms_a_row": round(1000 * seconds / result["planned"], 3),
        "seconds": round(seconds, 1), "wall_s": round(wall, 1), "teacher_s": round(teacher.seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "bytes_a_row_while_deciding": round((late[-1] - late[0]) / max(1, 0.8 * result["accepted"])) if len(late) > 1 else None,
    }))  # fmt: skip
    return 0


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
