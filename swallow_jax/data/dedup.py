"""Exact and near duplicates within a corpus, and traces of protected texts (test sets) in training texts.

Near means MinHash over character 5-grams (Broder 1997), candidates by banding (two texts of Jaccard similarity s meet with
probability 1 - (1 - s^rows)^bands), clusters by union-find. Comparison ignores width, case, white space and punctuation.
"""

import dataclasses
import functools
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SHINGLE = 5  # characters; Japanese words have no spaces between them


def canonical(text: str) -> str:
    """What counts in comparisons: NFKC, lower case, letters and digits only."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())


def shingles(text: str, n: int = SHINGLE) -> set[str]:
    """Character n-grams of the canonical text; a shorter text is its own single shingle, an empty one has none."""
    text = canonical(text)
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))} if text else set()


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


def digest(text: str) -> bytes:
    """16 bytes that are equal for texts with the same canonical form."""
    return hashlib.sha256(canonical(text).encode()).digest()[:16]


# Within a corpus


class Seen:
    """Exact duplicates, paragraph by paragraph or whole: `seen.add(text)` says whether the text is new."""

    def __init__(self):
        self._digests: set[bytes] = set()

    def add(self, text: str) -> bool:
        key = digest(text)
        new = key not in self._digests
        self._digests.add(key)
        return new


def signatures(texts: Iterable[str], *, num_perm: int, seed: int) -> np.ndarray:
    """MinHash signatures, uint32 [texts, num_perm]."""
    import rensa

    # Sorted: a set's order differs between processes, a signature must not.
    sets = [sorted(shingles(text)) for text in texts]
    parts = [np.zeros((0, num_perm), np.uint32)]
    for first in range(0, len(sets), 1024):  # rensa hands out Python integers: few at a time
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(sets[first : first + 1024], num_perm, seed)
        parts.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(parts)


def near_duplicates(texts: Sequence[str], *, bands: int, rows: int, seed: int) -> list[int]:
    """For each text the index of the first text of its cluster (its own index where it has no earlier near duplicate)."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for group in _buckets(signatures(texts, num_perm=bands * rows, seed=seed), bands):
        first = root(group[0])
        for i in group[1:]:
            first, other = sorted((first, root(i)))
            parent[other] = first  # the smaller index stays the root
    return [root(i) for i in range(len(texts))]


def _buckets(signatures_NP: np.ndarray, bands: int) -> Iterable[list[int]]:
    """Groups of at least two row numbers that agree in a whole band."""
    for band in np.split(signatures_NP, bands, axis=1):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for i, key in enumerate(np.ascontiguousarray(band)):
            buckets[key.tobytes()].append(i)
        yield from (group for group in buckets.values() if len(group) > 1)


# Against protected texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """Training text number `train` carries a trace of protected text number `protected`."""

    train: int
    protected: int
    overlap: str  # the first shared n-gram, or "" for a near duplicate
    jaccard: float  # of the character 5-grams


def ngram_hits(train_texts: Iterable[str], protected_texts: Sequence[str], n: int = 13) -> list[Hit]:
    """Pairs that share a character n-gram after canonicalisation, in the order of the training texts.

    A protected text with fewer than n letters and digits has no n-gram and is never hit (a bare "はい、お願いします" is no leak).
    """
    owners: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(protected_texts):
        text = canonical(text)
        for gram in {text[i : i + n] for i in range(len(text) - n + 1)}:
            owners[gram].append(number)
    similarity = _Similarity(protected_texts)
    hits = []
    for number, text in enumerate(train_texts):
        own = canonical(text)
        shared: dict[int, str] = {}
        for i in range(len(own) - n + 1):
            for protected in owners.get(own[i : i + n], ()):
                shared.setdefault(protected, own[i : i + n])
        for protected, gram in sorted(shared.items()):
            hits.append(Hit(train=number, protected=protected, overlap=gram, jaccard=similarity(text, protected)))
    return hits


def near_hits(
    train_texts: Sequence[str],
    protected_texts: Sequence[str],
    *,
    threshold: float,
    bands: int = 64,
    rows: int = 2,
    seed: int = 0,
) -> list[Hit]:
    """Pairs whose 5-gram Jaccard similarity is at least `threshold`, ordered by training text.

    MinHash only proposes pairs, the similarity is then computed exactly; bands and rows are set for recall (a pair of
    similarity 0.5 is missed once in 10^8, one of 0.3 once in 400). Give texts of comparable length: paragraphs against
    utterances.
    """
    texts = [*protected_texts, *train_texts]
    proposed: set[tuple[int, int]] = set()
    for group in _buckets(signatures(texts, num_perm=bands * rows, seed=seed), bands):
        protected = [i for i in group if i < len(protected_texts)]
        train = [i - len(protected_texts) for i in group[len(protected) :]]
        proposed.update((t, p) for t in train for p in protected)
    similarity = _Similarity(protected_texts)
    hits = (
        Hit(train=train, protected=protected, overlap="", jaccard=similarity(train_texts[train], protected))
        for train, protected in sorted(proposed)
    )
    return [hit for hit in hits if hit.jaccard >= threshold]


class _Similarity:
    """Jaccard similarity of a text and protected text number i; each set of shingles is made once."""

    def __init__(self, protected_texts: Sequence[str]):
        self._protected = functools.lru_cache(maxsize=None)(lambda i: shingles(protected_texts[i]))
        self._text, self._shingles = "", set()

    def __call__(self, text: str, protected: int) -> float:
        if text != self._text:
            self._text, self._shingles = text, shingles(text)
        return jaccard(self._shingles, self._protected(protected))


def leaks(texts: Sequence[str], utterances: Sequence[str], *, ngram: int, threshold: float) -> list[Hit]:
    """Both tests on whole documents: n-grams anywhere, near duplicates line by line. `train` counts documents."""
    owners = [number for number, text in enumerate(texts) for _ in text.split("\n")]
    lines = [line for text in texts for line in text.split("\n")]
    near = near_hits(lines, utterances, threshold=threshold)
    return ngram_hits(texts, utterances, n=ngram) + [dataclasses.replace(hit, train=owners[hit.train]) for hit in near]


def protected_utterances(conversations: Iterable[Mapping[str, Any]], which: str) -> list[dict[str, Any]]:
    """What no training text may carry: [{"conversation_id", "turn", "text"}].

    which: 'turns', every turn of every conversation; 'evidence', the turns that carry evidence of a violation and the turns
    at their place in the compliant twin (same `pair_id`).
    """
    if which not in ("turns", "evidence"):
        raise ValueError(f"unknown choice of protected utterances {which!r}; use 'turns' or 'evidence'")
    conversations = list(conversations)
    pairs = [row.get("pair_id") or row["conversation_id"] for row in conversations]
    guilty: dict[str, set[int]] = defaultdict(set)
    for pair, row in zip(pairs, conversations, strict=True):
        guilty[pair].update(item["turn"] for item in row.get("evidence", ()))
    return [
        {"conversation_id": row["conversation_id"], "turn": number, "text": turn["text"]}
        for pair, row in zip(pairs, conversations, strict=True)
        for number, turn in enumerate(row["turns"])
        if which == "turns" or number in guilty[pair]
    ]
