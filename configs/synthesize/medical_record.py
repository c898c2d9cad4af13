"""Make the medical task's test set, dev set, bank split and recorded teacher from its utterance banks.

Run once, after the banks have changed; what it writes is committed in the task folder.
Command:  python -m experiments.synthesize --config=configs/synthesize/medical_record.py
Cost:     seconds.
"""

from ml_collections import ConfigDict

from configs.synthesize import demo_record, medical


def get_config() -> ConfigDict:
    config = medical.get_config()
    config.record = demo_record.get_config().record
    config.record.split.update({"test_pairs": 30, "dev_pairs": 10})  # 60 and 20 conversations
    config.teachers.recorded.quotas.train_pairs = 45  # medical.py takes the first 40
    return config
