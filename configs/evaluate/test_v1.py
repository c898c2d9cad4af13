"""Question: what do the demo's models know on test_v1, whose conversations were written one by one and not from templates?

    python -m experiments.evaluate --config=configs/evaluate/test_v1.py

Thresholds and calibration come from dev_v1; four-choice questions and bits per byte say what CPT added and cost; transcripts are
disturbed in four ways. With another argument, such as :runs/mine, the models of that demo folder; with :baselines, no model.
:runs/demo,FILE adds an endpoint from its recorded answers (responses_*.jsonl of configs/evaluate/gpt4o.py), without network; what
was recorded holds no disturbed transcripts, so these are left out then.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo, knowledge, tiny

ROBUSTNESS = "configs/evaluate/robustness"


def operating() -> ConfigDict:
    """Shares of violations to be found, and the load per 10,000 talks: 0.13 % is Japan Post's suspected rate of new contracts."""
    return ConfigDict({"dev_set": "dev:v1", "recalls": (0.8, 0.9, 0.95), "prevalences": (0.001, 0.01), "talks": 10_000})


def robustness(language: str) -> ConfigDict:
    kinds = ("injection", "asr", "fillers", "speakers")
    material = f"{ROBUSTNESS}/{language}.yaml"
    return ConfigDict({"material": material, "kinds": kinds, "seed": 0, "asr_rate": 0.3, "filler_rate": 0.4})


def get_config(runs: str = "runs/demo") -> ConfigDict:
    runs, _, recorded = runs.partition(",")
    c = tiny.get_config() if runs == "baselines" else demo.get_config(runs=runs)
    c.test_set = "v1"
    c.operating = operating()
    c.robustness = None if recorded else robustness("ja")
    if runs == "baselines":
        c.models = (*c.models, {"name": "n-grams", "kind": "ngrams", "seed": 0, "settings": tiny.ngram_settings()})
        c.comparisons = (*c.comparisons, {"a": "n-grams", "b": "keywords", "metric": "exact_category"})
        return c
    c.questions = knowledge.questions()
    c.slices = knowledge.SLICES
    c.kept = knowledge.kept("base + SFT", "base + CPT + SFT")
    if recorded:
        asking = demo.endpoint_entry("", "")["asking"]
        c.models = (*c.models, {"name": "endpoint", "kind": "recorded", "seed": 0, "path": recorded, "asking": asking})
        c.comparisons = (*c.comparisons, {"a": "base + CPT + SFT", "b": "endpoint", "metric": "exact_category"})
    return c
