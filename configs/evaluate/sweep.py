"""Question: which arm of a sweep over the demo answers best, and is the difference more than chance?

    python -m experiments.sweep --config=configs/sweep/demo.py --workdir=runs/sweeps/demo

The stage that follows a sweep's arms; "*" stands for every arm. The argument is TEST_SET,STAGE: the stage of each arm whose model
is asked. Every pair of arms is compared, and each arm with the constant answer; Holm counts them all.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo, tiny


def get_config(argument: str = "demo,sft") -> ConfigDict:
    test_set, stage = argument.split(",")
    c = tiny.get_config()
    c.test_set = test_set
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "base", "kind": "hf", "seed": 0, "path": demo.BASE},
        {"name": "*", "kind": "run", "seed": 0, "path": stage},
    )
    c.comparisons = (
        {"a": "*", "b": "*", "metric": "exact_category"},
        {"a": "*", "b": "constant", "metric": "exact_category"},
    )
    return c
