"""Question: what did the ablation show? Both test sets on one page.

python -m experiments.report --config=configs/report/ablation.py --workdir=runs/demo/ablation_report
"""

from ml_collections import ConfigDict

from configs.evaluate.ablation import ARMS, SEEDS
from configs.report import demo


def get_config(runs: str = "runs/demo") -> ConfigDict:
    c = demo.get_config(runs)
    c.title = "Which step earns its place? The ablation at toy size"
    c.introduction = (
        "The same fine-tuning behind four beginnings: the base, the base after CPT on finance text, after CPT on as many tokens "
        "of general text (the control), and after a few questions and answers (in the place of an instruct model)."
    )
    c.evaluations = (f"{runs}/ablation_demo", f"{runs}/ablation_v1")
    c.example_model = "CPT + SFT"
    c.training = (
        {"name": "CPT", "folder": f"{runs}/cpt"},
        {"name": "CPT on general text, the control", "folder": f"{runs}/control"},
        *({"name": f"{name}, seed 0", "folder": f"{runs}/{folder}_0"} for name, folder in ARMS.items()),
    )
    c.stages = (
        {"name": "CPT", "folder": f"{runs}/cpt"},
        {"name": "control", "folder": f"{runs}/control"},
        *({"name": f"{name}, seed {s}", "folder": f"{runs}/{folder}_{s}"} for name, folder in ARMS.items() for s in SEEDS),
        {"name": "evaluate, demo test", "folder": f"{runs}/ablation_demo"},
        {"name": "evaluate, test_v1", "folder": f"{runs}/ablation_v1"},
    )
    c.own_data = ""
    return c
