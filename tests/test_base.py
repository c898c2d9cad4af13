"""The committed base: its size, its tokenizer and its hash are what its README says."""

import re
from pathlib import Path

from swallow_jax import hf, llama, text

BASE = Path(__file__).parent.parent / "configs" / "base"


def test_the_base_is_the_one_of_its_readme_and_within_its_limits():
    params, config = hf.load(BASE)
    readme = (BASE / "README.md").read_text(encoding="utf-8")
    assert hf.params_sha256(params, config) in readme
    total, _ = llama.parameter_count(config)
    beside = total - config.vocab_size * config.hidden_size
    assert beside <= 1_500_000 and f"{beside:,}" in readme
    assert config.vocab_size <= 4096 and text.load_tokenizer(BASE).vocab_size == config.vocab_size
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 10_000_000
    assert re.search(r"gnucash-docs \| [1-9]", readme), "the list of texts is part of the recipe"
