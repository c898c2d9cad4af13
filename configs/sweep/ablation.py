"""Question: does CPT on the domain help, or would any more text have done? SFT after no CPT, finance CPT, and general CPT.

    python -m experiments.sweep --config=configs/sweep/ablation.py --workdir=runs/sweeps/ablation

The control reads as many tokens of everyday talk as the other arm reads of finance. Three seeds of SFT each, all pairs compared
on the demo's test. configs/pipeline/insurance_8b.py asks the same of real models, with an instruct model beside them. Nine runs,
about fifteen minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.sweep import axis, chain, demo, product


def get_config() -> ConfigDict:
    c = demo.get_config()
    mixture = (("{shared}/prepare/train", 4), ("{shared}/replay/train", 1))
    finance = {"data.mixture": mixture, "data.heldout": "{shared}/prepare/heldout"}
    general = {"data.mixture": (("{shared}/replay/train", 1),), "data.heldout": "{shared}/replay/heldout"}
    c.shared = (
        {"name": "prepare", "program": "prepare", "config": "configs/prepare/demo_cpt.py"},
        {"name": "replay", "program": "prepare", "config": "configs/prepare/demo_talks.py"},
        {"name": "cpt", "program": "cpt", "config": "configs/cpt/demo.py", "overrides": finance},
        {"name": "control", "program": "cpt", "config": "configs/cpt/demo.py", "overrides": general},
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/demo.py"},
    )
    sft = c.stages[0]
    c.stages = ({**sft, "overrides": {**sft["overrides"], "epochs": 2}},)
    return c


def sweep() -> dict[str, dict]:
    return product(
        chain(
            {"sft": {"sft.init": "configs/base"}},
            {"control_sft": {"sft.init": "{shared}/control"}},
            {"cpt_sft": {"sft.init": "{shared}/cpt"}},
        ),
        axis("sft.data.seed", (0, 1, 2), name="seed"),
    )
