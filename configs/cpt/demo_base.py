"""Question: how good a base does a small Llama become on free Japanese documentation, in hours on two cores?

    python -m experiments.prepare --config=configs/prepare/demo_base.py
    python -m experiments.prepare --config=configs/prepare/demo_talks.py --config.tokenizer=runs/prepare/demo_base/tokenizer
    python -m experiments.cpt --config=configs/cpt/demo_base.py

Needs Debian's packages named in configs/domains/demo_general_ja/domain.yaml. Answer: see configs/base/README.md.
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.init_unfinished = False  # a half-trained run as init is refused
    c.init = ""  # random weights of the shape below, with the tokenizer that prepare trained
    c.tokenizer = "runs/prepare/demo_base/tokenizer"
    c.model = models.llama_demo()
    c.mesh = ConfigDict({"replica": 1, "fsdp": 1, "tensor": 1, "context": 1})
    c.compute = ConfigDict({"dtype": "float32", "remat": "none", "scan_layers": False, "attention": "rows"})
    c.data = ConfigDict()
    c.data.prepare = "configs/prepare/demo_base.py"
    # Sixteen rows of manuals to one of everyday talk: the talks are 1/30 of the text, so they are seen about twice as often.
    c.data.mixture = (("runs/prepare/demo_base/train", 16), ("runs/prepare/demo_talks/train", 1))
    c.data.heldout = "runs/prepare/demo_base/heldout"
    c.data.batch_size = 8
    c.data.seed = 0
    c.train = ConfigDict({"steps": 4800, "micro_batches": 1, "loss_chunk": 0, "eval_every": 100, "log_every": 20})
    c.train.update({"z_loss": 0.0, "grad_dtype": "float32"})
    c.train.update({"per_source": False, "spike_ratio": 0.0, "profile": (), "tensorboard": False})
    c.optim = ConfigDict(
        {
            "learning_rate": 3e-3,
            "final_learning_rate": 1e-5,
            "schedule": "wsd",
            "warmup_steps": 100,
            "decay_steps": 1200,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "mu_dtype": None,
            "frozen": (),
        }
    )
    c.checkpoint = ConfigDict({"save_every": 100, "keep_last": 2, "keep_best": 0})
    c.hosts = ConfigDict({"coordinator": ""})  # HOST:PORT where several processes make one run, "auto" on TPU pods
    return c
