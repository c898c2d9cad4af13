"""Question: what do finance documents add to the demo's base, before it is fine-tuned?

    python -m experiments.cpt --config=configs/cpt/demo.py --workdir=runs/demo/cpt

Needs the shards of configs/prepare/demo_cpt.py and demo_talks.py (replay against forgetting: one row in five).
Cost: about a minute on two cores.
"""

from ml_collections import ConfigDict

from configs.cpt import demo_base


def get_config(runs: str = "runs/demo") -> ConfigDict:
    c = demo_base.get_config()
    c.init = "configs/base"
    c.tokenizer = ""
    c.model = None
    c.data.prepare = ""
    c.data.mixture = ((f"{runs}/prepare/train", 4), (f"{runs}/replay/train", 1))
    c.data.heldout = f"{runs}/prepare/heldout"
    c.train.update({"steps": 80, "eval_every": 20, "log_every": 10})
    # A third of the base's peak rate, re-warmed and decayed: the base ended its own schedule low.
    c.optim.update({"learning_rate": 1e-3, "final_learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 10})
    c.checkpoint.update({"save_every": 40, "keep_last": 1, "keep_best": 1})
    return c
