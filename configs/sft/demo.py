"""Question: what does fine-tuning on the synthetic conversations make of the demo's base, with and without CPT?

    python -m experiments.sft --config=configs/sft/demo.py:INIT,SEED --workdir=runs/demo/sft_0

INIT is `base` or `cpt`; SEED changes the order of the data. Cost: about a minute on two cores.
"""

from ml_collections import ConfigDict

from configs.sft import tiny


def get_config(argument: str = "base,0", runs: str = "runs/demo") -> ConfigDict:
    init, seed = argument.split(",")
    if init not in ("base", "cpt"):
        raise ValueError(f"sft/demo.py:{argument}: INIT is {init!r}; known: base, cpt")
    c = tiny.get_config()
    c.init = f"{runs}/cpt" if init == "cpt" else "configs/base"
    c.data.samples = f"{runs}/synthesize/train.jsonl"
    c.data.heldout_samples = f"{runs}/synthesize/dev.jsonl"
    c.data.row_length = 512  # about three training conversations
    c.data.batch_size = 4
    c.data.seed = int(seed)
    c.epochs = 2  # the ten minutes allow no more; held-out loss still falls
    c.train.update({"eval_every": 40, "log_every": 20})
    # Held-out loss after two epochs on the CPT model, seed 0: 0.371 at 1e-3, 0.374 at 2e-3, 0.362 at 3e-3.
    c.optim.update({"learning_rate": 3e-3, "final_learning_rate": 1e-5, "warmup_steps": 10})
    c.checkpoint.update({"save_every": 40, "keep_last": 1, "keep_best": 1})
    return c
