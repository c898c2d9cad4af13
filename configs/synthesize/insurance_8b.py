"""Training conversations for the insurance task, written by Llama 3.1 Swallow 70B and read blind by a model of another family.

Question: how many of what a 70B teacher writes survives the checks, and does the second reader see the same labels?
Command:  python -m experiments.synthesize --config=configs/synthesize/insurance_8b.py:h100x8
Cost:     about 14,000 conversations of 1,000 tokens with their refills: five hours at 800 tokens a second.

The argument is a mesh. On GPUs the teacher stands behind vLLM on the same machine, started before this stage, ended after it:
  vllm serve models/Llama-3.1-Swallow-70B-Instruct-v0.3 --tensor-parallel-size=8 --max-model-len=8192 --served-model-name=teacher
On one TPU host it runs in this process with weights of 8 bits on one v5p chip (70 of its 95 GB).
"""

from ml_collections import ConfigDict

from configs.synthesize import own

TASK = "configs/tasks/insurance_sales_compliance"
TEACHER = "models/Llama-3.1-Swallow-70B-Instruct-v0.3"
READER = "models/Qwen3-Swallow-8B-SFT-v0.2"


def in_process(path: str, licence: str, **fields) -> dict:
    """A model on one device of this machine."""
    return {"kind": "jax", "path": path, "dtype": "bfloat16", "slots": 16, "max_length": 3072, "licence": licence, **fields}


def get_config(mesh: str = "h100x8") -> ConfigDict:
    c = own.get_config(f"{TASK},blind")
    teacher = c.teachers.teacher
    if mesh.startswith("v"):
        teacher.backend = ConfigDict(in_process(TEACHER, "llama3.1, gemma", int8=True))
    else:
        teacher.backend.update({"concurrency": 128, "licence": "llama3.1, gemma"})
    teacher.quotas.update({"train_pairs": 400, "dev_pairs": 20})  # of each of seven categories: 5,600 and 280 conversations
    teacher.asking.update({"twin": None})  # the task has no prompt for editing: twins are written side by side
    c.keep_pairs = True
    c.plan.seed = 20261122
    c.plan.personas = None  # FILE.parquet:COLUMN of Nemotron-Personas-Japan (CC BY 4.0) makes customers more varied
    c.budget.update({"rounds": 4, "requests": 40_000, "failures_in_a_row": 20})
    c.checks.update(
        {
            "min_turns": 8,
            "max_turns": 20,
            "min_chars": 300,
            "max_chars": 4000,
            "min_language_share": 0.95,
            "sentence_ends": "。？！?!…」",
            "personal_data": ("email", "card", "my_number", "phone", "postal_code", "account", "policy_number"),
            "max_twin_turns": 0,  # written side by side, twins differ in more than one turn
        }
    )
    c.sft.update({"prompts": ("classify_full",)})
    c.verifier.backend = ConfigDict(in_process(READER, "Apache-2.0"))
    c.verifier.update({"prompt": "classify_full"})
    return c
