"""Check transcripts: verdicts with evidence and legal basis, a table, and a page on which people accept, reject or correct them.

    python -m tools.check --model=runs/demo/sft_0 --task=configs/tasks/insurance_sales_compliance --input=calls.csv \\
        --output=checked/verdicts.jsonl --html=checked/review.html --audit_rate=0.02

--input is .jsonl, .csv or .xlsx: a turn a row (conversation_id, speaker, text, date?), or a conversation a row with lines
`speaker：words` in its text, or in JSON lines whole conversations. --columns=conversation_id=通話ID,text=発話 names other
columns, --speakers=オペレーター=募集人,顧客=お客様 other speakers. Beside verdicts.jsonl stand a .csv and a .manifest.json. A
killed check goes on with the same command. Nothing is sent anywhere, and no transcript is printed. Conversations longer than
the model's context are asked about in windows of turns.

Thresholds: without any, a verdict is what the model answers. --calibrate=point.json --recall=0.9 makes, from labelled
conversations (--input, JSON lines), an operating point; --operating=point.json obeys it. --prevalence=0.001 turns scores into
probabilities for a field where one talk in a thousand violates, and says what load to expect.

Decisions of the page come back with  python -m tools.review import --run=checked/verdicts.jsonl --file=decisions.jsonl
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from swallow_jax import run

_MODEL = flags.DEFINE_string("model", None, "a run, HF folder, adapter or GGUF file")
_TASK = flags.DEFINE_string("task", None, "task folder")
_INPUT = flags.DEFINE_string("input", None, "transcripts: .jsonl, .csv, .xlsx")
_OUTPUT = flags.DEFINE_string("output", None, "verdicts, .jsonl")
_HTML = flags.DEFINE_string("html", None, "the review page to write")
_ROWS = flags.DEFINE_enum("html_rows", "queue", ["queue", "all"], "what the page holds: flagged and audited ones, or all")
_COLUMNS = flags.DEFINE_list("columns", [], "ours=theirs of conversation_id, speaker, text, date")
_SPEAKERS = flags.DEFINE_list("speakers", [], "theirs=ours, what the file calls a speaker of the task")
_MASK = flags.DEFINE_list("mask", [], "kinds of personal data to mask at the door, or all: email, phone, ...")
_DATE = flags.DEFINE_string("date", None, "day of talks without their own (YYYY-MM-DD): it chooses the rules in force")
_SKIP = flags.DEFINE_boolean("skip_broken", False, "go on without conversations that cannot be read; they are listed")
_ASKING = flags.DEFINE_enum("asking", None, ["labels", "generate"], "score closed labels, or let the model write")
_PROMPT = flags.DEFINE_string("prompt", None, "name of the task's prompt (default: the task's)")
_NEW = flags.DEFINE_integer("max_new_tokens", 512, "of a written verdict")
_EVIDENCE = flags.DEFINE_integer("evidence_turns", 2, "labels: turns told per flagged talk, by leaving each out; 0: none")
_OVERLAP = flags.DEFINE_integer("overlap_turns", 4, "turns that two windows of a long conversation share")
_OPERATING = flags.DEFINE_string("operating", None, "operating point that --calibrate wrote")
_CALIBRATE = flags.DEFINE_string("calibrate", None, "write an operating point from labelled --input, and no verdicts")
_RECALL = flags.DEFINE_float("recall", None, "--calibrate: share of the violations to be found")
_PREVALENCE = flags.DEFINE_float("prevalence", None, "share of violating talks in the field, 0.001 for 0.1 %")
_RATE = flags.DEFINE_float("audit_rate", 0.0, "share of the unflagged that people read too")
_SEED = flags.DEFINE_integer("audit_seed", 0, "of that draw")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "default: float32 on a CPU, bfloat16 elsewhere")
_LENGTH = flags.DEFINE_integer("max_length", None, "tokens of a prompt and its answer (default: the model's positions)")
_SLOTS = flags.DEFINE_integer("slots", 8, "sequences written together")
_BATCH = flags.DEFINE_integer("tokens_per_batch", 8192, "padded tokens scored together")


def main() -> dict[str, Any]:
    """Check, or calibrate; returns counts and the files written."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    missing = [f"--{f.name}" for f in (_MODEL, _TASK, _INPUT) if not f.value]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; --help shows an example")
    if bool(_OUTPUT.value) == bool(_CALIBRATE.value) or bool(_CALIBRATE.value) != (_RECALL.value is not None):
        raise ValueError("give --output=verdicts.jsonl, or --calibrate=point.json with --recall=0.9")
    if not 0 <= _RATE.value <= 1 or _EVIDENCE.value < 0:
        raise ValueError(f"--audit_rate={_RATE.value} lies between 0 and 1, --evidence_turns={_EVIDENCE.value} is 0 or more")
    if not Path(_MODEL.value).exists():
        raise FileNotFoundError(f"--model={_MODEL.value} does not exist; name a run or an HF folder")
    from swallow_jax import audit, check
    from swallow_jax.data import privacy
    from swallow_jax.task import load_task

    task = load_task(_TASK.value)
    mask = tuple(privacy.TOKENS) if _MASK.value == ["all"] else tuple(_MASK.value)
    intake = check.Intake(
        columns=_pairs("columns", _COLUMNS.value), speakers=_pairs("speakers", _SPEAKERS.value), mask=mask, date=_DATE.value
    )
    read = check.read_transcripts(_INPUT.value, task, intake, labelled=bool(_CALIBRATE.value))
    if read.problems and not _SKIP.value:
        shown = "\n  ".join(read.problems[:20])
        more = f"\n  and {len(read.problems) - 20} more" if len(read.problems) > 20 else ""
        raise ValueError(
            f"{len(read.problems)} things to mend (or --skip_broken goes on without these conversations):\n  {shown}{more}"
        )
    if not read.conversations:
        raise ValueError(f"{_INPUT.value} holds no conversation that can be read{': ' if read.problems else ''}"
                         f"{read.problems[0] if read.problems else ''}")  # fmt: skip
    setup = _Setup(task)
    if _CALIBRATE.value:
        return _calibrate(task, read, setup)
    point = _point(check, setup)
    output = Path(_OUTPUT.value)
    if output.suffix != ".jsonl":
        raise ValueError(f"--output={output}: verdicts are JSON lines; name it .jsonl (a .csv is written beside it)")
    made_of = {
        "input": {"path": _INPUT.value, "sha256": run.sha256_file(_INPUT.value)},
        "task": {"path": _TASK.value, "sha256": task.spec_sha256}, "model": setup.model, "asking": setup.facts,
        "intake": dataclasses.asdict(intake), "point": dataclasses.asdict(point), "evidence_turns": _EVIDENCE.value,
        "audit": {"rate": _RATE.value, "seed": _SEED.value},
    }  # fmt: skip
    made_of = json.loads(json.dumps(made_of))
    manifest_file = audit.beside(output, "manifest.json")
    before = json.loads(manifest_file.read_text(encoding="utf-8")) if manifest_file.is_file() else {}
    if different := [name for name in made_of if before and before.get("made_of", {}).get(name) != made_of[name]]:
        raise ValueError(f"{output} was begun with another {', '.join(different)}; choose another --output, or remove its files")
    if "result" in before:
        verdicts = run.read_jsonl(output)
    else:
        run.write_json(manifest_file, {"format_version": run.FORMAT_VERSION, "made_of": made_of})
        verdicts = _verdicts(task, read.conversations, setup, point, output)
        run.write_jsonl(output, verdicts)
    run.write_bytes(output.with_suffix(".csv"), check.table(task, verdicts))
    if _HTML.value:
        _page(task, read.conversations, verdicts, made_of, output)
    counts = {name: sum(v["verdict"] == name for v in verdicts) for name in ("violation", "needs_review", "no_violation")}
    result = {
        "conversations": len(verdicts), **counts, "audit": sum(bool(v.get("audit")) for v in verdicts),
        "masked": read.masked, "broken": len(read.problems), "expected": _expected(len(verdicts)), "output": str(output),
        "csv": str(output.with_suffix(".csv")), "html": _HTML.value,
    }  # fmt: skip
    for problem in read.problems[:20]:
        print(f"left out: {problem}", file=sys.stderr)
    run.write_json(manifest_file, {"format_version": run.FORMAT_VERSION, "made_of": made_of, "result": result})
    for kind in ("scores", "evidence"):
        _log(output, kind).unlink(missing_ok=True)
    return result


