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
# # How the models learnt: loss, held-out loss, gradients, speed
#
# Asks every training run under `RUNS` (a folder with `metrics.jsonl`). Runs whose names differ in a last number are one arm with
# several seeds and share a colour.

# %%
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib_fontja  # noqa: F401  (a font that has Japanese)
import numpy as np

from swallow_jax import report, run

if Path.cwd().name == "notebooks":  # Jupyter starts beside the notebook; folders are named from the root
    os.chdir("..")
RUNS = Path("runs/demo")

metrics = {file.parent.name: run.read_jsonl(file) for file in sorted(RUNS.glob("*/metrics.jsonl"))}
if not metrics:
    raise FileNotFoundError(f"no training run under {RUNS}; run the pipeline first")
arms = list(dict.fromkeys(re.sub(r"_\d+$", "", name) for name in metrics))
colour = {name: f"C{arms.index(re.sub(r'_[0-9]+$', '', name)) % 10}" for name in metrics}

# %%
header = ["run", "steps", "tokens", "minutes", "tokens/s", "loss", "best held-out", "held-out at the end"]
rows = []
for name, steps in metrics.items():
    result, seconds = report.run_result(RUNS / name), sum(row["tokens"] / row["tokens_per_s"] for row in steps)
    heldout = [row["heldout_loss"] for row in steps if "heldout_loss" in row]
    rows.append([name, len(steps), f"{sum(row['tokens'] for row in steps):,.0f}", f"{seconds / 60:.1f}",
                 f"{np.median([row['tokens_per_s'] for row in steps]):,.0f}", f"{result['loss']:.3f}", f"{min(heldout):.3f}",
                 f"{heldout[-1]:.3f}"])  # fmt: skip
print(report.text_table(header, rows))

# %% [markdown]
# ## Loss
# Thin: each step of training. Dots: the held-out set. Where the dots rise while the line falls, training has gone on too long.

# %%
figure, axes = plt.subplots(1, len(arms), figsize=(5 * len(arms), 3.5), squeeze=False, layout="constrained")
for name, steps in metrics.items():
    axis = axes[0][arms.index(re.sub(r"_\d+$", "", name))]
    axis.plot([row["step"] for row in steps], [row["loss"] for row in steps], color=colour[name], alpha=0.3, linewidth=0.8)
    seen = [(row["step"], row["heldout_loss"]) for row in steps if "heldout_loss" in row]
    axis.plot(*zip(*seen, strict=True), "o-", color=colour[name], label=f"{name}（評価用）")
for axis, arm in zip(axes[0], arms, strict=True):
    axis.set(title=f"損失：{arm}", xlabel="ステップ", ylabel="損失（ナット／トークン）", yscale="log")
    axis.legend()

# %% [markdown]
# ## Gradients and speed
# A gradient norm that grows is the first sign of a rate too high; waiting for data should be near zero.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
for name, steps in metrics.items():
    at = [row["step"] for row in steps]
    left.plot(at, [row["grad_norm"] for row in steps], color=colour[name], linewidth=0.8, label=name)
    right.plot(at, [row["tokens_per_s"] for row in steps], color=colour[name], linewidth=0.8, label=name)
left.set(title="勾配のノルム", xlabel="ステップ", yscale="log")
right.set(title="速さ", xlabel="ステップ", ylabel="トークン／秒")
left.legend(fontsize="small")
waited = {name: sum(row["data_wait_s"] for row in steps) for name, steps in metrics.items()}
print("seconds spent waiting for data: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in waited.items()))
