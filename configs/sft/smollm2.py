"""Question: what does a real pretrained model, SmolLM2-135M-Instruct, learn of insurance conduct from 700 short conversations?

    python -m experiments.sft --config=configs/sft/smollm2.py:SEED --workdir=runs/smollm2/sft_0

LoRA beside every matrix; only the verdict's tokens are targets. BASE is made by the first command of configs/pipeline/smollm2.py.
Cost: see there.
"""

from ml_collections import ConfigDict

from configs.sft import tiny

BASE = "runs/models/smollm2_135m_instruct"


def get_config(seed: str = "0", runs: str = "runs/smollm2") -> ConfigDict:
    c = tiny.get_config()
    c.seed = int(seed)  # of the adapter's first values
    c.init = BASE
    c.lora = ConfigDict({"rank": 8, "alpha": 16.0, "targets": ("q", "k", "v", "o", "gate", "up", "down")})
    c.compute.scan_layers = True  # thirty layers, compiled as one
    c.data.samples = f"{runs}/synthesize/train.jsonl"
    c.data.heldout_samples = f"{runs}/synthesize/dev.jsonl"
    c.data.row_length = 256  # the longest conversation with its prompt, or two or three short ones
    c.data.batch_size = 4
    c.data.seed = int(seed)
    c.epochs = 2
    c.train.update({"eval_every": 20, "log_every": 5})
    c.optim.update({"learning_rate": 1e-3, "final_learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 10})
    c.checkpoint.update({"save_every": 20, "keep_last": 1, "keep_best": 1})
    return c
