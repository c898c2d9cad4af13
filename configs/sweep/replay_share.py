"""Question: how much general text must be replayed in CPT, so that what the base knew is kept and the domain is still learnt?

    python -m experiments.sweep --config=configs/sweep/replay_share.py --workdir=runs/sweeps/replay_share

Shares of 0, 10, 20 and 50 % of the rows, equal steps. After the arms: finance questions and bits per byte of general and finance
slices against the base, with the margins of configs/evaluate/knowledge.py. Four runs, about five minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.sweep import chain

SHARES = {0: (1, 0), 10: (9, 1), 20: (4, 1), 50: (1, 1)}  # per cent -> integer weights of domain and replay


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.shared = (
        {"name": "prepare", "program": "prepare", "config": "configs/prepare/demo_cpt.py"},
        {"name": "replay", "program": "prepare", "config": "configs/prepare/demo_talks.py"},
    )
    c.stages = (
        {
            "name": "cpt",
            "program": "cpt",
            "config": "configs/cpt/demo.py",
            "overrides": {"data.heldout": "{shared}/prepare/heldout"},
        },
    )
    c.after = (
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/sweep_knowledge.py:dev:demo,cpt"},
        {"name": "report", "program": "report", "config": "configs/report/sweep.py:cpt"},
    )
    return c


def sweep() -> dict[str, dict]:
    folders = ("{shared}/prepare/train", "{shared}/replay/train")
    mixtures = {share: tuple((f, w) for f, w in zip(folders, weights, strict=True) if w) for share, weights in SHARES.items()}
    return chain(*({f"replay={share}": {"cpt.data.mixture": mixture}} for share, mixture in mixtures.items()))
