"""Question: what does CPT on a finance corpus add to Llama 3.1 Swallow 8B?

    python -m experiments.cpt --config=configs/cpt/llama31_swallow_8b.py:v5p-16 --workdir=runs/cpt/swallow_8b
    python -m tools.plan --config=configs/cpt/llama31_swallow_8b.py:v5p-16 --topology=v5p:2x2x2
    python -m tools.plan --config=configs/cpt/llama31_swallow_8b.py:h200x1 --device=h200

The argument names a mesh of configs/meshes.py. Download tokyotech-llm/Llama-3.1-Swallow-8B-v0.2 (Llama 3.1 Community
Licence) into models/, and prepare the corpus first (configs/domains/japanese_finance). Sixteen rows of 8,192 tokens a step:
131,072 tokens; 7,630 steps make a billion (other meshes: as many tokens). Rates: Swallow's own CPT peaked at 2.5e-5 over 200
billion tokens; a short run on a narrower corpus takes the same peak, re-warmed (arXiv 2403.08763). Answer: none yet, the run
needs accelerators.
"""

from ml_collections import ConfigDict

from configs import meshes, models
from configs.cpt import demo_base

# mesh -> (attention backend, first moment, rows a step): what fits, see tools.plan.
CHOICES = {
    "h200x1": ("xla", "bfloat16", 2),
    "h100x8": ("xla", None, 16),
    "v6e-64": ("splash", None, 64),
}


def get_config(mesh: str = "v5p-16") -> ConfigDict:
    c = demo_base.get_config()
    attention, mu_dtype, rows = CHOICES.get(mesh, ("splash", None, 16))
    c.init = "models/Llama-3.1-Swallow-8B-v0.2"
    c.tokenizer = ""
    c.model = models.llama31("8b")  # for tools.plan; the checkpoint's own config.json decides
    c.mesh = meshes.mesh(mesh)
    c.hosts = ConfigDict({"coordinator": ""})  # "auto" on TPU pods, see tools.launch
    c.compute.update({"dtype": "bfloat16", "remat": "full", "scan_layers": True, "attention": attention})
    c.data.prepare = ""
    c.data.mixture = (("runs/prepare/japanese_finance/train", 4), ("runs/prepare/general/train", 1))
    c.data.heldout = "runs/prepare/japanese_finance/heldout"
    c.data.batch_size = rows
    # bfloat16 products give bfloat16 gradients: kept so, the layers' take half the memory, and the sums are the same.
    c.train.update({"steps": 7630 * 16 // rows, "loss_chunk": 1024, "grad_dtype": "bfloat16", "eval_every": 200, "log_every": 10})
    c.optim.update(
        {
            "learning_rate": 2.5e-5,
            "final_learning_rate": 2.5e-6,
            "schedule": "cosine",
            "warmup_steps": 200,
            "mu_dtype": mu_dtype,
        }
    )
    c.checkpoint.update({"save_every": 200, "keep_last": 1, "keep_best": 1})
    return c
