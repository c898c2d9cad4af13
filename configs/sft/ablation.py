"""Question: what does fine-tuning make of the control (CPT on general text), and of a model that was instructed before?

    python -m experiments.sft --config=configs/sft/ablation.py:INIT,SEED --workdir=runs/demo/control_sft_0

INIT is `control` or `instruct`, a folder beside the demo's; the rest is configs/sft/demo.py. INIT `chats` makes the toy's
stand-in for an instruct model: the base, tuned on eight questions and answers. It shows where such a model enters, no more.
"""

from ml_collections import ConfigDict

from configs.sft import demo, tiny


def get_config(argument: str = "control,0", runs: str = "runs/demo") -> ConfigDict:
    init, seed = argument.split(",")
    if init not in ("control", "instruct", "chats"):
        raise ValueError(f"sft/ablation.py:{argument}: INIT is {init!r}; known: control, instruct, chats")
    c = demo.get_config(f"base,{seed}", runs)
    if init != "chats":
        c.init = f"{runs}/{init}"
        return c
    c.data.update(tiny.get_config().data)
    c.data.seed = int(seed)
    c.epochs = 20
    return c
