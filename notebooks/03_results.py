# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What came out: accuracy, differences, noise of seeds and of items, confusions, calibration
#
# Asks every evaluation under `RUNS` (a folder with `scores.json`). Figures with intervals alone decide nothing: the comparisons
# declared in the config before the run do.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib_fontja  # noqa: F401  (a font that has Japanese)
import numpy as np

from swallow_jax import report

if Path.cwd().name == "notebooks":  # Jupyter starts beside the notebook; folders are named from the root
    os.chdir("..")
RUNS = Path("runs/demo")

evaluations = {file.parent.name: report.read_evaluation(file.parent) for file in sorted(RUNS.glob("*/scores.json"))}
if not evaluations:
    raise FileNotFoundError(f"no evaluation under {RUNS}; run the pipeline first")
print(report.arms_text(list(evaluations.values())))
print(report.comparisons_text(list(evaluations.values())))

# %% [markdown]
# ## Accuracy, and the declared differences

# %%
for name, evaluation in evaluations.items():
    exact = [evaluation.value(arm["model"], evaluation.primary) for arm in evaluation.details["arms"]]
    compared = [row for row in evaluation.paired if row["b01"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.4 * max(len(exact), len(compared))), layout="constrained")
    for axis, rows in ((left, [(r["model"], r["value"], *r["ci95"]) for r in exact]),
                       (right, [(f"{r['a']} - {r['b']}", r["diff"], *r["ci95"]) for r in compared])):  # fmt: skip
        for at, (_, value, low, high) in enumerate(rows):
            axis.plot([100 * low, 100 * high], [at, at], color="C0")
            axis.plot(100 * value, at, "o", color="C0")
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.invert_yaxis()
    right.axvline(0, color="grey", linewidth=0.8)
    left.set(title=f"正解率（{name}）", xlabel="％、95 % 信頼区間")
    right.set(title="事前に宣言した比較", xlabel="差（ポイント）、95 % 信頼区間")

# %% [markdown]
# ## Two kinds of noise
# Training again with another seed moves the figure (left column); other test conversations would move it too (right column). More
# seeds shrink the first, more conversations the second.

# %%
for name, evaluation in evaluations.items():
    if rows := report.noise_rows(evaluation):
        print(f"\n{name}\n" + report.text_table(report.NOISE_HEADER, rows))
        figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
        arms = [row[0] for row in rows]
        for at, arm in enumerate(arms):
            found = evaluation.value(arm, evaluation.primary)
            runs = [100 * run["value"] for run in found["by_seed"]]
            axis.plot(runs, [at] * len(runs), "o", alpha=0.6)
            axis.errorbar(100 * found["value"], at, xerr=196 * found["se_items"], color="grey", capsize=3)
        axis.set_yticks(range(len(arms)), arms)
        axis.invert_yaxis()
        axis.set(title="点：各シード、線：会話の選び方による誤差（95 %）", xlabel="正解率（％）")

# %% [markdown]
# ## Confusions and categories

# %%
for evaluation in evaluations.values():
    names = {label["id"]: label["text"] for label in evaluation.details["labels"]}  # the short ones, which models answer
    labels = list(names)
    arms = evaluation.details["arms"]
    figure, axes = plt.subplots(1, len(arms), figsize=(3.5 * len(arms), 4.6), squeeze=False, sharey=True, layout="constrained")
    for axis, arm in zip(axes[0], arms, strict=True):
        counts = np.array([[arm["confusion"][gold][pred] for pred in labels] for gold in labels], dtype=float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for gold, pred in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[gold, pred] > 0.5 else "black"
            axis.text(pred, gold, f"{counts[gold, pred]:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(range(len(labels)), [names[label] for label in labels], rotation=90)
        axis.set_yticks(range(len(labels)), [names[label] for label in labels])
        axis.set(title=arm["model"], xlabel="予測")
    axes[0][0].set_ylabel("正解")

# %% [markdown]
# ## How sure, how right
# A calibrated model is right in 70 % of the answers it is 70 % sure of.

# %%
figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
for name, evaluation in evaluations.items():
    for arm in evaluation.details["arms"]:
        if calibration := arm.get("calibration"):
            line = [(confidence, accuracy) for _, confidence, accuracy in calibration["reliability"]]
            axis.plot(*zip(*line, strict=True), "o-", label=f"{arm['model']}（{name}、ECE {calibration['ece']:.2f}）")
axis.set(title="信頼度と正解率", xlabel="確からしさ", ylabel="正解率", xlim=(0, 1), ylim=(0, 1))
if axis.get_legend_handles_labels()[1]:
    axis.legend(fontsize="small")

# %% [markdown]
# ## Three conversations
# A hit, a miss and a false alarm, the surest of each.

# %%
for evaluation in evaluations.values():
    model = evaluation.details["arms"][-1]["model"]
    print(f"\n{model}\n" + report.examples_text(report.examples(evaluation, model), evaluation.names()))
