"""Training data for a task of your own, written by a model behind an OpenAI-compatible endpoint (vLLM, a hosted API).

Question: how many of what the teacher writes survives the checks, and does an independent model read the same labels?
Command:  python -m experiments.synthesize --config=configs/synthesize/own.py:MY_TASK --workdir=runs/my_task \\
            --config.teachers.teacher.backend.base_url=http://127.0.0.1:8000/v1 --config.teachers.teacher.backend.model=NAME
          own.py:MY_TASK,blind has every conversation labelled by a second model (--config.verifier.backend.model=OTHER).
Cost:     the endpoint's time: two requests a pair, and those of the refills; everything else takes about a millisecond a row.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.synthesize import demo


def endpoint(cache: str | None = None) -> dict:
    return {
        "kind": "endpoint",
        "base_url": "http://127.0.0.1:8000/v1",
        "model": "teacher",
        "api_key_env": placeholder(str),  # the name of an environment variable; the key itself stands nowhere
        "concurrency": 16,
        "attempts": 5,
        "backoff_s": 1.0,
        "timeout_s": 300.0,
        "cache": cache,
        "revision": placeholder(str),
        "licence": placeholder(str),  # travels into the manifest of everything trained on this
    }


def get_config(argument: str = "configs/tasks/_template") -> ConfigDict:
    task, _, blind = argument.partition(",")
    if blind not in ("", "blind"):
        raise ValueError(f"own.py:{argument}: write own.py:TASK or own.py:TASK,blind")
    config = demo.get_config()
    config.task = task
    config.shape = None
    config.plan.seed = 0
    config.budget.update({"rounds": 4, "requests": 100_000, "failures_in_a_row": 20})
    config.teachers = ConfigDict()
    config.teachers.teacher = ConfigDict(
        {
            "backend": endpoint(),
            "scenarios": "own",
            "quotas": {"train_pairs": 100, "dev_pairs": 10},  # of each category
            "asking": {
                "prompt": "teacher",
                "twin": "twin",  # the compliant twin by editing; None writes each for itself
                "evidence": None,
                "max_new_tokens": 2048,
                "temperature": 0.9,
                "top_k": 0,
                "top_p": 0.95,
                "stop": (),
            },
        }
    )
    config.checks.update(
        {
            "min_turns": 4,
            "max_turns": 24,
            "min_chars": 200,
            "max_chars": 4000,
            "min_language_share": 0.9,
            "sentence_ends": "",
            "max_twin_turns": 3,
            "personal_data": ("email", "card", "us_phone", "us_ssn"),
        }
    )
    if blind:
        config.verifier = ConfigDict(
            {
                "backend": endpoint() | {"model": "verifier"},
                "mode": "generate",
                "prompt": "classify",
                "votes": 1,
                "temperature": 0.0,
                "max_new_tokens": 64,
                "agree": True,
            }
        )
    return config
