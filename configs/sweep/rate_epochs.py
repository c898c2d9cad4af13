"""Question: which learning rate and how many epochs fit the demo's SFT? Four rates by three lengths, compared pair by pair.

    python -m experiments.sweep --config=configs/sweep/rate_epochs.py --workdir=runs/sweeps/rate_epochs

Twelve runs with one seed each, on all of the demo's conversations; 66 comparisons, so only large differences survive Holm. About
twenty minutes on two cores. Chosen on the dev set: the test set stays unseen.
"""

from ml_collections import ConfigDict

from configs.sweep import axis, demo, product


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.shared = ({"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/demo.py"},)
    c.after = (
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/sweep.py:dev:demo,sft"},
        {"name": "report", "program": "report", "config": "configs/report/sweep.py:sft"},
    )
    return c


def sweep() -> dict[str, dict]:
    return product(
        axis("sft.optim.learning_rate", (3e-4, 1e-3, 3e-3, 6e-3), name="rate"),
        axis("sft.epochs", (1, 2, 4), name="epochs"),
    )
