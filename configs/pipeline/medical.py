"""Question: does the demo's chain serve another industry with no change outside configs/? Medical advertising, one seed.

    python -m experiments.pipeline --config=configs/pipeline/medical.py --workdir=runs/medical

Base (configs/base) -> CPT on medical documents -> conversations from a recorded teacher -> SFT, with and without CPT -> 60
held-out conversations -> tables and a page. Cost: a few minutes on two cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.stages = (
        {"name": "prepare", "program": "prepare", "config": "configs/prepare/medical.py"},
        {"name": "replay", "program": "prepare", "config": "configs/prepare/demo_talks.py"},
        {"name": "cpt", "program": "cpt", "config": "configs/cpt/medical.py"},
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/medical.py"},
        {"name": "sft_0", "program": "sft", "config": "configs/sft/medical.py:base,0"},
        {"name": "cpt_sft_0", "program": "sft", "config": "configs/sft/medical.py:cpt,0"},
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/medical.py"},
        {"name": "report", "program": "report", "config": "configs/report/medical.py"},
    )
    return c
