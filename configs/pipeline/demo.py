"""Question: what does the whole method make of a small base, on two cores, in ten minutes? Seven programs, one command.

    python -m experiments.pipeline --config=configs/pipeline/demo.py --workdir=runs/demo

Base (committed, configs/base) -> CPT on finance documents -> conversations from a recorded teacher and a live engine -> SFT,
with and without CPT, three seeds each -> 344 held-out conversations -> tables and a page. The comparisons are
declared in configs/evaluate/demo.py. Answer: notebooks/LOG.md.

Token budget: CPT 80 x 4,096 = 328 k; each SFT about 380 k (two epochs); live synthesis up to 56 x 160 written; evaluation
7 models x 344 talks x about 260 = 630 k read.
"""

from ml_collections import ConfigDict

SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
    c = ConfigDict()
    sft = [
        {"name": f"{arm}_{seed}", "program": "sft", "config": f"configs/sft/demo.py:{init},{seed}"}
        for arm, init in (("sft", "base"), ("cpt_sft", "cpt"))
        for seed in SEEDS
    ]
    c.stages = (
        {"name": "prepare", "program": "prepare", "config": "configs/prepare/demo_cpt.py"},
        {"name": "replay", "program": "prepare", "config": "configs/prepare/demo_talks.py"},
        {"name": "cpt", "program": "cpt", "config": "configs/cpt/demo.py"},
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/demo.py"},
        *sft,
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/demo.py"},
        {"name": "report", "program": "report", "config": "configs/report/demo.py"},
    )
    return c
