"""Question: does the 70B teacher's own base gain from the finance corpus as the 8B does?

    python -m tools.plan --config=configs/cpt/llama31_swallow_70b.py --topology=v5p:4x4x4
    python -m tools.plan --config=configs/cpt/llama31_swallow_70b.py:h200x1 --device=h200 --sample=128x1024 --int8

As llama31_swallow_8b.py, on 64 chips with 64 rows a step. As a teacher it needs less: --sample plans that, with the meshes
h200x1 (int8), v5p-8-sample and v5e-16-sample. Answer: none yet, the run needs accelerators.
"""

from ml_collections import ConfigDict

from configs import meshes, models
from configs.cpt import llama31_swallow_8b


def get_config(mesh: str = "v5p-128") -> ConfigDict:
    c = llama31_swallow_8b.get_config()
    c.init = "models/Llama-3.1-Swallow-70B-v0.1"
    c.model = models.llama31("70b")
    c.mesh = meshes.mesh(mesh)
    c.data.batch_size = 64
    c.train.steps = 1910
    c.optim.learning_rate = 1e-5
    return c
