"""Question: does training run at all? A 35-thousand-parameter Llama from random weights, seconds on one core.

    python -m experiments.cpt --config=configs/cpt/tiny.py --workdir=runs/cpt/tiny

Makes its shards first (configs/prepare/tiny.py) where they are missing.
"""

from ml_collections import ConfigDict

from configs.cpt import demo_base


def get_config() -> ConfigDict:
    c = demo_base.get_config()
    c.tokenizer = "runs/prepare/tiny/tokenizer"
    c.model.update(
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        }
    )
    c.data.prepare = "configs/prepare/tiny.py"
    c.data.mixture = (("runs/prepare/tiny/train", 1),)
    c.data.heldout = "runs/prepare/tiny/heldout"
    c.data.batch_size = 4
    c.train.update({"steps": 40, "eval_every": 10, "log_every": 10})
    c.optim.update({"warmup_steps": 5, "decay_steps": 10})
    c.checkpoint.update({"save_every": 10, "keep_last": 2, "keep_best": 1})
    return c
