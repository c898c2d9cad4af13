"""What a training run will read of each source, said before it starts: integer weights, realised shares, epochs."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from swallow_jax.data import shards

Part = tuple[str, int]  # (shard folder, integer weight): of every sum(weights) rows, exactly `weight` come from the folder


def weights(shares: Sequence[tuple[str, float]]) -> list[Part]:
    """Small integer weights for (folder, share) pairs; shares are taken to the nearest 1/100 and must add up to 1."""
    for folder, share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"the share {share} of {folder} must lie in (0, 1]")
    parts = [Fraction(round(share * 100), 100) for _, share in shares]
    if sum(parts) != 1:
        raise ValueError(f"the shares {[share for _, share in shares]} add up to {float(sum(parts)):g}; they must add up to 1")
    scale = math.lcm(*(part.denominator for part in parts))
    return [(str(folder), int(part * scale)) for (folder, _), part in zip(shares, parts, strict=True)]


def with_replay(domain: str, *, replay: Sequence[str], replay_share: float, chat: Sequence[str], chat_share: float) -> list[Part]:
    """The domain's shards with general text against forgetting and chat samples, which keep their loss weights."""
    for name, folders, share in (("replay", replay, replay_share), ("chat", chat, chat_share)):
        if bool(folders) != bool(share):
            raise ValueError(f"{name}: {len(folders)} shard folders and a share of {share}; state both, or neither")
    others = [(folder, replay_share / len(replay)) for folder in replay] + [(folder, chat_share / len(chat)) for folder in chat]
    rest = 1 - sum(round(share * 100) / 100 for _, share in others)
    return weights([(domain, rest), *others])


def table(mixture: Sequence[Part], *, rows: int) -> list[dict[str, Any]]:
    """One line a source: its folder's weight, the realised share of rows, tokens there, tokens read and epochs in `rows` rows."""
    total, lines = sum(weight for _, weight in mixture), []
    for folder, weight in mixture:
        index = shards.read_index(folder)
        # The loader interleaves exactly: of the first n rows this folder gives n * weight / total, rounded.
        read = rows * weight / total
        epochs = read / index["rows"]
        inside = sum(counts["tokens"] for counts in index["sources"].values()) or 1
        for source, counts in sorted(index["sources"].items()):
            lines.append(
                {
                    "folder": str(folder),
                    "source": source,
                    "weight": weight,
                    "share_of_rows": weight / total * counts["tokens"] / inside,
                }
                | {"tokens": counts["tokens"], "tokens_read": round(counts["tokens"] * epochs), "epochs": round(epochs, 2)}
            )
    return lines


def table_text(mixture: Sequence[Part], *, rows: int) -> str:
    """The table for the terminal; a source read more than four times is marked (repeats past that hardly help)."""
    lines = [f"{'source':<32} {'weight':>6} {'share %':>8} {'tokens':>14} {'read':>14} {'epochs':>7}"]
    for line in table(mixture, rows=rows):
        mark = " !" if line["epochs"] > 4 else ""
        name = f"{Path(line['folder']).parent.name}/{line['source']}"
        lines.append(
            f"{name:<32} {line['weight']:>6} {100 * line['share_of_rows']:>8.1f} {line['tokens']:>14,} {line['tokens_read']:>14,}"
            f" {line['epochs']:>7.2f}{mark}"
        )
    return "\n".join(lines)
