"""Question: what do the medical documents add to the demo's base, before it is fine-tuned?

    python -m experiments.cpt --config=configs/cpt/medical.py --workdir=runs/medical/cpt

Needs the shards of configs/prepare/medical.py and demo_talks.py. Cost: half a minute on two cores.
"""

from ml_collections import ConfigDict

from configs.cpt import demo


def get_config(runs: str = "runs/medical") -> ConfigDict:
    c = demo.get_config(runs)
    c.train.update({"steps": 40, "eval_every": 10})  # a corpus half of the finance one: half of the steps
    c.optim.warmup_steps = 5
    c.checkpoint.save_every = 20
    return c
