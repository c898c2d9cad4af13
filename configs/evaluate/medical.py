"""Question: does the chain serve another industry by data alone? Sixty held-out conversations of clinic counsellors.

    python -m experiments.evaluate --config=configs/evaluate/medical.py --workdir=runs/medical/evaluate

Sixty conversations tell apart only large differences; the figures show that the chain runs, not which model is best.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo

SEEDS = (0,)


def get_config(endpoint: str = "", runs: str = "runs/medical") -> ConfigDict:
    c = demo.get_config(endpoint, runs)
    c.task = "configs/tasks/medical_advertising_ja"
    c.models = tuple(entry for entry in c.models if entry["kind"] != "run" or entry["seed"] in SEEDS)
    return c
