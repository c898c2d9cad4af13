"""The quality rules published for the Swallow Corpus v1 (Okazaki et al., arXiv 2404.17733; swallow-llm/swallow-corpus).

The definitions are those of the published program, to the character: paragraphs are lines, a sentence ends at 。．！？!? and a
run of such signs counts once, letters are all characters, the long-vowel mark ー is no Japanese letter, top n-grams count
by occurrences, duplicate n-grams by kinds. The n-gram statistics are computed with integers in NumPy: exactly, and some ten times
faster than with strings.
"""

import re
from collections import Counter

import numpy as np

# name -> limits; names as here, values as published
SWALLOW_V1 = {
    "swallow_letters": {"min": 400},
    "swallow_duplicate_paragraphs": {"max": 0.30},
    "swallow_duplicate_sentences": {"max": 0.30},
    "swallow_duplicate_paragraph_letters": {"max": 0.20},
    "swallow_duplicate_sentence_letters": {"max": 0.20},
    "swallow_top_2gram": {"max": 0.20},
    "swallow_top_3gram": {"max": 0.18},
    "swallow_top_4gram": {"max": 0.16},
    "swallow_duplicate_5gram": {"max": 0.15},
    "swallow_duplicate_6gram": {"max": 0.14},
    "swallow_duplicate_7gram": {"max": 0.13},
    "swallow_duplicate_8gram": {"max": 0.12},
    "swallow_duplicate_9gram": {"max": 0.11},
    "swallow_duplicate_10gram": {"max": 0.10},
    "swallow_hiragana": {"min": 0.2},
    "swallow_katakana": {"max": 0.5},
    "swallow_japanese": {"min": 0.5},
    "swallow_japanese_letters": {"min": 400},
    "swallow_mean_sentence": {"min": 20, "max": 90},
    "swallow_longest_sentence": {"max": 200},
    "swallow_ellipsis": {"max": 0.2},
}

_SENTENCE = re.compile(r"[^。．！？!?]+[。．！？!?]?")
_TOP, _DUPLICATE = range(2, 5), range(5, 11)


def statistics(text: str) -> dict[str, float]:
    """All statistics of the rules, by name; of an empty text they are 0."""
    lines = [_SENTENCE.findall(line) for line in text.split("\n")]
    paragraphs = ["".join(line) for line in lines]
    sentences = [sentence for line in lines for sentence in line]
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    hiragana, katakana, japanese = _japanese(codes)
    lengths = list(map(len, sentences))
    found = {"swallow_letters": float(len(text))}
    for name, parts in (("paragraph", paragraphs), ("sentence", sentences)):
        repeated = (
            [part for part, count in Counter(parts).items() for _ in range(count - 1)] if len(set(parts)) < len(parts) else []
        )
        found[f"swallow_duplicate_{name}s"] = _share(len(repeated), len(parts))
        found[f"swallow_duplicate_{name}_letters"] = _share(sum(map(len, repeated)), sum(map(len, parts)))
    found |= _ngrams(codes)
    found |= {
        "swallow_hiragana": _share(hiragana, japanese),
        "swallow_katakana": _share(katakana, japanese),
        "swallow_japanese": _share(japanese, len(text)),
        "swallow_japanese_letters": float(japanese),
        "swallow_mean_sentence": _share(sum(lengths), len(lengths)),
        "swallow_longest_sentence": float(max(lengths, default=0)),
        "swallow_ellipsis": _share(sum(sentence.rstrip().endswith(("・", "…")) for sentence in sentences), len(sentences)),
    }
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _classes() -> np.ndarray:
    """uint8 [65536]: 1 hiragana, 2 katakana, 3 kanji, 4 punctuation that counts as Japanese, 0 all else."""
    table = np.zeros(0x10000, np.uint8)
    table[0x3041:0x3097], table[0x30A1:0x30FB] = 1, 2
    table[[ord(char) for char in "々〇〻"]] = 3
    table[0x3400:0xA000] = table[0xF900:0xFB00] = 3
    table[[ord(char) for char in "、，。．！？"]] = 4
    return table


_CLASSES = _classes()


