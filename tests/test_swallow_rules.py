"""The published rules of the Swallow Corpus v1, against a second implementation that does nothing clever."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from swallow_jax import run
from swallow_jax.data import filters, swallow_rules

ROOT = Path(__file__).parent.parent


def straightforward(text):
    """Every statistic as the publication defines it, with strings, sets and counters."""
    lines = [re.findall("[^。．！？!?]+[。．！？!?]?", line) for line in text.split("\n")]
    paragraphs = ["".join(line) for line in lines]
    sentences = [sentence for line in lines for sentence in line]
    found = {"swallow_letters": len(text)}
    for name, parts in (("paragraph", paragraphs), ("sentence", sentences)):
        again = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
        found[f"swallow_duplicate_{name}s"] = len(again) / len(parts) if parts else 0
        letters = len("".join(parts))
        found[f"swallow_duplicate_{name}_letters"] = len("".join(again)) / letters if letters else 0
    for n in range(2, 11):
        counts = Counter(text[i : i + n] for i in range(len(text) - n + 1))
        if n < 5:
            found[f"swallow_top_{n}gram"] = max(counts.values()) / counts.total() if counts else 0
        else:
            found[f"swallow_duplicate_{n}gram"] = sum(count > 1 for count in counts.values()) / len(counts) if counts else 0
    hiragana = sum("\u3041" <= char <= "\u3096" for char in text)
    katakana = sum("\u30a1" <= char <= "\u30fa" for char in text)
    kanji = sum(char in "々〇〻" or "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" for char in text)
    japanese = hiragana + katakana + kanji + sum(char in "、，。．！？" for char in text)
    lengths = [len(sentence) for sentence in sentences]
    trailing = [sentence for sentence in sentences if sentence.strip()[-1:] in ("・", "…")]
    return found | {
        "swallow_hiragana": hiragana / japanese if japanese else 0,
        "swallow_katakana": katakana / japanese if japanese else 0,
        "swallow_japanese": japanese / len(text) if text else 0,
        "swallow_japanese_letters": japanese,
        "swallow_mean_sentence": sum(lengths) / len(lengths) if lengths else 0,
        "swallow_longest_sentence": max(lengths, default=0),
        "swallow_ellipsis": len(trailing) / len(sentences) if sentences else 0,
    }


def passes(found):
    """apply_v1, written out."""
    return not (
        found["swallow_letters"] < 400
        or found["swallow_duplicate_paragraphs"] > 0.30
        or found["swallow_duplicate_sentences"] > 0.30
        or found["swallow_duplicate_paragraph_letters"] > 0.20
        or found["swallow_duplicate_sentence_letters"] > 0.20
        or found["swallow_top_2gram"] > 0.20
        or found["swallow_top_3gram"] > 0.18
        or found["swallow_top_4gram"] > 0.16
        or found["swallow_duplicate_5gram"] > 0.15
        or found["swallow_duplicate_6gram"] > 0.14
        or found["swallow_duplicate_7gram"] > 0.13
        or found["swallow_duplicate_8gram"] > 0.12
        or found["swallow_duplicate_9gram"] > 0.11
        or found["swallow_duplicate_10gram"] > 0.10
        or found["swallow_hiragana"] < 0.2
        or found["swallow_katakana"] > 0.5
        or found["swallow_japanese"] < 0.5
        or found["swallow_japanese_letters"] < 400
        or found["swallow_mean_sentence"] < 20
        or found["swallow_mean_sentence"] > 90
        or found["swallow_longest_sentence"] > 200
        or found["swallow_ellipsis"] > 0.2
    )


def varied_documents(count=720):
    """Prose, tables, lists, repetitions, trailing sentences, other scripts, rare characters, and the very short."""
    rng = random.Random(0)
    prose = "\n".join(
        row["text"]
        for name in ("demo_finance_ja/insurance", "demo_finance_ja/banking", "demo_talks_ja/talks_a")
        for row in run.iter_jsonl(ROOT / f"configs/domains/{name}.jsonl")
    )
    rare = [chr(code) for code in (*range(0x4E00, 0x9F00), *range(0x20000, 0x20400))]
    made = []
    for i in range(count):
        size = rng.choice([0, 1, 2, 4, 5, 6, 9, 10, 11, 60, 399, 400, 401, 800, 1500, 2500, *range(450, 800, 20)])
        begin = rng.randrange(len(prose) - size)
        text = prose[begin : begin + size]
        kind = i % 12
        if kind == 1:
            text += "\n" + text[: rng.randrange(size + 1)]
        elif kind == 2:
            text = "\n".join(rng.choice(["売上高 120億円", "営業利益 12億円", "", "純利益"]) for _ in range(size // 10))
        elif kind == 3:
            text = re.sub("。", lambda _: rng.choice(["…", "・", "。", "！？", "…\n"]), text)
        elif kind == 4:
            text = "".join(rng.choice(rare) for _ in range(size * 3))
        elif kind == 5:
            text = rng.choice("あア。 \n漢") * size
        elif kind == 6:
            text = text.replace("、", "，").replace("。", "．").replace("\n", "")
        elif kind == 7:
            text = text.replace("。", "").replace("\n", "")
        elif kind == 8:
            text = "The yield curve is flat. " * (size // 30) + text
        elif kind == 9:
            text = "".join(rng.choice("あいう。\n") for _ in range(size))
        elif kind == 10:
            text = text.translate({code: code + 0x60 for code in range(0x3041, 0x3097)})  # hiragana to katakana
        made.append(text)
    return made


def test_the_same_statistics_and_decisions_as_a_straightforward_implementation():
    kept = 0
    documents = varied_documents()
    for number, text in enumerate(documents):
        expected, found = straightforward(text), swallow_rules.statistics(text)
        assert found == pytest.approx(expected, abs=1e-12), f"document {number}: {text[:40]!r}"
        decision = not filters.failed(filters.annotate(text, filters.SWALLOW_V1))
        assert decision == passes(expected), f"document {number}"
        kept += decision
    assert len(documents) >= 500
    assert 40 < kept < len(documents) - 40  # both decisions are well represented


def test_each_rule_decides_alone_at_its_published_threshold():
    """At the limit a document passes, a hair beyond it falls, by this rule and no other."""
    good = {"swallow_letters": 1000, "swallow_japanese_letters": 900, "swallow_hiragana": 0.5, "swallow_japanese": 0.9}
    good = {name: good.get(name, 50 if name == "swallow_mean_sentence" else 0) for name in filters.SWALLOW_V1}
    assert passes(good)
    for name, limits in filters.SWALLOW_V1.items():
        for side, limit in limits.items():
            beyond = limit + (1e-9 if side == "max" else -1e-9)
            for value, falls in ((limit, []), (beyond, [name])):
                given = good | {name: value}
                assert filters.failed(filters.annotate("", filters.SWALLOW_V1, given)) == falls
                assert passes(given) == (not falls)
