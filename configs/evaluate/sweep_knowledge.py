"""Question: what does each arm of a sweep over CPT know of the domain, and what of the rest has it forgotten?

    python -m experiments.sweep --config=configs/sweep/replay_share.py --workdir=runs/sweeps/replay_share

The stage that follows the arms; "*" stands for every arm. Finance questions and held-out slices before and after, with the
margins of configs/evaluate/knowledge.py. The argument is TEST_SET,STAGE, as in configs/evaluate/sweep.py.
"""

from ml_collections import ConfigDict

from configs.evaluate import knowledge, sweep


def get_config(argument: str = "dev:demo,cpt") -> ConfigDict:
    c = sweep.get_config(argument)
    c.questions = knowledge.questions()
    c.slices = knowledge.SLICES
    c.kept = knowledge.kept("base", "*")
    return c
