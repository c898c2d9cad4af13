"""Question: what does fine-tuning make of a real pretrained model, against itself untouched, shown examples, and what is free?

    python -m experiments.evaluate --config=configs/evaluate/smollm2.py --workdir=runs/smollm2/evaluate

Arms: SmolLM2-135M-Instruct with all definitions in its prompt (untouched), shown eight examples (few-shot), and after LoRA with
the short prompt it was tuned on (SFT); the best constant answer, keyword rules, character n-grams. 120 hand-written English
conversations in twins. The comparisons are declared here, before any run; the first two decide.
"""

from ml_collections import ConfigDict

from configs.evaluate import tiny
from configs.sft import smollm2

SEEDS = (0,)


def get_config(runs: str = "runs/smollm2") -> ConfigDict:
    c = tiny.get_config()
    c.task = "configs/tasks/insurance_conduct_en"
    c.test_set = "v1"
    c.training = (f"{runs}/synthesize/accepted.jsonl",)
    c.engine.update({"attention": "xla", "max_length": 1536, "tokens_per_batch": 2048})
    base = {"kind": "hf", "seed": 0, "path": smollm2.BASE}
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "keywords", "kind": "keywords", "seed": 0},
        {"name": "n-grams", "kind": "ngrams", "seed": 0, "settings": tiny.ngram_settings()},
        {"name": "untouched", **base, "asking": {**c.asking, "prompt": "classify_full"}},
        {"name": "few-shot", **base, "asking": {**c.asking, "shots": "configs/evaluate/shots/insurance_conduct_en.jsonl"}},
        *({"name": "SFT", "kind": "run", "seed": s, "path": f"{runs}/sft_{s}"} for s in SEEDS),
    )
    c.comparisons = (
        {"a": "SFT", "b": "few-shot", "metric": "exact_category"},
        {"a": "SFT", "b": "constant", "metric": "exact_category"},
        {"a": "SFT", "b": "untouched", "metric": "exact_category"},
        {"a": "SFT", "b": "n-grams", "metric": "exact_category"},
    )
    return c
