"""Data for pre-training the demo's base model: Japanese manuals of free software, read where Debian's packages put them.

    for p in debian-reference-ja debian-faq-ja debian-policy-ja developers-reference-ja maint-guide-ja aptitude-doc-ja \
             debian-edu-doc-ja gimp-help-ja gnucash-docs libreoffice-help-ja manpages-ja; do
      apt-get download $p && dpkg -x $p*.deb TREE
    done
    python -m experiments.prepare --config=configs/prepare/demo_base.py --config.corpus.root=TREE

Cost: minutes on two cores. Trains the tokenizer too; it also sees the project's own texts on finance and sales talks, as
far as they are there, so that their words are short in tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.corpus = ConfigDict(
        {
            "domains": ("configs/domains/demo_general_ja",),
            "root": "/",
            "unique_paragraphs": True,
            "near_bands": 40,  # 40 x 20: found with probability 0.994 at Jaccard 0.9, under 1e-4 at 0.5
            "near_rows": 20,
            "mask": (),  # maintainers' addresses in free manuals are published on purpose
            "corrections": None,
            "task_mb": 16.0,
            "max_document_mb": 64.0,
        }
    )
    c.dialogues = None
    c.contamination = None  # manuals of software; the demo's own documents are checked in demo_cpt.py
    c.tokenizer = None
    c.train_tokenizer = ConfigDict(
        {
            "vocab_size": 4096,
            "texts": (
                "configs/domains/demo_finance_ja/*.jsonl",
                "configs/domains/demo_talks_ja/*.jsonl",
                "configs/tasks/insurance_sales_compliance/banks/neutral.jsonl",
            ),
            "repeat": 8,  # the manuals are far longer
        }
    )
    c.mix = None
    c.engine = ConfigDict({"kind": "here", "workers": 1, "address": "", "slurm": {}})
    c.pack = ConfigDict({"row_length": 512, "rows_per_shard": 65536, "heldout_share": 0.02})
    return c
