"""Question: which step of the method earns its place? Every arm of the ablation, on the demo's test set or on test_v1.

    python -m experiments.evaluate --config=configs/evaluate/ablation.py:SET --workdir=runs/demo/ablation_SET

SET is `demo` or `v1`. The comparisons are declared here, before any run. The first asks whether CPT means finance or only more
steps: its control saw as many tokens of general text. The report shows the noise of seeds and that of items apart.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo, test_v1, tiny

SEEDS = demo.SEEDS
ARMS = {"SFT": "sft", "instruct + SFT": "instruct_sft", "control + SFT": "control_sft", "CPT + SFT": "cpt_sft"}


def get_config(test_set: str = "demo", runs: str = "runs/demo") -> ConfigDict:
    c = tiny.get_config()
    c.test_set = test_set
    c.training = (f"{runs}/synthesize/accepted.jsonl",)
    # Eight examples leave no room for the longest talks in a context of 1,024 tokens; those are read in two windows.
    window = {"limit": 1000, "unit": "tokens", "overlap_turns": 2}
    shown = {**c.asking, "shots": "configs/evaluate/shots/insurance_sales_compliance.jsonl", "window": window}
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "base", "kind": "hf", "seed": 0, "path": demo.BASE},
        {"name": "instruct, few-shot", "kind": "run", "seed": 0, "path": f"{runs}/instruct", "asking": shown},
        *(
            {"name": name, "kind": "run", "seed": seed, "path": f"{runs}/{folder}_{seed}"}
            for name, folder in ARMS.items()
            for seed in SEEDS
        ),
    )
    c.comparisons = tuple(
        {"a": a, "b": b, "metric": "exact_category"}
        for a, b in (
            ("CPT + SFT", "control + SFT"),
            ("CPT + SFT", "SFT"),
            ("control + SFT", "SFT"),
            ("SFT", "base"),
            ("SFT", "constant"),
            ("instruct + SFT", "instruct, few-shot"),
            ("instruct + SFT", "SFT"),
        )
    )
    if test_set == "v1":
        c.operating = test_v1.operating()
    return c
