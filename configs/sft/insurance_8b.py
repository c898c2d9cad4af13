"""Question: what does fine-tuning on the teacher's conversations make of the 8B base, the instruct model, CPT and its control?

    python -m experiments.sft --config=configs/sft/insurance_8b.py:h100x8,cpt,0 --workdir=runs/insurance_8b/cpt_sft_0

The argument is MESH,INIT,SEED; INIT is base, instruct, cpt or control. All arms read the same samples for as many epochs at one
rate: Swallow's own SFT peaked at 2.5e-5; a narrow task takes less. About a quarter of an hour on 8 H100s. Answer: none yet.
"""

from ml_collections import ConfigDict

from configs.cpt import llama31_swallow_8b
from configs.sft import tiny

BASE = "models/Llama-3.1-Swallow-8B-v0.2"
INSTRUCT = "models/Llama-3.1-Swallow-8B-Instruct-v0.2"


def get_config(argument: str = "h100x8,base,0", runs: str = "runs/insurance_8b") -> ConfigDict:
    mesh, init, seed = argument.split(",")
    inits = {"base": BASE, "instruct": INSTRUCT, "cpt": f"{runs}/cpt", "control": f"{runs}/control"}
    if init not in inits:
        raise ValueError(f"insurance_8b.py:{argument}: unknown INIT {init!r}; known: {', '.join(inits)}")
    big = llama31_swallow_8b.get_config(mesh)
    c = tiny.get_config()
    c.init = inits[init]
    c.mesh, c.compute, c.hosts = big.mesh, big.compute, big.hosts
    c.data.samples = f"{runs}/synthesize/train.jsonl"
    c.data.heldout_samples = f"{runs}/synthesize/dev.jsonl"
    c.data.row_length = 8192  # two or three conversations with their definitions
    c.data.batch_size = 16
    c.data.seed = int(seed)
    c.epochs = 2
    c.train.update({"loss_chunk": 1024, "eval_every": 50, "log_every": 10})
    c.optim.update({"learning_rate": 1e-5, "final_learning_rate": 1e-6, "warmup_steps": 20, "mu_dtype": big.optim.mu_dtype})
    c.checkpoint.update({"save_every": 50, "keep_last": 1, "keep_best": 1})
    return c
