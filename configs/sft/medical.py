"""Question: what does fine-tuning on the medical conversations make of the demo's base, with and without CPT?

    python -m experiments.sft --config=configs/sft/medical.py:INIT,SEED --workdir=runs/medical/sft_0

INIT is `base` or `cpt`; SEED changes the order of the data. Cost: about a minute on two cores.
"""

from ml_collections import ConfigDict

from configs.sft import demo


def get_config(argument: str = "base,0", runs: str = "runs/medical") -> ConfigDict:
    c = demo.get_config(argument, runs)
    c.epochs = 4  # 480 conversations against the demo's 1,120: about the same number of steps
    return c
