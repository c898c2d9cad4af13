"""Question: is it finance text that helps, or only more steps? The demo's CPT with as many tokens of general text, the control.

    python -m experiments.cpt --config=configs/cpt/ablation.py --workdir=runs/demo/control

Everyday talks in the place of finance documents; steps, batch, rates and held-out set are those of configs/cpt/demo.py.
"""

from ml_collections import ConfigDict

from configs.cpt import demo


def get_config(runs: str = "runs/demo") -> ConfigDict:
    c = demo.get_config(runs)
    c.data.mixture = ((f"{runs}/replay/train", 1),)
    return c
