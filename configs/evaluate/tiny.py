"""Question: does the evaluation run end to end? Baselines only, on the dev conversations; a few seconds.

    python -m experiments.evaluate --config=configs/evaluate/tiny.py

The baselines learn from the very file they are tested on, so the figures say nothing about them.
"""

from ml_collections import ConfigDict

TASK = "configs/tasks/insurance_sales_compliance"


def statistics() -> ConfigDict:
    """Level of intervals, draws, seed and calibration bins of every evaluation here."""
    return ConfigDict({"level": 0.95, "permutations": 100_000, "resamples": 10_000, "seed": 0, "bins": 10, "simulations": 200})


def ngram_settings() -> dict:
    # Characters, since Japanese has no spaces; 2-4 covers words and verb endings.
    return {"shortest": 2, "longest": 4, "min_documents": 2, "inverse_regularisation": 10.0, "max_iterations": 1000}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.task = TASK
    c.test_set = "dev:demo"
    c.training = (f"{TASK}/dev_demo.jsonl",)
    c.asking = ConfigDict({"mode": "labels", "prompt": None, "normalise": "sum", "max_new_tokens": 16})
    c.engine = ConfigDict(
        {"dtype": "float32", "attention": "rows", "slots": 8, "max_length": 1024, "chunk": 16, "tokens_per_batch": 8192}
    )
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "keywords", "kind": "keywords", "seed": 0},
    )
    c.comparisons = ({"a": "keywords", "b": "constant", "metric": "exact_category"},)
    c.statistics = statistics()
    c.operating = None
    c.questions = None
    c.slices = ()
    c.kept = ()
    c.robustness = None
    c.ranking = ()
    return c
