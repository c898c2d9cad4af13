"""Question: what does CPT on finance text make of Llama 3.1 Swallow 8B, and what would as much general text have made of it?

    python -m experiments.cpt --config=configs/cpt/insurance_8b.py:h100x8,finance --workdir=runs/insurance_8b/cpt
    python -m experiments.cpt --config=configs/cpt/insurance_8b.py:h100x8,general --workdir=runs/insurance_8b/control
    python -m tools.plan --config=configs/cpt/insurance_8b.py:v5p-16,finance --topology=v5p:2x2x2

The argument is MESH,TEXT. A billion tokens each, at the rates of configs/cpt/llama31_swallow_8b.py; finance replays one general
row in five, the control reads general rows alone, and every other number is the same. Answer: none yet, the run needs
accelerators.
"""

from ml_collections import ConfigDict

from configs.cpt import llama31_swallow_8b

TEXTS = {"finance": (("finance", 4), ("general", 1)), "general": (("general", 1),)}


def get_config(argument: str = "h100x8,finance", runs: str = "runs/insurance_8b") -> ConfigDict:
    mesh, text = argument.split(",")
    if text not in TEXTS:
        raise ValueError(f"insurance_8b.py:{argument}: unknown text {text!r}; known: {', '.join(TEXTS)}")
    c = llama31_swallow_8b.get_config(mesh)
    c.data.mixture = tuple((f"{runs}/{folder}/train", weight) for folder, weight in TEXTS[text])
    # Both are judged, and their best checkpoints chosen, on text of their own kind.
    c.data.heldout = f"{runs}/{text}/heldout"
    return c
