"""Question: how much does the demo gain from more synthetic conversations? 10, 20, 40 and 80 pairs a category, three seeds.

    python -m experiments.sweep --config=configs/sweep/data_size.py --workdir=runs/sweeps/data_size

Every arm makes its own conversations, then trains two epochs on them: the curve says what data give at equal epochs, not at equal
steps. Twelve runs, about ten minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.sweep import axis, demo, product


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.shared = ()
    c.stages = (
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/demo.py"},
        {"name": "sft", "program": "sft", "config": "configs/sft/demo.py:base,0"},
    )
    return c


def sweep() -> dict[str, dict]:
    return product(
        axis("synthesize.teachers.recorded.quotas.train_pairs", (10, 20, 40, 80), name="pairs"),
        axis("sft.data.seed", (0, 1, 2), name="seed"),
    )
