"""Question: what came out of the demo? Tables, examples, curves and costs on one page.

python -m experiments.report --config=configs/report/demo.py --workdir=runs/demo/report
"""

from ml_collections import ConfigDict

from configs.report import tiny

SEEDS = (0, 1, 2)

# NRI's press release of 2025-04-15: 344 private conversations, 172 with a violation of one of seven categories. The counts are
# what the published percentages mean at n = 344.
PUBLISHED = ConfigDict(
    {
        "source": "NRI, press release of 2025-04-15, https://www.nri.com/en/news/newsrelease/20250415_1.html",
        "note": "Published figures for real models on a private test set of the same shape. Quoted for orientation: other "
        "conversations, other categories perhaps, other models; nothing on this page is paired with them.",
        "rows": (
            {"model": "Llama 3.1 Swallow 8B Instruct v0.2", "correct": 178, "n": 344},
            {"model": "GPT-4o (2024-11-20)", "correct": 264, "n": 344},
            {"model": "8B + SFT", "correct": 286, "n": 344},
            {"model": "8B + CPT + SFT", "correct": 297, "n": 344},
        ),
    }
)

LIMITS = (
    "A model of 1.2 million parameters learns the surface of this task: which phrases go with which label. It "
    "does not reason about a contract, so its accuracy says nothing about what an 8B model would reach.",
    "Training and test conversations were written by the same project. Shared style makes the test easier than real calls, which "
    "have noise, interruptions and topics nobody planned.",
    "Where character n-grams do as well as the language model, the test at this size rewards wording; the gain of continued "
    "pre-training shows in larger models and larger corpora, or it does not show at all.",
    "The categories follow public sources, not the categories of the published result, and no lawyer has reviewed them. The "
    "output is no basis for a decision about a person.",
)


def get_config(runs: str = "runs/demo") -> ConfigDict:
    c = tiny.get_config()
    c.title = "From a base model to a checked specialist: the demo"
    c.introduction = (
        "Base, continued pre-training (CPT), synthetic conversations, supervised fine-tuning (SFT), evaluation: the whole "
        "method at toy size, on two CPU cores. Every figure is made from the folders named below it."
    )
    c.evaluations = (f"{runs}/evaluate",)
    c.example_model = "base + CPT + SFT"
    c.training = (
        {"name": "CPT", "folder": f"{runs}/cpt"},
        {"name": "SFT on the base, seed 0", "folder": f"{runs}/sft_0"},
        {"name": "SFT after CPT, seed 0", "folder": f"{runs}/cpt_sft_0"},
    )
    c.data = (
        {"name": "finance corpus", "folder": f"{runs}/prepare"},
        {"name": "everyday talks (replay)", "folder": f"{runs}/replay"},
        {"name": "synthetic conversations", "folder": f"{runs}/synthesize"},
    )
    c.stages = (
        {"name": "prepare", "folder": f"{runs}/prepare"},
        {"name": "CPT", "folder": f"{runs}/cpt"},
        {"name": "synthesize", "folder": f"{runs}/synthesize"},
        *({"name": f"SFT, seed {s}", "folder": f"{runs}/sft_{s}"} for s in SEEDS),
        *({"name": f"SFT after CPT, seed {s}", "folder": f"{runs}/cpt_sft_{s}"} for s in SEEDS),
        {"name": "evaluate", "folder": f"{runs}/evaluate"},
    )
    c.quotation = PUBLISHED
    c.limits = LIMITS
    c.own_data = (
        "python -m experiments.evaluate --config=configs/evaluate/demo.py --config.task=MY_TASK_FOLDER "
        "--config.test_set=MY_SET --workdir=runs/mine\n"
        "  (MY_TASK_FOLDER: a copy of configs/tasks/insurance_sales_compliance whose task.yaml names your JSONL as a test set)"
    )
    return c
