"""Synthetic conversations from a teacher: plan, generate, verify, and write chat samples for experiments.sft.

    python -m experiments.synthesize --config=configs/synthesize/demo.py --workdir=runs/synthesize/demo

Reads a task folder and asks one or more teachers (`teachers.NAME.backend`: a recorded file, our JAX engine, or an
OpenAI-compatible endpoint). Writes plan.jsonl (first), responses_NAME.jsonl (durable: a killed job resumes), accepted.jsonl,
rejected.jsonl (each with its reason), train.jsonl and dev.jsonl. With configs/synthesize/demo_record.py it writes the recorded
teacher and the test sets of the demo's task from its utterance banks.
"""

from pathlib import Path
from typing import Any

from experiments import door
from swallow_jax import run


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Returns counts: planned, generated, accepted (by class), rejected_by_reason, contamination, kappa, by_backend."""
    from swallow_jax.generate import backends  # the engine's imports are slow; --help must not wait for them
    from swallow_jax.synth import checks, pipeline
    from swallow_jax.task import load_task, read_conversations

    task = load_task(config.task)
    if config.record is not None:
        return record(config, task, workdir)
    for name, section in config.teachers.items():
        path = section.backend.get("path")
        if path and not Path(path).exists():
            raise FileNotFoundError(f"config.teachers.{name}.backend.path: {path} does not exist; correct it")
    files = {f"{name}.backend": path for name, section in config.teachers.items() for path in _files(section.backend)}
    job = run.open_run(workdir, config.to_dict(), inputs={"task": config.task, **files})
    if job.finished:
        print(f"{workdir} is finished; nothing to do", flush=True)
        return job.result
    limits = run.build(checks.Limits, config.checks.to_dict(), "config.checks")
    test_sets = {name: read_conversations(path, task) for name, path in task.test_sets.items()}

    # The plan is on disk before the first request leaves.
    rows, _ = plan_rows(config, task)
    run.write_jsonl(job.folder / "plan.jsonl", rows)
    print(f"planned {len(rows)} conversations", flush=True)

    # Ask. A teacher's licence and revision travel with everything made from it.
    answers, described = {}, {}
    for name, section in config.teachers.items():
        asking = run.build(pipeline.Asking, section.asking.to_dict(), f"config.teachers.{name}.asking")
        requests = {row["plan_id"]: pipeline.request(task, row, asking, limits) for row in rows if row["teacher"] == name}
        backend = backends.open_backend(section.backend.to_dict())
        described[name] = backend.describe()
        found = pipeline.collect(list(requests.values()), backend, job.folder / f"responses_{name}.jsonl")
        answers |= {plan_id: found[r.key] for plan_id, r in requests.items() if r.key in found}
        print(f"{name}: {len(requests)} requested, {sum(r.key in found for r in requests.values())} answered", flush=True)

    # Verify, then audit what was kept once more, as it'll be trained on.
    accepted, rejected = pipeline.verify(task, rows, answers, test_sets, limits, keep_pairs=config.keep_pairs)
    kappa = None
    if config.verifier is not None:
        labels = pipeline.relabel(
            task, accepted, backends.open_backend(config.verifier.backend.to_dict()), prompt=config.verifier.prompt
        )
        kappa = checks.cohen_kappa([task.primary(row) for row in accepted], labels)
        accepted = [{**row, "meta": {**row["meta"], "blind_label": label}} for row, label in zip(accepted, labels, strict=True)]
    leaks = checks.contaminated(accepted, checks.protected_texts(test_sets, limits), limits)
    run.write_jsonl(job.folder / "accepted.jsonl", accepted)
    run.write_jsonl(job.folder / "rejected.jsonl", rejected)
    for split in ("train", "dev"):
        kept = [row for row in accepted if row["meta"]["split"] == split]
        run.write_jsonl(job.folder / f"{split}.jsonl", pipeline.chat_samples(task, kept, prompt=config.sft_prompt))
    licences = {d["licence"] for d in described.values() if d.get("licence")}
    job.note(teachers=described, licences=sorted({*job.manifest["licences"], *licences}))

    result = {
        "planned": len(rows),
        "generated": len(answers),
        "accepted": len(accepted),
        "contamination": len(leaks),
        "accepted_by_class": {
            str(label or "compliant"): sum(task.primary(row) == label for row in accepted) for label in task.label_ids
        },
        "rejected_by_reason": pipeline.tally(rejected),
        "kappa": kappa,
        "blind_relabelling": "not run" if kappa is None else "run",
        "length_probe": checks.length_probe(accepted),
        "samples": {split: sum(row["meta"]["split"] == split for row in accepted) for split in ("train", "dev")},
        "by_backend": {
            name: {
                "requested": sum(row["teacher"] == name for row in rows),
                "generated": sum(row["teacher"] == name and row["plan_id"] in answers for row in rows),
                "accepted": sum(row["meta"]["teacher"] == name for row in accepted),
                "rejected_by_reason": pipeline.tally(row for row in rejected if row["teacher"] == name),
            }
            for name in config.teachers
        },
    }
    return job.finish(result)


def plan_rows(config: Any, task: Any) -> tuple[list[dict[str, Any]], Any]:
    """The rows of all teachers, and what bank items they may draw on by split; openings to be continued are in the rows."""
    from swallow_jax.synth import banks, plan

    rows, scenarios, parts = [], None, None
    if any(section.scenarios != "own" for section in config.teachers.values()):
        bank = banks.load_banks(task)
        whole = banks.part(banks.load_split(task, bank), "train")
        listed = banks.scenarios(bank, whole.items)
        scenarios = plan.split_scenarios(listed, dev=config.plan.dev_scenarios, seed=config.plan.seed)
        parts = {split: banks.Part(items=banks.ids(found), neutral=whole.neutral) for split, found in scenarios.items()}
        shape = run.build(banks.Shape, config.shape.to_dict(), "config.shape")
    for name, section in config.teachers.items():
        if section.scenarios not in ("own", "banks", "openings"):
            raise ValueError(f"config.teachers.{name}.scenarios is {section.scenarios!r}; write 'own', 'banks' or 'openings'")
        quotas = run.build(plan.Quotas, section.quotas.to_dict(), f"config.teachers.{name}.quotas")
        known = None if section.scenarios == "own" else scenarios
        for row in plan.make_plan(task, teacher=name, quotas=quotas, seed=config.plan.seed, scenarios=known):
            if section.scenarios == "openings":
                row["given"] = banks.opening(task, bank, parts[row["split"]], row, shape, leave=section.leave)
            rows.append(row)
    return rows, parts


def record(config: Any, task: Any, workdir: Path) -> dict[str, Any]:
    """Write bank_split.json, the test and dev sets and the recorded teacher into the task folder, from its banks."""
    from swallow_jax.synth import banks, checks, pipeline

    bank = banks.load_banks(task)
    job = run.open_run(workdir, config.to_dict(), inputs={"banks": task.folder / "banks", "task": task.folder / "task.yaml"})
    found = banks.split(task, bank, **config.record.split.to_dict())
    run.write_json(task.folder / banks.SPLIT_FILE, found)
    shape = run.build(banks.Shape, config.shape.to_dict(), "config.shape")
    test_shape = run.build(banks.Shape, config.record.test_shape.to_dict(), "config.record.test_shape")
    limits = run.build(checks.Limits, config.checks.to_dict(), "config.checks")
    sets = {}
    for kind, paths in (("test", task.test_sets), ("dev", task.dev_sets)):
        for name, path in paths.items():
            sets[path.name] = banks.conversations(
                task, bank, banks.part(found, kind), name=f"{kind}-{name}", shape=test_shape, seed=config.record.split.seed
            )
            run.write_jsonl(path, sets[path.name])
    teacher = config.teachers.recorded
    asking = run.build(pipeline.Asking, teacher.asking.to_dict(), "config.teachers.recorded.asking")
    rows, parts = plan_rows(config, task)
    rows = [row for row in rows if row["teacher"] == "recorded"]
    lines = banks.record(task, bank, parts, rows, shape=shape, asking=asking, limits=limits, provenance=config.record.provenance)
    run.write_jsonl(teacher.backend.path, lines)
    return job.finish(
        {
            "recorded": len(lines),
            "sets": {name: len(made) for name, made in sets.items()},
            "length_probe": {name: checks.length_probe(made) for name, made in sets.items()},
            "dropped": {kind: len(ids) for kind, ids in found["dropped"].items()},
            "train_items": {c: len(ids) for c, ids in found["train"].items()},
        }
    )


def _files(section: Any) -> list[str]:
    return [v for v in section.to_dict().values() if isinstance(v, str) and Path(v).exists()]


if __name__ == "__main__":
    door.launch(main, __doc__)
