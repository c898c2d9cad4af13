"""Question: what does fine-tuning on the complaint messages make of the demo's base?

    python -m experiments.sft --config=configs/sft/complaint.py:SEED --workdir=runs/complaint/sft_0

SEED changes the order of the data. The base knows Japanese manuals and a little English: it shows that the chain runs, no more.
Cost: about a minute on two cores.
"""

from ml_collections import ConfigDict

from configs.sft import demo


def get_config(seed: str = "0", runs: str = "runs/complaint") -> ConfigDict:
    c = demo.get_config(f"base,{seed}", runs)
    c.data.row_length = 1024  # a letter of 500 characters has twice as many tokens as a Japanese one
    c.data.batch_size = 2
    c.epochs = 4  # 72 messages
    c.train.update({"eval_every": 10, "log_every": 10})
    c.checkpoint.save_every = 10
    return c
