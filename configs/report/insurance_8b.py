"""Question: what came out of the real recipe? Six arms, curves, funnels, thresholds and the browser of conversations on one page.

python -m experiments.report --config=configs/report/insurance_8b.py --workdir=runs/insurance_8b/report
"""

from ml_collections import ConfigDict

from configs.report import demo, tiny

LIMITS = (
    "The test conversations were written for this project; no lawyer reviewed them, and real calls have noise and topics that "
    "nobody planned. The output is no basis for a decision about a person.",
    "One run of CPT and one of its control: their difference holds the luck of one order of the data each.",
    "The teacher and the base share their family; a test written by other hands is the fairer one.",
)


def get_config(runs: str = "runs/insurance_8b") -> ConfigDict:
    c = tiny.get_config()
    c.title = "Insurance sales compliance with Llama 3.1 Swallow 8B"
    c.introduction = (
        "Finance CPT, conversations from a 70B teacher, SFT, and a control that read as much general text. Built with Llama."
    )
    c.evaluations = (f"{runs}/evaluate",)
    c.example_model = "CPT + SFT"
    c.training = (
        {"name": "CPT, finance", "folder": f"{runs}/cpt"},
        {"name": "CPT, general (control)", "folder": f"{runs}/control"},
        {"name": "SFT, seed 0", "folder": f"{runs}/sft_0"},
        {"name": "SFT after CPT, seed 0", "folder": f"{runs}/cpt_sft_0"},
    )
    c.data = (
        {"name": "finance corpus", "folder": f"{runs}/finance"},
        {"name": "general corpus", "folder": f"{runs}/general"},
        {"name": "synthetic conversations", "folder": f"{runs}/synthesize"},
    )
    c.stages = (*c.data, *c.training, {"name": "evaluate", "folder": f"{runs}/evaluate"})
    c.quotation = demo.PUBLISHED
    c.limits = LIMITS
    c.browser = True
    return c
