"""Question: does a third of the demo's SFT rate do better? Two rates, three seeds, one evaluation with paired comparisons.

    python -m experiments.sweep --config=configs/sweep/demo.py --workdir=runs/sweeps/demo

Half of the demo's conversations, one epoch: six runs in about five minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.sweep import axis, product


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.shared = (
        {
            "name": "synthesize",
            "program": "synthesize",
            "config": "configs/synthesize/demo.py",
            "overrides": {"teachers.recorded.quotas.train_pairs": 40},
        },
    )
    c.stages = (
        {
            "name": "sft",
            "program": "sft",
            "config": "configs/sft/demo.py:base,0",
            "overrides": {
                "data.samples": "{shared}/synthesize/train.jsonl",
                "data.heldout_samples": "{shared}/synthesize/dev.jsonl",
                "epochs": 1,
            },
        },
    )
    c.after = (
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/sweep.py:demo,sft"},
        {"name": "report", "program": "report", "config": "configs/report/sweep.py:sft"},
    )
    return c


def sweep() -> dict[str, dict]:
    return product(
        axis("sft.optim.learning_rate", (1e-3, 3e-3), name="rate"),
        axis("sft.data.seed", (0, 1, 2), name="seed"),
    )
