"""The demo's finance documents to token shards, with the base model's tokenizer and nothing of the test set in them.

    python -m experiments.prepare --config=configs/prepare/demo_cpt.py

Cost: seconds. General text is replayed from the base's own shards where they are at hand; see configs/cpt.
"""

from ml_collections import ConfigDict

from configs.prepare import demo_base, tiny


def get_config() -> ConfigDict:
    c = demo_base.get_config()
    c.corpus.domains = ("configs/domains/demo_finance_ja",)
    c.corpus.mask = tiny.get_config().corpus.mask
    c.contamination = ConfigDict(
        {
            "test_sets": ("configs/tasks/*",),  # every task's test and development sets
            "protect": "turns",
            "ngram": 13,
            "jaccard": 0.5,
        }
    )
    c.tokenizer = "configs/base"
    c.train_tokenizer = None
    c.pack.heldout_share = 0.05
    return c
