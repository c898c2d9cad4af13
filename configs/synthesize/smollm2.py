"""Training conversations for the English conduct task, from a recorded teacher, held against its hand-written test and dev sets.

Question: how many conversations survive the checks, and does any test conversation come back in other words?
Command:  python -m experiments.synthesize --config=configs/synthesize/smollm2.py
Cost:     seconds. No live teacher: the demo shows one.
"""

from ml_collections import ConfigDict

from configs.synthesize import demo

TASK = "configs/tasks/insurance_conduct_en"


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.task = TASK
    del config.teachers.live
    config.teachers.recorded.backend.path = f"{TASK}/teacher_recorded.jsonl"
    config.plan.dev_scenarios = 4
    config.teachers.recorded.quotas.update({"train_pairs": 56, "dev_pairs": 4})  # every bank item about once: 720 conversations
    # Letters, not words: an English talk is three to four times as long as a Japanese one. Half are the exchange alone.
    config.shape.update({"min_turns": 3, "max_turns": 10, "min_chars": 100, "max_chars": 900})
    config.checks.update(
        {
            "min_chars": 100,
            "max_chars": 900,
            "sentence_ends": "",  # customers who type end a line without a stop
            "ngram": 32,  # letters and digits: seven or eight words; 13 letters, as in Japanese, are two words
            "personal_data": ("email", "card", "us_phone", "us_ssn"),
        }
    )
    return config
