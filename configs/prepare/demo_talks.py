"""Everyday talks to token shards: part of the demo base's diet, and the replay of its continued pre-training.

    python -m experiments.prepare --config=configs/prepare/demo_talks.py

Cost: seconds.
"""

from ml_collections import ConfigDict

from configs.prepare import demo_cpt


def get_config() -> ConfigDict:
    c = demo_cpt.get_config()
    c.corpus.domains = ("configs/domains/demo_talks_ja",)
    return c
