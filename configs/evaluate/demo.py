"""Question: what do SFT, and CPT before it, add on 344 held-out conversations, and do they beat what is free?

    python -m experiments.evaluate --config=configs/evaluate/demo.py --workdir=runs/demo/evaluate

An endpoint joins as an arm with --config=configs/evaluate/demo.py:URL,MODEL (key in OPENAI_API_KEY). The
comparisons are declared here, before any run: SFT against the best constant answer and against the base are the primary ones.
"""

from ml_collections import ConfigDict

from configs.evaluate import tiny

SEEDS = (0, 1, 2)
BASE = "configs/base"


def endpoint_entry(url: str, model: str) -> dict:
    """A chat endpoint writes its verdict: hosted ones do not score given answers. Its key is in OPENAI_API_KEY."""
    return {
        "kind": "endpoint",
        "seed": 0,
        "base_url": url,
        "model": model,
        "api_key_env": "OPENAI_API_KEY",
        "concurrency": 8,
        "attempts": 5,
        "backoff_s": 1.0,
        "timeout_s": 120.0,
        "cache": None,
        "asking": {"mode": "generate", "prompt": "classify_full", "normalise": "sum", "max_new_tokens": 32},
    }


def get_config(endpoint: str = "", runs: str = "runs/demo") -> ConfigDict:
    c = tiny.get_config()
    c.test_set = "demo"
    c.training = (f"{runs}/synthesize/accepted.jsonl",)
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "keywords", "kind": "keywords", "seed": 0},
        {"name": "n-grams", "kind": "ngrams", "seed": 0, "settings": tiny.ngram_settings()},
        {"name": "base", "kind": "hf", "seed": 0, "path": BASE},
        *({"name": "base + SFT", "kind": "run", "seed": s, "path": f"{runs}/sft_{s}"} for s in SEEDS),
        *({"name": "base + CPT + SFT", "kind": "run", "seed": s, "path": f"{runs}/cpt_sft_{s}"} for s in SEEDS),
    )
    if endpoint:
        url, model = endpoint.rsplit(",", 1)
        c.models = (*c.models, {"name": model, **endpoint_entry(url, model)})
    c.comparisons = (
        {"a": "base + SFT", "b": "constant", "metric": "exact_category"},
        {"a": "base + SFT", "b": "base", "metric": "exact_category"},
        {"a": "base + CPT + SFT", "b": "base + SFT", "metric": "exact_category"},
        {"a": "base + CPT + SFT", "b": "n-grams", "metric": "exact_category"},
    )
    return c
