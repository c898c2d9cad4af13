"""The corpora of configs/pipeline/insurance_8b.py: finance from public sources, or general text for replay and the control.

    python -m experiments.prepare --config=configs/prepare/insurance_8b.py:finance --workdir=runs/insurance_8b/finance
    python -m experiments.prepare --config=configs/prepare/insurance_8b.py:general --workdir=runs/insurance_8b/general

Reads what configs/domains/japanese_finance and japanese_general say, below data/finance and data/general. Rows as long as the
base can see. Cost: about a quarter of an hour a gigabyte on two cores; eight processes here.
"""

from ml_collections import ConfigDict

from configs.prepare import japanese_finance

DOMAINS = {"finance": "configs/domains/japanese_finance", "general": "configs/domains/japanese_general"}


def get_config(corpus: str = "finance") -> ConfigDict:
    if corpus not in DOMAINS:
        raise ValueError(f"insurance_8b.py:{corpus}: unknown corpus; known: {', '.join(DOMAINS)}")
    c = japanese_finance.get_config()
    c.corpus.domains = (DOMAINS[corpus],)
    c.corpus.root = f"data/{corpus}"
    c.tokenizer = "models/Llama-3.1-Swallow-8B-v0.2"
    c.pack.row_length = 8192
    c.engine.update({"kind": "local", "workers": 8})
    return c
