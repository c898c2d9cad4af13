"""Question: does the demo's chain serve documents, in English, with several labels each, with no change outside configs/?

    python -m experiments.pipeline --config=configs/pipeline/complaint.py --workdir=runs/complaint

Base (configs/base) -> messages from a recorded teacher -> SFT -> 68 held-out messages -> tables and a page. No continued
pre-training: the task has no domain folder (configs/pipeline/medical.py has one). Cost: a few minutes on two cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.stages = (
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/complaint.py"},
        {"name": "sft_0", "program": "sft", "config": "configs/sft/complaint.py:0"},
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/complaint.py"},
        {"name": "report", "program": "report", "config": "configs/report/complaint.py"},
    )
    return c
