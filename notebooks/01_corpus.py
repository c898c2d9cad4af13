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
# # What the models read: documents kept and dropped, conversations accepted and rejected
#
# Asks the folders of `experiments.prepare` and `experiments.synthesize` under `RUNS`; make them with `bash tools/demo.sh`, or
# name another pipeline's folder. Open with Jupyter and jupytext (`pip install -e '.[notebooks]'`), or run it as it stands.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib_fontja  # noqa: F401  (a font that has Japanese)
import numpy as np

from swallow_jax import report, run

if Path.cwd().name == "notebooks":  # Jupyter starts beside the notebook; folders are named from the root
    os.chdir("..")
RUNS = Path("runs/demo")

corpora = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RUNS.glob("*/report.json"))}
talks = {file.parent.name: file.parent for file in sorted(RUNS.glob("*/accepted.jsonl"))}
if not corpora or not talks:
    raise FileNotFoundError(f"no folder of experiments.prepare or of experiments.synthesize under {RUNS}; run the pipeline first")

# %% [markdown]
# ## Documents
# Every document is kept, or dropped under its first reason.

# %%
header = ["folder / source", "documents", "kept", "characters", "tokens", "characters a token"]
rows = []
for name, found in corpora.items():
    for source, counts in found["sources"].items():
        characters, tokens = counts.get("characters", 0), counts.get("tokens", 0)
        ratio = f"{characters / tokens:.2f}" if tokens else "-"
        rows.append(
            [f"{name} / {source}", counts["documents_in"], counts.get("kept", 0), f"{characters:,}", f"{tokens:,}", ratio]
        )
print(report.text_table(header, rows))

# %%
figure, axes = plt.subplots(1, len(corpora), figsize=(5 * len(corpora), 3), squeeze=False, layout="constrained")
for axis, (name, found) in zip(axes[0], corpora.items(), strict=True):
    steps = [("読み込み", found["documents_in"]), *found["dropped_by_reason"].items(), ("採用", found["kept"])]
    bars = axis.barh([step for step, _ in steps], [count for _, count in steps])
    axis.bar_label(bars, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(title=f"文書の行方（{name}）", xlabel="文書数")

# %%
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for name, found in corpora.items():
    lengths = sorted((int(length), count) for length, count in found.get("documents_by_length", {}).items())
    axis.plot([length for length, _ in lengths], [count for _, count in lengths], "o-", label=name)
axis.set(title="文書の長さ", xlabel="文字数（この値以上、2倍未満）", ylabel="文書数", xscale="log")
axis.legend()

# %% [markdown]
# Licences travel with the text: what stands here is inherited by every model trained on it.

# %%
licences = [[row["source"], row["licence"], name] for name, found in corpora.items() for row in found["licences"]]
print(report.text_table(["source", "licence", "folder"], licences))

# %% [markdown]
# ## Conversations
# What each teacher was asked for, and what became of it.

# %%
for name, folder in talks.items():
    for title, steps in report.funnels(name, report.run_result(folder)):
        print(f"\n{title}\n" + report.text_table(["step", "count"], steps))

# %%
figure, axes = plt.subplots(1, len(talks), figsize=(8 * len(talks), 4), squeeze=False, layout="constrained")
for axis, (name, folder) in zip(axes[0], talks.items(), strict=True):
    result = report.run_result(folder)
    labels = list(result["accepted_by_class"])
    accepted = [result["accepted_by_class"][label] for label in labels]
    axis.barh(labels, accepted, label="採用")
    axis.barh(labels, [result["missing"].get(label, 0) for label in labels], left=accepted, label="計画に足りない分")
    axis.invert_yaxis()
    axis.set(title=f"分類ごとの会話（{name}）", xlabel="会話数")
    axis.legend()

# %% [markdown]
# Length must not tell the label: twins differ in one turn, so the two curves should lie on each other.

# %%
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for name, folder in talks.items():
    sizes = {True: [], False: []}
    for row in run.iter_jsonl(folder / "accepted.jsonl"):
        sizes[bool(row["labels"])].append(sum(len(turn["text"]) for turn in row["turns"]))
    edges = np.histogram_bin_edges(sizes[True] + sizes[False], bins=20)
    for violates, words in ((True, "違反あり"), (False, "違反なし")):
        axis.hist(sizes[violates], bins=edges, histtype="step", label=f"{name}：{words}")
    probe = report.run_result(folder)["length_probe"]
    print(f"{name}: the longer twin violates in {probe['accuracy']:.0%} of {probe['pairs']} pairs" if probe["pairs"] else name)
axis.set(title="会話の長さ", xlabel="文字数", ylabel="会話数")
axis.legend()
