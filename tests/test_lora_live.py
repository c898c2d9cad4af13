"""Adapters against peft: it loads what is written here, what it writes is read here, and both compute the same."""

import json

import jax
import numpy as np
import pytest

from experiments import door, sft
from swallow_jax import checkpoint, hf, lora
from tests.helpers import model_logits, write_checkpoint
from tests.test_lora import random_adapter
from tools import export

pytestmark = pytest.mark.live
TOLERANCE = 1e-5  # of the logits' standard deviation: float32, with the product in another order


def peft_logits(base, adapter, tokens):
    """Float32 logits of peft's model, and of the base with the adapter switched off."""
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        adapted = model(torch.tensor(tokens)).logits.numpy()
        with model.disable_adapter():
            return adapted, model(torch.tensor(tokens)).logits.numpy()


def close(ours, theirs):
    assert np.abs(ours - theirs).max() / theirs.std() < TOLERANCE, np.abs(ours - theirs).max() / theirs.std()


def test_a_run_exports_both_ways_and_peft_gives_the_merged_models_logits(tmp_path):
    config = door.load_config("configs/sft/lora_tiny.py")
    config.epochs = 6
    sft.main(config, tmp_path / "run")
    export.export(str(tmp_path / "run"), str(tmp_path / "merged"), dtype="float32", which="last")
    export.export_adapter(str(tmp_path / "run"), str(tmp_path / "adapter"), which="last")
    params, shape = hf.load(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (2, 64))
    theirs, base = peft_logits(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"],
                               tmp_path / "adapter", tokens)  # fmt: skip
    close(model_logits(params, shape, tokens), theirs)
    assert np.abs(base - theirs).max() / theirs.std() > 0.1


@pytest.mark.parametrize("kind", ["llama32_tied", "llama2", "qwen3"])
def test_every_target_of_every_family_goes_where_peft_puts_it(kind, tmp_path):
    config = write_checkpoint(tmp_path / "base", kind)
    settings = lora.LoraConfig(rank=4, alpha=6.0, targets=lora.TARGETS)
    adapter = random_adapter(config, settings)
    lora.save(tmp_path / "adapter", adapter, settings, base=str(tmp_path / "base"))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 32))
    theirs, base = peft_logits(tmp_path / "base", tmp_path / "adapter", tokens)
    params, _ = hf.load(tmp_path / "base", dtype=np.float32)
    close(model_logits(lora.attach(params, adapter, settings), config, tokens), theirs)
    close(model_logits(checkpoint.open_model(tmp_path / "adapter")[0], config, tokens), theirs)
    assert np.abs(base - theirs).max() / theirs.std() > 0.1


def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    import peft
    import torch
    import transformers

    config = write_checkpoint(tmp_path / "base", "llama31")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    wanted = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["k_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, wanted)
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 32))
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    _, settings = lora.load(tmp_path / "adapter", config)
    assert settings == lora.LoraConfig(rank=3, alpha=5.0, targets=("k", "o"))
    params, _ = checkpoint.open_model(tmp_path / "adapter")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    close(model_logits(params, config, tokens), theirs)
