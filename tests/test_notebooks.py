"""The notebooks run from top to bottom on folders that the programs wrote, and say what those folders hold."""

import json
import runpy
from pathlib import Path

import pytest

from experiments import cpt, door, evaluate, prepare, synthesize

pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib_fontja")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A place like the repository's root, with small folders of every program under runs/demo."""
    root = tmp_path_factory.mktemp("root")
    (root / "configs").symlink_to(ROOT / "configs")
    runs = root / "runs" / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        prepare.main(door.load_config("configs/prepare/tiny.py"), runs / "prepare")
        training = door.load_config("configs/cpt/tiny.py").unlock()
        training.tokenizer, training.data.prepare = str(runs / "prepare" / "tokenizer"), ""
        training.data.mixture, training.data.heldout = ((str(runs / "prepare" / "train"), 1),), str(runs / "prepare" / "heldout")
        training.train.update({"steps": 4, "eval_every": 2, "log_every": 2})
        training.optim.update({"warmup_steps": 1, "decay_steps": 1})
        training.checkpoint.save_every = 4
        for seed in (0, 1):
            training.seed = seed
            cpt.main(training.lock(), runs / f"cpt_{seed}")
            training.unlock()
        talks = door.load_config("configs/synthesize/medical.py").unlock()
        talks.teachers.recorded.quotas.update({"train_pairs": 2, "dev_pairs": 1})
        synthesize.main(talks, runs / "synthesize")
        scores = door.load_config("configs/evaluate/tiny.py").unlock()
        scores.statistics.update({"permutations": 1000, "resamples": 200, "simulations": 0})
        ngrams = {"kind": "ngrams", "settings": {"shortest": 2, "longest": 2, "min_documents": 9, "inverse_regularisation": 1.0,
                                                  "max_iterations": 50}}  # fmt: skip
        scores.models = (*scores.models, *({"name": "n-grams", "seed": seed, **ngrams} for seed in (0, 1)))
        evaluate.main(scores, runs / "evaluate")
    return root


def executed(name, root, monkeypatch, capsys):
    """What a notebook printed and how many figures it left; each is drawn, so that a character without a glyph is an error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")
    monkeypatch.chdir(root)
    capsys.readouterr()
    runpy.run_path(str(ROOT / "notebooks" / f"{name}.py"))
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    for figure in figures:
        figure.canvas.draw()
    titles = [axis.get_title() for figure in figures for axis in figure.axes]
    pyplot.close("all")
    return capsys.readouterr().out, titles


def test_the_corpus_notebook_counts_documents_and_conversations(root, monkeypatch, capsys):
    printed, titles = executed("01_corpus", root, monkeypatch, capsys)
    found = json.loads((root / "runs/demo/prepare/report.json").read_text())
    for source in found["sources"]:
        assert f"prepare / {source}" in printed
    accepted = json.loads((root / "runs/demo/synthesize/manifest.json").read_text())["result"]["accepted"]
    assert f"accepted{accepted}" in printed.replace(" ", "") and "Apache-2.0" in printed
    assert titles == ["文書の行方（prepare）", "文書の長さ", "分類ごとの会話（synthesize）", "会話の長さ"]


def test_the_training_notebook_shows_each_run_and_groups_its_seeds(root, monkeypatch, capsys):
    printed, titles = executed("02_training", root, monkeypatch, capsys)
    last = json.loads((root / "runs/demo/cpt_1/metrics.jsonl").read_text().splitlines()[-1])
    line = next(line for line in printed.splitlines() if line.startswith("cpt_1"))
    assert line.split()[1] == "4" and line.split()[-1] == f"{last['heldout_loss']:.3f}"
    assert titles == ["損失：cpt", "勾配のノルム", "速さ"]


def test_the_results_notebook_shows_the_scores_and_the_two_kinds_of_noise(root, monkeypatch, capsys):
    printed, titles = executed("03_results", root, monkeypatch, capsys)
    rows = json.loads((root / "runs/demo/evaluate/scores.json").read_text())["scores"]
    found = next(row for row in rows if (row["model"], row["metric"]) == ("n-grams", "exact_category"))
    noise = next(line for line in printed.splitlines() if line.startswith("n-grams ") and line.split()[1] == "2")
    assert noise.split()[-1] == f"{100 * found['se_items']:.1f}" and found["sd_seeds"] == 0
    assert "keywords - constant" in printed and "false alarm" in printed
    assert titles[:2] == ["正解率（evaluate）", "事前に宣言した比較"] and titles[-1] == "信頼度と正解率"
    assert [title for title in titles if title in ("constant", "keywords", "n-grams")] == ["constant", "keywords", "n-grams"]


@pytest.mark.parametrize("name", ["01_corpus", "02_training", "03_results"])
def test_a_notebook_without_folders_says_what_to_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"under runs.demo; run the pipeline first"):
        runpy.run_path(str(ROOT / "notebooks" / f"{name}.py"))
