"""Question: which step of the method earns its place? The demo with a control and an instruct arm, on two test sets.

    python -m experiments.pipeline --config=configs/pipeline/ablation.py --workdir=runs/demo

Base, instruct few-shot, instruct + SFT, SFT, CPT + SFT, and CPT on as many tokens of general text + SFT; three seeds an arm; the
demo's own test and test_v1. In the demo's folder the stages that are done are not done again. Cost: the demo's, and about as
much again.
"""

from ml_collections import ConfigDict

from configs.pipeline import demo


def get_config() -> ConfigDict:
    c = demo.get_config()
    done = tuple(stage for stage in c.stages if stage["program"] not in ("evaluate", "report"))
    c.stages = (
        *done,
        {"name": "control", "program": "cpt", "config": "configs/cpt/ablation.py"},
        {"name": "instruct", "program": "sft", "config": "configs/sft/ablation.py:chats,0"},
        *(
            {"name": f"{init}_sft_{seed}", "program": "sft", "config": f"configs/sft/ablation.py:{init},{seed}"}
            for init in ("control", "instruct")
            for seed in demo.SEEDS
        ),
        *(
            {"name": f"ablation_{name}", "program": "evaluate", "config": f"configs/evaluate/ablation.py:{name}"}
            for name in ("demo", "v1")
        ),
        {"name": "ablation_report", "program": "report", "config": "configs/report/ablation.py"},
    )
    return c