class _Setup:
    """The model and how it is asked; weights are read when first needed."""

    def __init__(self, task: Any):
        from swallow_jax import checkpoint, hf
        from swallow_jax.evaluate import runner

        platform = _platform()
        described = _MODEL.value if Path(_MODEL.value).is_file() else checkpoint.model_folder(_MODEL.value)
        mode = _ASKING.value or ("generate" if task.output == "verdict" else "labels")
        self.dtype = _DTYPE.value or ("float32" if platform == "cpu" else "bfloat16")
        self.attention = "rows" if platform == "cpu" else "xla"
        self.max_length = _LENGTH.value or hf.read_config(described).max_position_embeddings
        self.model = {"path": _MODEL.value, "sha256": run.sha256_path(_MODEL.value)}
        self.name = f"{Path(_MODEL.value).resolve().name}@{self.model['sha256'][:12]}"
        self.asking = runner.Asking(mode=mode, prompt=_PROMPT.value, normalise="sum", max_new_tokens=_NEW.value)
        self.facts = {"mode": mode, "prompt": _PROMPT.value, "max_new_tokens": _NEW.value, "overlap_turns": _OVERLAP.value,
                      "dtype": self.dtype, "max_length": self.max_length, "tokens_per_batch": _BATCH.value}  # fmt: skip
        self._task, self._opened = task, None

    def backend(self) -> Any:
        """The backend; from now on `asking` knows how long a window may be."""
        if self._opened is None:
            from experiments import evaluate
            from swallow_jax import check
            from swallow_jax.evaluate import answers

            engine = evaluate.EngineSettings(
                dtype=self.dtype, attention=self.attention, slots=_SLOTS.value, max_length=self.max_length, chunk=16,
                tokens_per_batch=_BATCH.value,
            )  # fmt: skip
            entry = {"name": self.name, "kind": "hf", "path": _MODEL.value}
            self._opened = evaluate.open_model(entry, engine, Path())
            encode, tokens = self._opened.tokenizer.encode, self.asking.max_new_tokens
            if self.asking.mode == "labels":
                # Behind a chat header a text may take a token more than alone.
                tokens = 2 + max(len(encode(text)) for text in answers.closed(self._task, None)[1])
            window = check.window_of(tokens, self.max_length, _OVERLAP.value)
            self.asking = dataclasses.replace(self.asking, window=window)
        return self._opened


