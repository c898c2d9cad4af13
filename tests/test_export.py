"""Exports: streamed from runs, model arithmetic, manifest and card, and what both generations of transformers read."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import checkpoint, hf, run, weights
from tests.helpers import LLAMA31, QWEN3, random_params
from tools import card, export

BASE = Path(__file__).parent.parent / "configs" / "base"
SCORES = {"scores": [{"model": "a|b", "metric": "exact", "test_set": "demo", "n": 344, "value": 0.5, "ci95": [0.45, 0.55]}]}


def save(folder, params, config=LLAMA31, dtype="bfloat16", licence="apache-2.0"):
    hf.save(folder, params, config, dtype=dtype)
    (folder / "manifest.json").unlink()  # as it comes from a hub: the card states the licence
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    return folder


def write_run(folder, params, config=LLAMA31, *, base="models/base", steps=((1, 2.0), (2, 1.0), (3, 1.5))):
    """A run folder as experiments.cpt leaves it, with a checkpoint a step; the parameters are `params` times the step."""
    saving = checkpoint.CheckpointConfig(save_every=1, keep_last=9, keep_best=0)
    checkpoints = checkpoint.Checkpoints(folder, saving)
    for step, loss in steps:
        state = {"params": jax.tree.map(lambda x, step=step: x * step, params), "step": jnp.int32(step)}
        checkpoints.save(step, state, {"step": step, "data": {}}, loss)
    checkpoints.close()
    run.write_json(folder / "model" / "config.json", hf.config_json(config, "float32"))
    run.write_json(folder / "config.json", {"init": base, "data": {"batch_size": 8}, "optim": {"learning_rate": 1e-5}})
    inherited = {
        "licences": ["llama3.1", "gemma"],
        "attributions": [{"source": "laws", "licence": "PDL-1.0", "attribution": "Digital Agency"}, "a bare line"],
        "teachers": {"big": {"kind": "endpoint", "model": "teacher-70b", "licence": "gemma", "sha256": None}},
    }
    result = {"steps": 3, "tokens": 4096, "heldout_loss": 1.0}
    inputs = {"shards:fin": {"path": "shards/index.json", "sha256": "ab" * 32}}
    run.write_json(
        folder / "manifest.json", {"inputs": inputs, "parents": {}, "git_commit": "0" * 40, "result": result, **inherited}
    )
    return folder


@pytest.mark.parametrize("config", [LLAMA31, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("block", [1 << 10, 1 << 24])
def test_a_run_streams_out_as_its_checkpoint_opens(config, block, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)
    write_run(tmp_path / "run", random_params(config), config)
    for which, dtype in (("best", "bfloat16"), ("last", "float32")):
        out = tmp_path / which
        result = export.export(str(tmp_path / "run"), str(out), dtype=dtype, which=which, max_shard_bytes=100_000)
        params = jax.tree.map(lambda x, step={"best": 2, "last": 3}[which]: x * step, random_params(config))
        jax.tree.map(np.testing.assert_array_equal, checkpoint.open_model(tmp_path / "run", which=which)[0], params)
        wanted = hf.params_sha256(jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params), config)
        assert result["params_sha256"] == wanted == hf.params_sha256(*hf.load(out))
        assert result["params_sha256"] == json.loads((out / "manifest.json").read_text())["params_sha256"]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
        assert len(sizes) > 2 and index["metadata"]["total_size"] == sum(t.nbytes for t in hf.open_tensors(out).values())
    assert result["bytes"] == sum(sizes)


def test_chunks_of_many_layers_and_of_one_are_read_alike(tmp_path, monkeypatch):
    """Orbax keeps small arrays in one chunk; with `save_args` large ones are cut, also along columns."""
    import orbax.checkpoint as ocp

    params = random_params(LLAMA31)
    arrays = {}
    for name, block in (("whole", 1 << 24), ("cut", 1 << 12)):
        monkeypatch.setattr(weights, "BLOCK_BYTES", block)
        with ocp.StandardCheckpointer() as saver:
            path = (tmp_path / name / "state").resolve()
            saver.save(path, {"params": params}, save_args={"params": weights.save_args(params)})
        arrays[name] = weights.open_checkpoint(tmp_path / name, [("layers", "down")])["layers", "down"]
    assert arrays["whole"].chunk_layout.read_chunk.shape == (3, 64, 112)
    assert arrays["cut"].chunk_layout.read_chunk.shape == (1, 32, 28)  # 1 << 12 bytes at most
    for name in arrays:
        tensors = hf.open_run_weights(tmp_path / name, LLAMA31)
        assert weights.sha256(tensors) == hf.params_sha256(params, LLAMA31)


def test_adding_a_difference(tmp_path):
    base, tuned = random_params(LLAMA31, 0), random_params(LLAMA31, 1)
    folders = {"base": save(tmp_path / "base", base), "tuned": save(tmp_path / "tuned", tuned, licence="llama3.1")}
    paths = {name: str(path) for name, path in folders.items()}
    write_run(tmp_path / "run", base)

    def made(name, source, scale, dtype="bfloat16"):
        add = (paths["tuned"], paths["base"], scale)
        export.export(source, str(tmp_path / name), dtype=dtype, which="last", add=add)
        return {n: np.array(t()) for n, t in hf.open_tensors(tmp_path / name).items()}

    theirs = {n: np.array(t()) for n, t in hf.open_tensors(folders["tuned"]).items()}
    ours = {n: np.array(t()) for n, t in hf.open_tensors(folders["base"]).items()}
    for name, value in made("all", paths["base"], 1.0).items():  # base + (tuned - base)
        assert np.array_equal(value, theirs[name])
    for name, value in made("none", paths["base"], 0.0).items():
        assert np.array_equal(value, ours[name])
    for name, value in made("some", str(tmp_path / "run"), 0.25, "float32").items():  # a run, 3 x base after its last step
        run_value = np.asarray(hf.tensors_of(base)[name]()) * np.float32(3)
        wanted = run_value + np.float32(0.25) * (theirs[name].astype(np.float32) - ours[name].astype(np.float32))
        assert np.array_equal(value, wanted)
    manifest = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert manifest["licences"] == ["apache-2.0", "gemma", "llama3.1"]
    assert manifest["method"][-1] == {
        "kind": "model arithmetic", "added": paths["tuned"], "subtracted": paths["base"], "scale": 0.25,
    }  # fmt: skip
    other = save(tmp_path / "other", random_params(QWEN3), QWEN3)
    with pytest.raises(ValueError, match=r"other .*only models of one architecture can be added"):
        export.export(paths["base"], str(tmp_path / "x"), dtype="float32", which="last", add=(str(other), paths["base"], 1.0))


def test_licences_attributions_and_teachers_travel_into_the_next_run(tmp_path):
    save(tmp_path / "models" / "base", random_params(LLAMA31))
    write_run(tmp_path / "run", random_params(LLAMA31), base=str(tmp_path / "models" / "base"))
    result = export.export(str(tmp_path / "run"), str(tmp_path / "Fin-8B"), dtype="bfloat16", which="best")
    assert result["licences"] == ["gemma", "llama3.1"]
    assert result["warnings"] == [
        "the name 'Fin-8B' does not begin with \"Llama\", as llama3.1 asks of models made from Llama or its outputs"
    ]
    child = run.open_run(tmp_path / "child", {}, inputs={}, parents=[tmp_path / "Fin-8B"]).manifest
    assert child["licences"] == ["gemma", "llama3.1"] and child["teachers"]["big"]["model"] == "teacher-70b"
    row = {"source": "laws", "licence": "PDL-1.0", "attribution": "Digital Agency"}
    assert child["attributions"] == [row, "a bare line"]
    again = export.export(str(tmp_path / "Fin-8B"), str(tmp_path / "Llama-Fin"), dtype="bfloat16", which="best")
    assert again["warnings"] == [] and again["licences"] == ["gemma", "llama3.1"]
    manifest = json.loads((tmp_path / "Llama-Fin" / "manifest.json").read_text())
    assert manifest["base"] == "base" and [step["kind"] for step in manifest["method"]] == ["continued pre-training"]


def test_the_card_names_base_data_teacher_method_scores_and_terms(tmp_path):
    save(tmp_path / "models" / "base", random_params(LLAMA31))
    write_run(tmp_path / "run", random_params(LLAMA31), base=str(tmp_path / "models" / "base"))
    run.write_json(tmp_path / "scores.json", SCORES)
    export.export(str(tmp_path / "run"), str(tmp_path / "fin"), dtype="bfloat16", which="best", scores=str(tmp_path))
    text = (tmp_path / "fin" / "README.md").read_text(encoding="utf-8")
    for line in (
        'license: other\nlicense_name: "gemma, llama3.1"\nbase_model: "base"',
        "# fin",
        "> **Warning:** the name 'fin' does not begin with \"Llama\"",
        "Built with Llama",
        "| base | base |",
        "1. **continued pre-training**:",
        "learning rate 1e-05",
        "- fin (`sha256 abababababababab`)",
        "| teacher-70b | endpoint | gemma |",
        "| laws | PDL-1.0 | Digital Agency |",
        "|  |  | a bare line |",
        "| a\\|b | demo | exact | 344 | 0.5 | 0.450 to 0.550 |",
        "Llama 3.1 is licensed under the Llama 3.1 Community License",
        "ai.google.dev/gemma/terms",
    ):
        assert line in text, line
    assert run.card_licences(tmp_path / "fin") == ["gemma, llama3.1"]


@pytest.mark.parametrize(
    ("name", "licences", "warned"),
    [
        ("Llama-3.1-Fin-8B", ["llama3.1"], 0),
        ("Fin-Llama-8B", ["llama3.1"], 1),
        ("llama-fin", ["Llama 3.3 Community License"], 1),
        ("Llama-Fin", ["llama3"], 1),  # the first of them asks for "Llama 3"
        ("Llama-3-Fin", ["llama3"], 0),
        ("fin", ["llama2", "gemma", "apache-2.0"], 0),
        ("fin", ["llama3.1", "llama3.3"], 2),
    ],
)
def test_names_against_the_llama_licence_are_warned_of(name, licences, warned):
    assert len(card.naming_warnings(name, licences)) == warned


def test_a_licence_that_nobody_states_is_recorded_as_such(tmp_path):
    hf.save(tmp_path / "a", random_params(LLAMA31), LLAMA31, dtype="float32")
    (tmp_path / "a" / "manifest.json").unlink()
    assert run.inherited([tmp_path / "a"])["licences"] == ["not stated"]
    for head, wanted in (("license: [mit, gemma]", ["gemma", "mit"]), ("license: other\nlicense_name: x", ["x"]), ("a: [", None)):
        (tmp_path / "a" / "README.md").write_text(f"---\n{head}\n---\n")
        assert run.inherited([tmp_path / "a"])["licences"] == (wanted or ["not stated"])


def test_files_of_transformers_5_come_out_readable_for_4(tmp_path):
    params = random_params(LLAMA31)
    source = save(tmp_path / "a", params)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "auto_map": {"AutoModel": "x.Y"}}))
    (source / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    tokenizer = json.loads((BASE / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|eot_id|>"],
        "auto_map": {"AutoTokenizer": []},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    export.export(str(source), str(tmp_path / "b"), dtype="float16", which="best")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16" and "auto_map" not in config
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= config.keys()
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|eot_id|>"] and not {"extra_special_tokens", "auto_map"} & written.keys()
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"]


def test_what_a_killed_export_left_goes_and_a_full_disk_is_told_before(tmp_path, monkeypatch):
    source = save(tmp_path / "a", random_params(LLAMA31))
    left = tmp_path / ".b.999999999.tmp"  # no process has this number
    left.mkdir()
    export.export(str(source), str(tmp_path / "b"), dtype="bfloat16", which="best")
    assert not left.exists()
    with pytest.raises(FileExistsError, match="b exists; choose another place"):
        export.export(str(source), str(tmp_path / "b"), dtype="bfloat16", which="best")
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"c needs 0.0 GB, 0.0 GB are free there; make room"):
        export.export(str(source), str(tmp_path / "c"), dtype="bfloat16", which="best")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
