"""Question: what came out of the medical task? The demo's page for another industry.

python -m experiments.report --config=configs/report/medical.py --workdir=runs/medical/report
"""

from ml_collections import ConfigDict

from configs.report import demo

SEEDS = (0,)

LIMITS = (
    "A toy model learns the surface of this task: which phrases go with which label. It does not know medicine.",
    "Sixty test conversations, written by the same project as the training ones: they show that the chain runs, not how well "
    "it would do on real talks.",
    "The categories apply the rules for medical advertising to a counsellor's talk; no lawyer and no doctor has reviewed them. "
    "The output is no basis for a decision about a person or a treatment.",
)


def get_config(runs: str = "runs/medical") -> ConfigDict:
    c = demo.get_config(runs)
    c.title = "Another industry by data alone: medical advertising"
    c.introduction = (
        "The demo's chain with another domain and another task folder; no line of code differs. Every figure is made from the "
        "folders named below it."
    )
    c.data = (
        {"name": "medical corpus", "folder": f"{runs}/prepare"},
        *(entry for entry in c.data if entry["folder"] != f"{runs}/prepare"),
    )
    others = {f"{runs}/{arm}_{seed}" for arm in ("sft", "cpt_sft") for seed in demo.SEEDS if seed not in SEEDS}
    c.stages = tuple(stage for stage in c.stages if stage["folder"] not in others)
    c.quotation = ConfigDict()
    c.limits = LIMITS
    c.own_data = c.own_data.replace("evaluate/demo.py", "evaluate/medical.py").replace(
        "insurance_sales_compliance", "medical_advertising_ja"
    )
    return c
