"""Question: which open-weight base is worth adapting? One ranked table over candidates, before anything is trained.

    python -m experiments.evaluate --config=configs/evaluate/base_models.py:NAME=FOLDER,NAME=FOLDER --workdir=runs/base_models

Accuracy on test_v1 by the task's prompt, finance questions, bits per byte by slice, tokens a character, seconds, size of the
weights and licence; the price of 1,000 checks where `dollars_per_hour` says what the machine costs. Candidates are HF folders.
The rank is the mean over the figures of `c.ranking`, declared here before any candidate is seen; with accuracies near chance the
questions and slices decide. Cost: one load and about 1,000 scored prompts a candidate.
"""

from ml_collections import ConfigDict

from configs.evaluate import knowledge, test_v1, tiny

CANDIDATES = "demo base=configs/base"


def get_config(candidates: str = CANDIDATES, dollars_per_hour: str = "") -> ConfigDict:
    c = tiny.get_config()
    c.test_set = "v1"
    c.operating = test_v1.operating()
    price = {"currency": "USD", "source": "argument of the config", "per_hour": float(dollars_per_hour or 0)}
    c.models = tuple(
        {"name": name, "kind": "hf", "seed": 0, "path": folder} | ({"price": price} if dollars_per_hour else {})
        for name, folder in (entry.split("=") for entry in candidates.split(","))
    )
    c.comparisons = ()
    c.questions = knowledge.questions()
    c.slices = knowledge.SLICES
    # One accuracy for what the task needs, one for what the domain knows, the language at large, and what a check costs.
    c.ranking = (
        {"metric": "exact_category", "test_set": "v1", "better": "higher"},
        {"metric": "choice_accuracy", "test_set": "finance_ja", "better": "higher"},
        *({"metric": "bits_per_byte", "test_set": s, "better": "lower"} for s in ("general_ja", *knowledge.FINANCE)),
        {"metric": "seconds_per_1000", "test_set": "", "better": "lower"},
    )
    return c
