"""Question: what came out of the complaint task? The demo's page for English documents with several labels.

python -m experiments.report --config=configs/report/complaint.py --workdir=runs/complaint/report
"""

from ml_collections import ConfigDict

from configs.report import demo

SEEDS = (0,)

LIMITS = (
    "The base has read Japanese manuals; its English is what stood between them. Nothing here tells how well a model that "
    "knows English would sort messages.",
    "Sixty-eight test messages by the writer of the training ones: at an accuracy of 70 % the interval is 11 points either way.",
    "One reader chose the labels; about twelve messages could carry one more for a strict reader. The output is no basis for a "
    "decision about a person.",
)


def get_config(runs: str = "runs/complaint") -> ConfigDict:
    c = demo.get_config(runs)
    c.title = "Documents in English, several labels each: complaint triage by data alone"
    c.introduction = (
        "The demo's chain without continued pre-training, on another task folder; no line of code differs. Every figure is made "
        "from the folders named below it."
    )
    c.example_model = "base + SFT"
    c.training = ({"name": "SFT on the base, seed 0", "folder": f"{runs}/sft_0"},)
    c.data = ({"name": "synthetic messages", "folder": f"{runs}/synthesize"},)
    c.stages = (
        {"name": "synthesize", "folder": f"{runs}/synthesize"},
        *({"name": f"SFT, seed {s}", "folder": f"{runs}/sft_{s}"} for s in SEEDS),
        {"name": "evaluate", "folder": f"{runs}/evaluate"},
    )
    c.quotation = ConfigDict()
    c.limits = LIMITS
    c.own_data = c.own_data.replace("evaluate/demo.py", "evaluate/complaint.py").replace(
        "insurance_sales_compliance", "complaint_triage_en"
    )
    return c
