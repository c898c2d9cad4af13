"""Documents instead of dialogues, English, several labels each: messages of a recorded teacher through the demo's verification.

Question: how many messages survive the checks, and is any test message among them?
Command:  python -m experiments.synthesize --config=configs/synthesize/complaint.py
Cost:     seconds. A live teacher: configs/synthesize/own.py:configs/tasks/complaint_triage_en
"""

from ml_collections import ConfigDict

from configs.synthesize import own

TASK = "configs/tasks/complaint_triage_en"


def get_config() -> ConfigDict:
    config = own.get_config(TASK)
    config.teachers = ConfigDict()
    # Written for this project, by hand; each answers one row of the plan (README.md of the task).
    config.teachers.recorded = ConfigDict(
        {
            "backend": {"kind": "recorded", "path": f"{TASK}/teacher_recorded.jsonl", "missing": "raise"},
            "scenarios": "own",
            "quotas": {"train_pairs": 6, "dev_pairs": 1},  # of each category: 84 messages, half of them enquiries
            "asking": {
                "prompt": "teacher",
                "twin": None,  # a message with one label less is another message
                "evidence": None,
                "max_new_tokens": 512,
                "temperature": 0.8,
                "top_k": 0,
                "top_p": 0.95,
                "stop": (),
            },
        }
    )
    config.keep_pairs = False
    config.budget.update({"rounds": 1, "requests": 1000, "failures_in_a_row": 10})  # a recorded teacher has no second answer
    config.checks.update(
        {
            "min_turns": 1,
            "max_turns": 1,
            "min_chars": 30,
            "max_chars": 700,
            "max_twin_turns": 0,
            # Letters without spaces: 13 are three English words ("I should like to know"), 30 are about seven.
            "ngram": 30,
        }
    )
    return config
