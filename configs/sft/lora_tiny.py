"""Question: does an adapter train at all? configs/sft/tiny.py with the base frozen and LoRA beside every matrix.

python -m experiments.sft --config=configs/sft/lora_tiny.py --workdir=runs/sft/lora_tiny
python -m tools.export --run=runs/sft/lora_tiny --out=adapter --adapter    # what peft and vLLM load; without --adapter: merged
"""

from ml_collections import ConfigDict

from configs.sft import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.lora = ConfigDict({"rank": 8, "alpha": 16.0, "targets": ("q", "k", "v", "o", "gate", "up", "down")})
    # Ten times the rate of full tuning: B starts at zero, and A moves only once B has left it.
    c.optim.update({"learning_rate": 1e-2, "final_learning_rate": 1e-3})
    return c
