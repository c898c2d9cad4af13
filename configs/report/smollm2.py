"""Question: what came out of the run with a real pretrained model? One page with all conversations.

python -m experiments.report --config=configs/report/smollm2.py --workdir=runs/smollm2/report
"""

from ml_collections import ConfigDict

from configs.evaluate.smollm2 import SEEDS
from configs.report import tiny

LIMITS = (
    "A model of 135 million parameters, read from weights of four bits, tuned on some 700 short conversations of the same "
    "project's writing: the figures say what this chain makes of this model, not what a larger one would reach.",
    "120 conversations in 60 pairs tell apart large differences only; the smallest one they detect stands beside each.",
    "One writer wrote texts and labels. No lawyer has reviewed anything. The output is no basis for a decision about a person.",
)


def get_config(runs: str = "runs/smollm2") -> ConfigDict:
    c = tiny.get_config()
    c.title = "Insurance conduct in English: SmolLM2-135M with LoRA"
    c.introduction = (
        "A real pretrained model, untouched, shown examples, and fine-tuned on synthetic conversations; 120 hand-written test "
        "conversations in twins."
    )
    c.evaluations = (f"{runs}/evaluate",)
    c.example_model = "SFT"
    c.training = tuple({"name": f"SFT, seed {s}", "folder": f"{runs}/sft_{s}"} for s in SEEDS)
    c.data = ({"name": "synthetic conversations", "folder": f"{runs}/synthesize"},)
    c.stages = (
        {"name": "synthesize", "folder": f"{runs}/synthesize"},
        *({"name": f"SFT, seed {s}", "folder": f"{runs}/sft_{s}"} for s in SEEDS),
        {"name": "evaluate", "folder": f"{runs}/evaluate"},
    )
    c.limits = LIMITS
    c.browser = True
    return c