def _platform() -> str:
    import jax

    return jax.default_backend()


def _verdicts(task: Any, conversations: list, setup: _Setup, point: Any, output: Path) -> list[dict[str, Any]]:
    from swallow_jax import audit, check

    backend = setup.backend()
    rows = check.ask(task, conversations, backend, asking=setup.asking, log=_log(output, "scores"), what="verdicts")
    look = [(c, rows[c["conversation_id"]]) for c in conversations if check.flagged(rows[c["conversation_id"]], point)]
    told: dict[str, list] = {}
    if setup.asking.mode == "labels":
        told = check.grounds(
            task, look, backend, asking=setup.asking, most=_EVIDENCE.value, log=_log(output, "evidence")
        )  # fmt: skip
    verdicts = []
    for talk in conversations:
        name = talk["conversation_id"]
        found = check.verdict(task, talk, rows[name], point=point, told=told.get(name, ()), model=setup.name)
        if found["verdict"] == "no_violation" and audit.drawn(found["input_sha256"], _RATE.value, _SEED.value):
            found["audit"] = True
        verdicts.append(found)
    return verdicts


def _log(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}")


def _page(task: Any, conversations: list, verdicts: list, made_of: dict, output: Path) -> None:
    from swallow_jax import verdict_page

    chosen = [v for v in verdicts if _ROWS.value == "all" or v["verdict"] != "no_violation" or v.get("audit")]
    talks = {c["conversation_id"]: c for c in conversations}
    key = run.sha256_json([made_of, [v["input_sha256"] for v in verdicts]])
    run.write_text(_HTML.value, verdict_page.build(task, chosen, talks, key=key, name=output.stem, checked=len(verdicts)))


# Operating points


def _calibrate(task: Any, read: Any, setup: _Setup) -> dict[str, Any]:
    from swallow_jax import check

    path = Path(_CALIBRATE.value)
    made_of = {"task": task.spec_sha256, "model": setup.model["sha256"], "asking": setup.facts}
    dev = {"path": _INPUT.value, "sha256": run.sha256_file(_INPUT.value)}
    log = _log(path, f"scores.{run.sha256_json([made_of, dev])[:12]}")  # a point has no manifest: what it is made of is its name
    rows = check.ask(task, read.conversations, setup.backend(), asking=setup.asking, log=log, what="dev")
    found = check.calibrate(task, read.conversations, rows, _RECALL.value)
    run.write_json(path, {"format_version": run.FORMAT_VERSION, "made_of": made_of, "dev": dev, **found})
    log.unlink(missing_ok=True)
    return found | {"operating": str(path)}


def _point(check: Any, setup: _Setup) -> Any:
    if not _OPERATING.value:
        return check.chance_point(_PREVALENCE.value)
    found = _operating()
    for name, mine in (("model", setup.model["sha256"]), ("asking", json.loads(json.dumps(setup.facts)))):
        if found["made_of"][name] != mine:
            raise ValueError(f"--operating={_OPERATING.value} is of another {name}; calibrate again with these flags")
    return check.Point(
        threshold=found["threshold"], temperature=found["temperature"], fitted=found["violations"] / found["n"],
        prevalence=_PREVALENCE.value,
    )  # fmt: skip


def _operating() -> dict[str, Any]:
    path = Path(_OPERATING.value)
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"threshold", "temperature", "violations", "n", "made_of"} <= set(found):
        raise ValueError(f"--operating={path} is no operating point; --calibrate writes one")
    return found


def _expected(talks: int) -> dict[str, Any] | None:
    """What this many talks mean for the reviewers, from the rates seen on the dev set."""
    if not _OPERATING.value or _PREVALENCE.value is None:
        return None
    from swallow_jax import stats

    found = _operating()
    return stats.review_load(found["recall"], found["alarm"], _PREVALENCE.value, talks)


def _pairs(flag: str, given: list[str]) -> dict[str, str]:
    for item in given:
        if item.count("=") != 1 or not all(item.split("=")):
            raise ValueError(f"--{flag}: {item!r} is no pair; write a=b,c=d")
    return dict(item.split("=") for item in given)


if __name__ == "__main__":
    door.tool(main, __doc__)
