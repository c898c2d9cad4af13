"""Question: does fine-tuning run at all? Eight chat samples on the demo's base, seconds on one core.

python -m experiments.sft --config=configs/sft/tiny.py --workdir=runs/sft/tiny
"""

from ml_collections import ConfigDict

from configs.cpt import demo_base


def get_config() -> ConfigDict:
    b = demo_base.get_config()
    c = ConfigDict()
    c.seed = 0
    c.init = "configs/base"
    c.init_unfinished = False
    c.mesh, c.compute, c.optim, c.checkpoint, c.hosts = b.mesh, b.compute, b.optim, b.checkpoint, b.hosts
    c.data = ConfigDict()
    c.data.samples = "configs/prepare/tiny_data/chats.jsonl"
    c.data.heldout_samples = "configs/prepare/tiny_data/chats.jsonl"
    c.data.samples_weight = 1
    c.data.replay = ()
    c.data.row_length = 256
    c.data.train_on = "last"
    c.data.batch_size = 2
    c.data.seed = 0
    c.epochs = 3
    c.train = b.train
    del c.train.steps  # follows from the epochs
    c.train.update({"eval_every": 2, "log_every": 2})
    c.optim.update({"learning_rate": 1e-3, "final_learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 1})
    c.checkpoint.update({"save_every": 2, "keep_last": 1, "keep_best": 1})
    return c
