"""Question: does the chain serve documents in English with several labels by data alone? Sixty-eight held-out messages.

    python -m experiments.evaluate --config=configs/evaluate/complaint.py --workdir=runs/complaint/evaluate

An answer is right when its set of labels is (`exact_set`). The figures show that the chain runs, not which model is best.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo, tiny

SEEDS = (0,)


def get_config(endpoint: str = "", runs: str = "runs/complaint") -> ConfigDict:
    c = demo.get_config(endpoint, runs)
    c.task = "configs/tasks/complaint_triage_en"
    c.test_set = "v1"
    c.asking.most_labels = 3  # 42 answers to choose from; no message of the test set has more labels
    hosted = tuple(entry for entry in c.models if entry["kind"] == "endpoint")
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_set"},
        {"name": "keywords", "kind": "keywords", "seed": 0},
        {"name": "n-grams", "kind": "ngrams", "seed": 0, "settings": tiny.ngram_settings()},
        {"name": "base", "kind": "hf", "seed": 0, "path": demo.BASE},
        *({"name": "base + SFT", "kind": "run", "seed": s, "path": f"{runs}/sft_{s}"} for s in SEEDS),
        *hosted,
    )
    c.comparisons = (
        {"a": "base + SFT", "b": "constant", "metric": "exact_set"},
        {"a": "base + SFT", "b": "base", "metric": "exact_set"},
        {"a": "base + SFT", "b": "n-grams", "metric": "exact_set"},
    )
    return c
