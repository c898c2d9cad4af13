"""Question: which arm of a sweep won? Tables, curves of every arm and the paired comparisons on one page.

    python -m experiments.sweep --config=configs/sweep/demo.py --workdir=runs/sweeps/demo

The last stage that follows a sweep's arms; "*" stands for every arm. The argument names the stage whose training is drawn.
"""

from ml_collections import ConfigDict

from configs.report import tiny


def get_config(stage: str = "sft", runs: str = "runs/sweeps/demo") -> ConfigDict:
    c = tiny.get_config()
    c.title = "A sweep and which of its arms won"
    c.introduction = (
        "Arms that differ in their seed alone are one arm with several seeds. Every pair of arms is compared on the same "
        "conversations; Holm's p counts all comparisons of the table, so that the best of many is not taken for the best by luck."
    )
    c.evaluations = (f"{runs}/evaluate",)
    c.example_model = ""
    c.training = ({"name": "*", "folder": stage},)
    c.stages = ({"name": "*", "folder": stage},)
    c.limits = ("The arm with the largest value was chosen on the set that shows this value: expect a little less elsewhere.",)
    return c
