"""Arms that an evaluation compares: examples shown before the question, and pipelines that make what they compare."""

from pathlib import Path

import pytest

from experiments import door
from swallow_jax import run
from swallow_jax.evaluate import runner
from swallow_jax.task import load_task, read_conversations
from tests.test_evaluate import ASKING, Literal, conversations, mini_task, sees_lies

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "configs" / "evaluate" / "shots"


def with_shots(path, **changes):
    return runner.Asking(**{**vars(ASKING), "shots": str(path), **changes})


@pytest.fixture
def task(tmp_path):
    return load_task(mini_task(tmp_path / "task"))


def test_examples_stand_as_question_and_answer_before_what_is_asked(task, tmp_path):
    items, shots = conversations(0), conversations(200)[:2]
    run.write_jsonl(tmp_path / "shots.jsonl", shots)
    asking = with_shots(tmp_path / "shots.jsonl")
    plain = task.prompt(items[0])
    chat = runner.messages(task, items[0], asking, runner.read_shots(task, asking, items))
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert (chat[0], chat[-1]) == (plain[0], plain[-1])
    assert chat[1] == task.prompt(shots[0])[-1] and [chat[2]["content"], chat[4]["content"]] == ["Untrue", "Fine"]


def test_without_examples_the_chat_is_the_tasks_prompt(task):
    item = conversations(0)[0]
    assert runner.messages(task, item, ASKING, runner.read_shots(task, ASKING, [item])) == tuple(task.prompt(item))


def test_the_backend_is_asked_with_the_examples(task, tmp_path):
    run.write_jsonl(tmp_path / "shots.jsonl", conversations(200)[:2])
    seen = []

    class Spy(Literal):
        def score(self, requests):
            requests = list(requests)
            seen.extend(requests)
            yield from super().score(requests)

    items = read_conversations(task.test_sets["t"], task)
    runner.evaluate(task, items, Spy(sees_lies), model="m", test_set="t", seed=0, asking=with_shots(tmp_path / "shots.jsonl"),
                    out=tmp_path / "p.jsonl")  # fmt: skip
    assert len(seen) == 8 and all(len(request.messages) == 6 for request in seen)


def test_a_window_leaves_room_for_the_examples(task, tmp_path):
    """The same limit cuts a talk into more windows when a part of it goes to examples."""
    run.write_jsonl(tmp_path / "shots.jsonl", conversations(200)[:1])
    talk = {**conversations(0)[0], "turns": [{"speaker": "Buyer", "text": f"Question {n}?"} for n in range(12)], "evidence": []}
    counts = []
    for shots in (None, str(tmp_path / "shots.jsonl")):
        asking = with_shots("", shots=shots, window=runner.windows.Window(limit=300, unit="characters", overlap_turns=1))
        backend, out = Literal(sees_lies), tmp_path / f"{shots is None}.jsonl"
        runner.evaluate(task, [talk], backend, model="m", test_set="t", seed=0, asking=asking, out=out)
        counts.append(backend.asked)
    assert counts == [1, 2]


def test_an_example_that_is_asked_about_is_refused(task, tmp_path):
    run.write_jsonl(tmp_path / "shots.jsonl", [{**conversations(0)[3], "conversation_id": "another name"}])
    with pytest.raises(ValueError, match="shows 'c1c' with its answer"):
        runner.read_shots(task, with_shots(tmp_path / "shots.jsonl"), conversations(0))


@pytest.mark.parametrize("name", ["insurance_conduct_en", "insurance_sales_compliance"])
def test_the_projects_examples_show_every_label_and_no_test_conversation(name):
    task = load_task(ROOT / "configs" / "tasks" / name)
    sets = [row for path in (*task.test_sets.values(), *task.dev_sets.values()) for row in read_conversations(path, task)]
    shots = runner.read_shots(task, with_shots(SHOTS / f"{name}.jsonl"), sets)
    assert {task.primary(shot) for shot in shots} == set(task.label_ids)
    tested = {turn["text"] for row in sets for turn in row["turns"]}
    banks = "".join(path.read_text(encoding="utf-8") for path in (task.folder / "banks").glob("*.jsonl"))
    for turn in (turn for shot in shots for turn in shot["turns"]):
        assert turn["text"] not in tested and turn["text"] not in banks


def folders(value, runs):
    """Every folder or file below `runs` that a config names."""
    if isinstance(value, str):
        return {value.removeprefix(f"{runs}/").split("/")[0]} if value.startswith(f"{runs}/") else set()
    if isinstance(value, dict):
        value = list(value.values())
    return set().union(*(folders(item, runs) for item in value)) if isinstance(value, list | tuple) else set()


@pytest.mark.parametrize("name", ["ablation", "smollm2", "demo", "medical"])
def test_a_pipelines_stages_read_only_what_stages_before_them_make(name):
    made = set()
    for stage in door.load_config(str(ROOT / f"configs/pipeline/{name}.py")).stages:
        file, _, argument = stage["config"].partition(":")
        config = door.load_config(f"{ROOT / file}:{argument}" if argument else str(ROOT / file), runs="runs/here").to_dict()
        assert folders(config, "runs/here") <= made, (stage["name"], folders(config, "runs/here") - made)
        made.add(stage["name"])


def test_the_control_differs_from_cpt_in_its_text_alone():
    ours, control = (door.load_config(str(ROOT / f"configs/cpt/{name}.py")).to_dict() for name in ("demo", "ablation"))
    mixture, general = ours["data"].pop("mixture"), control["data"].pop("mixture")
    assert ours == control
    assert [folder for folder, _ in mixture] == ["runs/demo/prepare/train", *(folder for folder, _ in general)]
