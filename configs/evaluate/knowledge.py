"""Question: what did continued pre-training add, and what did it cost? Before and after on questions and held-out slices.

    python -m experiments.evaluate --config=configs/evaluate/knowledge.py:BEFORE,AFTER --workdir=runs/evaluate/knowledge

BEFORE and AFTER are HF folders or runs. The margins stand here, before any run: general Japanese, English and code may lose 0.02
bits a byte (about 2 % of a good model's), the finance slices and questions nothing that counts. The verdict on each is printed.
"""

from ml_collections import ConfigDict

from configs.evaluate import tiny

FOLDER = "configs/evaluate"
GENERAL = ("general_ja", "english", "code")
FINANCE = ("banking_ja", "insurance_ja", "securities_ja")
SLICES = tuple(f"{FOLDER}/slices/{name}.jsonl" for name in (*GENERAL, *FINANCE))


def questions() -> ConfigDict:
    """Letters behind the four choices, as plain text that a base model goes on with."""
    return ConfigDict(
        {
            "files": (f"{FOLDER}/questions/finance_ja.jsonl",),
            "prompt": "次の問題に、A、B、C、Dのうち一つで答えなさい。\n\n問題：{question}\n{choices}\n答え：",
            "choice": "{answer}. {text}",
            "answers": ("A", "B", "C", "D"),
            "chat": False,
            "normalise": "sum",
        }
    )


def kept(before: str, after: str) -> tuple:
    bits = {"before": before, "after": after, "metric": "bits_per_byte"}
    return (
        *({**bits, "test_set": name, "margin": 0.02} for name in GENERAL),
        *({**bits, "test_set": name, "margin": 0.005} for name in FINANCE),
        {"before": before, "after": after, "metric": "choice_accuracy", "test_set": "finance_ja", "margin": 0.05},
    )


def get_config(folders: str = "configs/base,runs/demo/cpt") -> ConfigDict:
    before, after = folders.split(",")
    c = tiny.get_config()
    # Another tokenizer, say SentencePiece, would make other tokens; bits are counted by byte, so that all are compared alike.
    kind = {True: "run", False: "hf"}
    c.models = (
        {"name": "before", "kind": kind[before.startswith("runs/")], "seed": 0, "path": before},
        {"name": "after", "kind": kind[after.startswith("runs/")], "seed": 0, "path": after},
    )
    c.comparisons = ({"a": "after", "b": "before", "metric": "exact_category"},)
    c.questions = questions()
    c.slices = SLICES
    c.kept = kept("before", "after")
    return c
