"""Another industry by data only: conversations of clinic counsellors, from a recorded teacher, through the demo's verification.

Question: how many conversations survive the checks, and is any test conversation among them?
Command:  python -m experiments.synthesize --config=configs/synthesize/medical.py
Cost:     seconds. No live teacher: the demo shows one.
"""

from ml_collections import ConfigDict

from configs.synthesize import demo

TASK = "configs/tasks/medical_advertising_ja"


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.task = TASK
    del config.teachers.live
    config.teachers.recorded.backend.path = f"{TASK}/teacher_recorded.jsonl"
    config.plan.dev_scenarios = 3
    config.teachers.recorded.quotas.update({"train_pairs": 40, "dev_pairs": 3})  # of each category: 516 conversations
    return config
