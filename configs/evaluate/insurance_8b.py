"""Question: on test_v1, what do CPT and SFT add to Llama 3.1 Swallow 8B, and does an instruct model shown examples do as well?

    python -m experiments.evaluate --config=configs/evaluate/insurance_8b.py --workdir=runs/insurance_8b/evaluate

Six arms: base and instruct untouched (all definitions in the prompt; the instruct model shown eight examples), then SFT of the
base, of the instruct model, after finance CPT, and after as much general CPT. Three seeds of each SFT. The comparisons stand
here before any run: the first asks what CPT adds, the second whether it was the finance in it. With :untouched, the two
untouched arms alone on the dev set: minutes, so that a missing chat template or too little memory shows before the first long
stage.
"""

from ml_collections import ConfigDict

from configs.evaluate import knowledge, test_v1, tiny
from configs.sft import insurance_8b

SEEDS = (0, 1, 2)
SHOTS = "configs/evaluate/shots/insurance_sales_compliance.jsonl"
TRAINED = {"SFT": "sft", "instruct + SFT": "instruct_sft", "CPT + SFT": "cpt_sft", "general CPT + SFT": "control_sft"}


def get_config(part: str = "all", runs: str = "runs/insurance_8b") -> ConfigDict:
    if part not in ("all", "untouched"):
        raise ValueError(f"insurance_8b.py:{part}: write :untouched, or nothing")
    c = tiny.get_config()
    c.test_set = "v1"
    c.engine.update({"dtype": "bfloat16", "attention": "xla", "slots": 32, "max_length": 8192, "tokens_per_batch": 8192})
    c.asking.prompt = "classify_full"
    base, instruct = ({"kind": "hf", "seed": 0, "path": path} for path in (insurance_8b.BASE, insurance_8b.INSTRUCT))
    # Each example repeats the question: eight with all definitions would not fit.
    shown = {**c.asking, "prompt": "classify", "shots": SHOTS}
    untouched = ({"name": "base", **base}, {"name": "instruct, few-shot", **instruct, "asking": shown})
    if part == "untouched":
        c.test_set = "dev:v1"
        c.models = untouched
        c.comparisons = ({"a": "instruct, few-shot", "b": "base", "metric": "exact_category"},)
        return c
    c.training = (f"{runs}/synthesize/accepted.jsonl",)
    c.models = (
        {"name": "constant", "kind": "constant", "seed": 0, "metric": "exact_category"},
        {"name": "keywords", "kind": "keywords", "seed": 0},
        {"name": "n-grams", "kind": "ngrams", "seed": 0, "settings": tiny.ngram_settings()},
        *untouched,
        *(
            {"name": name, "kind": "run", "seed": seed, "path": f"{runs}/{folder}_{seed}"}
            for name, folder in TRAINED.items()
            for seed in SEEDS
        ),
    )
    pairs = (
        ("CPT + SFT", "SFT"),
        ("CPT + SFT", "general CPT + SFT"),
        ("CPT + SFT", "instruct + SFT"),
        ("SFT", "instruct, few-shot"),
        ("SFT", "base"),
        ("SFT", "n-grams"),
    )
    c.comparisons = tuple({"a": a, "b": b, "metric": "exact_category"} for a, b in pairs)
    c.operating = test_v1.operating()
    c.robustness = test_v1.robustness("ja")
    c.questions = knowledge.questions()
    c.slices = knowledge.SLICES
    c.kept = knowledge.kept("SFT", "CPT + SFT")
    return c
