"""A table's row can be followed to its documents, what has changed since is named, and a run can be made again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cpt, door, evaluate, prepare
from experiments import report as program
from swallow_jax import lineage, run
from tests.test_evaluate import config as evaluation_config
from tests.test_evaluate import mini_task

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Documents -> prepare -> cpt -> evaluate -> report, a few steps each: the folders once, copied for each test."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(ROOT / "configs" / "prepare" / "tiny_data", folder / "documents")
    c = door.load_config(str(ROOT / "configs" / "prepare" / "tiny.py"))
    with c.unlocked():
        c.corpus.domains = (str(folder / "documents"),)
        c.train_tokenizer.texts = (str(folder / "documents" / "*.jsonl"),)
    prepare.main(c, folder / "prepare")
    c = door.load_config(str(ROOT / "configs" / "cpt" / "tiny.py"))
    with c.unlocked():
        c.tokenizer, c.data.prepare = str(folder / "prepare" / "tokenizer"), ""
        c.data.mixture = ((str(folder / "prepare" / "train"), 1),)
        c.data.heldout = str(folder / "prepare" / "heldout")
        c.train.update({"steps": 2, "eval_every": 2})
        c.optim.update({"warmup_steps": 1, "decay_steps": 1})
        c.checkpoint.save_every = 2
    cpt.main(c, folder / "cpt")
    models = (
        {"name": "tiny", "kind": "run", "seed": 0, "path": str(folder / "cpt")},
        {"name": "keywords", "kind": "keywords", "seed": 0},
    )
    c = evaluation_config(mini_task(folder / "task"), models=models, comparisons=())
    evaluate.main(c, folder / "evaluate")
    c = door.load_config(str(ROOT / "configs" / "report" / "tiny.py"))
    with c.unlocked():
        c.evaluations = (str(folder / "evaluate"),)
        c.training = ({"name": "CPT", "folder": str(folder / "cpt")},)
    program.main(c, folder / "report")
    return folder


def names(node: lineage.Node) -> set[str]:
    return {Path(node.path).name}.union(*map(names, node.children))


def test_a_row_leads_through_every_run_to_the_documents(built, capsys):
    told = program.trace(f"{built / 'report'}#tiny")
    printed = capsys.readouterr().out
    first, *_ = printed.splitlines()
    assert first.startswith("tiny: ") and "on t, n 8" in first
    order = [printed.index(f"{name}: {built / name}") for name in ("report", "evaluate", "cpt", "prepare")]
    assert order == sorted(order)
    assert "paragraphs.jsonl" in printed and "params_sha256" in printed and "tiny_paragraphs (Apache-2.0)" in printed
    assert (told["runs"], told["changed"], told["missing"]) == (4, [], [])


def test_another_models_row_leads_past_what_it_did_not_use(built):
    assert {"evaluate", "task.yaml"} <= names(lineage.trace(built / "evaluate", "keywords"))
    assert not {"cpt", "prepare"} & names(lineage.trace(built / "evaluate", "keywords"))
    with pytest.raises(ValueError, match="no row of 'giant'; it has: tiny, keywords"):
        lineage.trace(built / "report", "giant")


def test_what_has_changed_since_is_named(built):
    document = built / "documents" / "paragraphs.jsonl"
    before = document.read_bytes()
    try:
        document.write_bytes(before + b"\n")
        # The domain's folder, and the file that the tokenizer was trained on.
        assert lineage.summary(lineage.trace(built / "report"))["changed"] == [str(built / "documents"), str(document)]
        with pytest.raises(ValueError, match="has changed since; bring the old one back"):
            program.remake(str(built / "prepare"))
    finally:
        document.write_bytes(before)
    index = built / "prepare" / "heldout"
    index.rename(built / "gone")
    try:
        assert lineage.summary(lineage.trace(built / "cpt"))["missing"] == [str(built / "prepare")]
    finally:
        (built / "gone").rename(index)


@pytest.mark.parametrize(
    ("name", "compared"), [("prepare", "train/index.json"), ("cpt", "params_sha256"), ("evaluate", "predictions.jsonl")]
)
def test_a_run_made_again_is_the_same(built, name, compared):
    told = program.remake(str(built / name))
    assert told["equal"] and compared in told["compared"] and told["differs"] == []
    assert not list(built.glob(".*.again"))


def test_a_run_that_comes_out_differently_says_where_and_keeps_both(built, tmp_path):
    """A line of the results was changed by hand: the manifests tell nothing of it, the second run does."""
    shutil.copytree(built / "evaluate", tmp_path / "evaluate")
    file = tmp_path / "evaluate" / "predictions.jsonl"
    rows = run.read_jsonl(file)
    run.write_jsonl(file, [rows[0] | {"pred": "gift"}, *rows[1:]])
    for _ in range(2):  # a second remake begins anew
        told = program.remake(str(tmp_path / "evaluate"))
        assert not told["equal"] and told["differs"] == ["predictions.jsonl"]
        assert run.read_jsonl(Path(told["kept"]) / "predictions.jsonl") == rows


def test_a_killed_remake_goes_on(built):
    """What the first one had answered is not asked again: it stands in the hidden folder beside the run."""
    folder, again = built / "evaluate", built / ".evaluate.again"
    shutil.copytree(folder, again)
    manifest = json.loads((again / "manifest.json").read_text())
    run.write_json(again / "manifest.json", {k: v for k, v in manifest.items() if k != "result"})
    kept = run.read_jsonl(again / "predictions.jsonl")[:5]
    run.write_jsonl(again / "predictions.jsonl", kept)
    asked = []

    def make(name, config, workdir):
        assert run.read_jsonl(workdir / "predictions.jsonl") == kept
        asked.append(name)
        evaluate.main(program_config(config), workdir)

    assert lineage.remake(folder, make)["equal"] and asked == ["evaluate"]


def program_config(config):
    from ml_collections import ConfigDict

    return ConfigDict(config)


def test_from_the_shell_it_prints_a_tree_and_one_line_of_json(built):
    command = [sys.executable, "-m", "experiments.report", f"--lineage={built / 'evaluate'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["runs"] == 3
    done = subprocess.run([*command[:-1], "--remake=configs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: configs holds no config.json"), done.stderr
