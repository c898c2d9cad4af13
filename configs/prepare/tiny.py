"""Does the text path work? Forty paragraphs to packed shards, with their own tokenizer, in seconds.

    python -m experiments.prepare --config=configs/prepare/tiny.py

`--config=configs/prepare/tiny.py:dialogues` does the same for eight chat samples.
"""

from ml_collections import ConfigDict


def get_config(mode: str = "documents") -> ConfigDict:
    if mode not in ("documents", "dialogues"):
        raise ValueError(f"tiny.py:{mode} is unknown; use documents or dialogues")
    c = ConfigDict()
    c.seed = 0
    c.corpus = ConfigDict(
        {
            "domains": ("configs/prepare/tiny_data",),
            "root": "/",
            "unique_paragraphs": True,
            "near_bands": 40,
            "near_rows": 20,
            "mask": ("email", "card", "my_number", "policy_number", "phone", "postal_code", "account"),
            "corrections": None,  # decisions of experts, see tools.review
            "task_mb": 16.0,
            "max_document_mb": 64.0,
        }
    )
    c.dialogues = None
    c.contamination = None
    c.tokenizer = None
    c.train_tokenizer = ConfigDict({"vocab_size": 512, "texts": ("configs/prepare/tiny_data/*.jsonl",), "repeat": 1})
    c.mix = None
    c.engine = ConfigDict({"kind": "here", "workers": 1, "address": "", "slurm": {}})
    c.pack = ConfigDict({"row_length": 64, "rows_per_shard": 64, "heldout_share": 0.1})
    if mode == "dialogues":
        c.corpus = None
        c.dialogues = ConfigDict({"files": ("configs/prepare/tiny_data/chats.jsonl",), "train_on": "last", "too_long": "error"})
        c.pack.row_length = 128
    return c
