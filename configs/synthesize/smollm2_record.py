"""Make the English conduct task's bank split and recorded teacher from its banks; test and dev sets are written by hand.

Run once, after the banks have changed; what it writes is committed in the task folder.
Command:  python -m experiments.synthesize --config=configs/synthesize/smollm2_record.py
Cost:     seconds.
"""

from ml_collections import ConfigDict

from configs.synthesize import demo_record, smollm2


def get_config() -> ConfigDict:
    config = smollm2.get_config()
    config.record = demo_record.get_config().record
    config.record.sets = ()  # test_v1 and dev_v1 are not assembled from the banks, and must never be written over
    config.record.split.update({"test_pairs": 0, "dev_pairs": 0, "test_neutral_share": 0.0, "ngram": 32})
    return config
