"""Question: what do models and baselines do on test_v1, conversation by conversation? With the browser of conversations.

    python -m experiments.report --config=configs/report/test_v1.py --workdir=runs/report/test_v1

Run configs/evaluate/test_v1.py first. An argument such as :FOLDER,MODEL names another evaluation and the model whose examples are
shown.
"""

from ml_collections import ConfigDict

from configs.report import demo, tiny


def get_config(evaluation: str = "runs/evaluate/test_v1,base + CPT + SFT") -> ConfigDict:
    folder, model = evaluation.split(",")
    c = tiny.get_config()
    c.title = "Insurance sales compliance: the benchmark test_v1"
    c.introduction = (
        "344 Japanese conversations written one by one: 172 with a violation of one of seven categories, 172 compliant twins. "
        "No lawyer reviewed the labels; two blind relabellings are published beside them."
    )
    c.evaluations = (folder,)
    c.example_model = model
    c.browser = True
    c.quotation = demo.PUBLISHED
    return c
