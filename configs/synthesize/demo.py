"""Training conversations for the demo: a recorded teacher, and our own engine live, through the same verification.

Question: how many of each teacher's conversations survive the checks, and is any test conversation among them?
Command:  python -m experiments.synthesize --config=configs/synthesize/demo.py
Cost:     well under a minute on two cores, most of it the live engine.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "configs/tasks/insurance_sales_compliance"
    config.record = None  # see demo_record.py
    config.keep_pairs = True  # a conversation whose twin falls, falls too

    config.plan = ConfigDict()
    config.plan.seed = 20261122
    config.plan.dev_scenarios = 4  # of each category, for the held-out loss of SFT
    config.plan.personas = None

    # One round: a recorded teacher has no second answer.
    config.budget = ConfigDict({"rounds": 1, "requests": 10_000, "failures_in_a_row": 10})

    config.teachers = ConfigDict()
    # Written for this project (banks/), assembled and recorded by demo_record.py.
    config.teachers.recorded = ConfigDict(
        {
            "backend": {
                "kind": "recorded",
                "path": "configs/tasks/insurance_sales_compliance/teacher_recorded.jsonl",
                "missing": "raise",
            },
            "scenarios": "banks",
            "quotas": {"train_pairs": 80, "dev_pairs": 4},  # of each category: 1,176 conversations
            "asking": {
                "prompt": "teacher",
                "max_new_tokens": 2048,
                "temperature": 0.8,
                "top_k": 0,
                "top_p": 0.95,
                "stop": (),
                "twin": None,
                "evidence": None,
            },
        }
    )
    # A toy model cannot write a conversation to order. It continues one whose decisive exchange is given, so that the label
    # holds by construction; most of what it writes falls at the checks, and the report says how much.
    config.teachers.live = ConfigDict(
        {
            "backend": {
                "kind": "jax",
                "path": "configs/base",
                "name": "demo_base",
                "dtype": "float32",
                "attention": "rows",
                "slots": 8,
                "max_length": 1024,
                "chunk": 16,
                "tokens_per_batch": 8192,
                "licence": "Apache-2.0",
            },
            "scenarios": "openings",
            "leave": 4,  # turns for the model to write
            "quotas": {"train_pairs": 4, "dev_pairs": 0},  # 56 conversations
            "asking": {
                "prompt": "teacher_lines",
                "max_new_tokens": 160,
                "temperature": 0.7,
                "top_k": 40,
                "top_p": 0.9,
                "stop": ("\n\n",),
                "twin": None,
                "evidence": None,
            },
        }
    )

    # What an assembled conversation looks like; at most 290 tokens with its prompt. Half of the training conversations are
    # excerpts around the decisive exchange: a toy model that only ever saw it among ten other turns did not find it
    # (held-out loss 0.40 after three epochs, 0.42 is the loss of the label frequencies). Test conversations are whole.
    config.shape = ConfigDict(
        {"min_turns": 3, "max_turns": 10, "min_chars": 60, "max_chars": 300, "max_distractors": 1, "excerpt_share": 0.5}
    )

    config.checks = ConfigDict(
        {
            "min_turns": 3,
            "max_turns": 10,
            "min_chars": 60,
            "max_chars": 320,
            "min_language_share": 0.95,
            "sentence_ends": "。？！?!…」",
            "min_distinct_share": 0.6,
            "ngram": 13,  # characters, after normalising: GPT-3's rule, and the one of facts/data.md 3.5
            "near_test": 0.5,
            "near_duplicate": 0.8,
            "test_turns": "all",  # stricter than 'carriers': not even a neutral turn of the test occurs in training
            "personal_data": ("email", "card", "my_number", "phone", "postal_code", "account", "policy_number"),
            "max_twin_turns": 0,  # the live engine goes on as it likes; the banks' twins differ in the decisive turn alone
        }
    )

    config.probes = ConfigDict({"max_length_accuracy": 0.55, "max_ngram_auc": 0.60, "pairs": 500})
    # The short prompt; real models take classify_full.
    config.sft = ConfigDict(
        {"prompts": ("classify",), "target": None, "rationale_share": 0.0, "replay": None, "replay_share": 0.0, "seed": 0}
    )
    config.verifier = None  # an independent model (see own.py); absent here, so the report says "not run"
    return config
