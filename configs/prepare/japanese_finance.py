"""A Japanese finance corpus from public sources that you have fetched; see configs/domains/japanese_finance/domain.yaml.

    python -m experiments.prepare --config=configs/prepare/japanese_finance.py --config.corpus.root=/data/finance \
        --config.tokenizer=/models/Llama-3.1-Swallow-8B-v0.2 --config.engine.kind=local --config.engine.workers=8

Cost: about a quarter of an hour a gigabyte on two cores (tools.bench prepare measures yours). Needs the extra `data`.
"""

from ml_collections import ConfigDict

from configs.prepare import demo_cpt


def get_config() -> ConfigDict:
    c = demo_cpt.get_config()
    c.corpus.domains = ("configs/domains/japanese_finance",)
    c.corpus.task_mb = 64.0
    c.pack = ConfigDict({"row_length": 4096, "rows_per_shard": 16384, "heldout_share": 0.001})
    # Before training, the table of shares and epochs: c.mix = ConfigDict({"replay": ("runs/prepare/general/train",),
    #   "chat": (), "chat_share": 0.0, "train_rows": 100_000})
    return c
