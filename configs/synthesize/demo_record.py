"""Make the demo task's test set, dev set, bank split and recorded teacher from its utterance banks.

Run once, after the banks have changed; what it writes is committed in the task folder.
Command:  python -m experiments.synthesize --config=configs/synthesize/demo_record.py
Cost:     half a minute.
"""

from ml_collections import ConfigDict

from configs.synthesize import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.record = ConfigDict()
    config.record.sets = ("demo",)  # test and dev sets of the task that come from its banks; test_v1 is written by hand
    config.record.split = ConfigDict(
        {
            "test_pairs": 172,  # 344 conversations, the shape of the original's test set: 24 or 25 pairs a category
            "dev_pairs": 32,
            "test_neutral_share": 0.3,
            "ngram": 13,
            "near": 0.5,
            "seed": 20261122,
        }
    )
    config.teachers.recorded.quotas.train_pairs = 112  # demo.py takes the first 80; up to here it may take more
    config.record.test_shape = ConfigDict(
        {"min_turns": 6, "max_turns": 10, "min_chars": 150, "max_chars": 300, "max_distractors": 1, "excerpt_share": 0.0}
    )
    config.record.provenance = "banks/*.jsonl, assembled by synth/banks.py"
    return config
