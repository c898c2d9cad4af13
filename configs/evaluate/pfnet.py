"""Question: what does continued pre-training change on pfnet's Japanese finance questions, beside our own?

    git clone https://github.com/pfnet-research/japanese-lm-fin-harness DIR
    python -m experiments.evaluate --config=configs/evaluate/pfnet.py:BEFORE,AFTER,DIR --workdir=runs/evaluate/pfnet

BEFORE and AFTER are HF folders or runs. The margin, five points a set, stands here before any run. Prompt and scoring are this
project's (letters behind the choices), so the figures are not those of pfnet's own table. cma_basics is not in their repository:
put its data.json in its place and add :BEFORE,AFTER,DIR,cma_basics.
"""

from ml_collections import ConfigDict

from configs.evaluate import knowledge

SETS = {
    "fp2": "fp2/data.json",
    "security_sales_1": "security_sales_1/data.json",
    "CPA_AUDIT": "cpa/CPA_AUDIT.xlsx",
    "cma_basics": "cma_basics/data.json",
}


def get_config(argument: str = "configs/base,runs/demo/cpt,DIR") -> ConfigDict:
    before, after, copy, *more = argument.split(",")
    c = knowledge.get_config(f"{before},{after}")
    names = ("fp2", "security_sales_1", "CPA_AUDIT", *more)
    c.questions.files = (*c.questions.files, *(f"{copy}/jlm_fin_eval/datasets/{SETS[name]}" for name in names))
    c.questions.answers = ("A", "B", "C", "D", "E", "F")
    common = {"before": "before", "after": "after", "metric": "choice_accuracy", "margin": 0.05}
    c.kept = (*c.kept, *({**common, "test_set": name} for name in names))
    return c
