"""The medical documents to token shards: configs/prepare/demo_cpt.py with another domain.

    python -m experiments.prepare --config=configs/prepare/medical.py

Cost: seconds.
"""

from ml_collections import ConfigDict

from configs.prepare import demo_cpt


def get_config() -> ConfigDict:
    c = demo_cpt.get_config()
    c.corpus.domains = ("configs/domains/medical_advertising_ja",)
    return c