def _japanese(codes_N: np.ndarray) -> tuple[int, int, int]:
    """How many hiragana, katakana, and Japanese letters of all kinds."""
    counts = np.bincount(_CLASSES[np.minimum(codes_N, 0xFFFF)], minlength=5)
    return int(counts[1]), int(counts[2]), int(counts[1:].sum())


def _ngrams(codes_N: np.ndarray) -> dict[str, float]:
    """Share of the most frequent n-gram among occurrences (n = 2, 3, 4); of kinds that occur again among kinds (n = 5 to 10).

    Characters get numbers of few bits, so that a 5-gram fits into an integer exactly. In the sorted 5-grams those with a common
    beginning stand together: one sort serves n = 2 to 5. A longer n-gram can only be repeated where the shorter one at its
    place is, so that few places are left to look at.
    """
    found = {f"swallow_top_{n}gram": 0.0 for n in _TOP} | {f"swallow_duplicate_{n}gram": 0.0 for n in _DUPLICATE}
    size = len(codes_N)
    kinds = np.unique(codes_N)
    bits = len(kinds).bit_length()
    if size < 2:
        return found
    if 5 * bits > 64:
        return found | _ngrams_of_many_kinds(codes_N)
    table = np.empty(int(codes_N.max()) + 1, np.uint64)
    table[kinds] = np.arange(1, len(kinds) + 1)
    numbers = np.zeros(size + 4, np.uint64)  # 0 stands for the end: no two places are equally far from it
    numbers[:size] = table[codes_N]
    grams = numbers[:size]
    for n in range(1, 5):
        grams = (grams << np.uint64(bits)) | numbers[n : n + size]
    order = np.argsort(grams)
    ordered = grams[order]
    differ = ordered[1:] ^ ordered[:-1]
    for n in range(2, min(size, 5) + 1):
        # The n - 1 places before the end have no n-gram; each stands alone and counts for a kind too many.
        counts = _runs(differ >> np.uint64(bits * (5 - n)) != 0)
        if n in _TOP:
            found[f"swallow_top_{n}gram"] = int(counts.max()) / (size - n + 1)
        else:
            found[f"swallow_duplicate_{n}gram"] = int((counts > 1).sum()) / (len(counts) - n + 1)
    for n in range(6, min(size, 10) + 1):
        many = np.repeat(counts > 1, counts)
        places, ranks = order[many], np.repeat(np.arange(len(counts), dtype=np.uint64), counts)[many]
        inside = places <= size - n
        places, ranks = places[inside], ranks[inside]
        if not len(places):
            break
        grams = (ranks << np.uint64(bits)) | numbers[places + n - 1]
        order = np.argsort(grams)
        ordered = grams[order]
        order, counts = places[order], _runs(ordered[1:] != ordered[:-1])
        # Of the places already given up, each holds a kind of its own.
        found[f"swallow_duplicate_{n}gram"] = int((counts > 1).sum()) / (size - n + 1 - len(places) + len(counts))
    return found


def _ngrams_of_many_kinds(codes_N: np.ndarray) -> dict[str, float]:
    """The same for more than 4,095 different characters, by a sort of all 10-grams as rows."""
    size = len(codes_N)
    columns = np.zeros((10, size), np.int64)
    for n in range(10):
        columns[n, : size - n] = codes_N[n:].astype(np.int64) + 1
    ordered = columns[:, np.lexsort(columns[::-1])]
    common = np.cumprod(ordered[:, 1:] == ordered[:, :-1], axis=0).sum(0)  # length of the common beginning of neighbours
    found = {}
    for n in (*_TOP, *_DUPLICATE):
        counts = _runs(common < n)
        if n in _TOP:
            found[f"swallow_top_{n}gram"] = int(counts.max()) / (size - n + 1)
        else:
            found[f"swallow_duplicate_{n}gram"] = int((counts > 1).sum()) / (len(counts) - n + 1)
    return found


_EDGE = np.ones(1, bool)


def _runs(differs: np.ndarray) -> np.ndarray:
    """The lengths of the runs in a sorted array of which `differs` says where a neighbour is another."""
    edges = np.flatnonzero(np.concatenate([_EDGE, differs, _EDGE]))
    return edges[1:] - edges[:-1]
