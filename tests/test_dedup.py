"""Duplicates are found, distinct texts stay, and no test text hides in training text."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swallow_jax.data import dedup

KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"


def random_text(rng, length):
    return "".join(rng.choice(list(KANA), length))


def edited(rng, text, edits):
    """`text` with characters at `edits` places replaced."""
    characters = list(text)
    for place in rng.choice(len(text), edits, replace=False):
        characters[place] = rng.choice(list(KANA))
    return "".join(characters)


def test_canonical_form_ignores_width_case_space_and_punctuation():
    assert dedup.canonical("「ＡＢＣ」 は、１２３ です。") == dedup.canonical("abcは123です")


@given(
    st.lists(
        st.sampled_from([*"かガｶﾞ①１aＡßİ 、_²ﬁǆ", *"\u3099\u309a\u0301\u0327ㄱ\u1100\u1161\u11a8각\u0dd9\u0dcf"])
        | st.characters()
    )
)
def test_canonical_form_is_that_of_the_whole_text_where_characters_join(characters):
    text = "".join(characters)
    assert dedup.canonical(text) == re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def test_exact_duplicates_are_noticed_despite_punctuation():
    digests = dedup.digests(["保険です。", "保険です！", "預金です。", "保険です。"])
    assert dedup.first_seen(digests).tolist() == [True, False, True, False]
    # A text that is out of the question neither counts nor is counted.
    assert dedup.first_seen(digests, np.array([False, True, True, True])).tolist() == [False, True, True, False]


def test_signatures_estimate_jaccard_similarity_and_do_not_depend_on_the_process():
    rng = np.random.default_rng(0)
    a = random_text(rng, 600)
    b = edited(rng, a, 20)
    one, two = dedup.signatures([a, b], num_perm=512, seed=1)
    true = dedup.jaccard(dedup.shingles(a), dedup.shingles(b))
    assert abs(np.mean(one == two) - true) < 0.08  # 3.6 standard deviations of 512 trials
    # A set's order differs between processes; these literals were computed in another one.
    assert dedup.signatures(["これは保険の説明です"], num_perm=3, seed=7).tolist() == SIGNATURE


SIGNATURE = [[134022560, 10549446, 159899451]]


def test_near_duplicates_meet_in_the_first_of_their_cluster():
    rng = np.random.default_rng(0)
    base, other = random_text(rng, 800), random_text(rng, 800)
    texts = [other, base, edited(rng, base, 5), random_text(rng, 800), edited(rng, base, 5), other + "。"]
    assert dedup.near_duplicates(texts, bands=40, rows=20, seed=0) == [0, 1, 1, 3, 1, 0]


def test_planted_near_duplicates_are_found_and_merely_similar_texts_stay():
    rng = np.random.default_rng(0)
    near = distant = 0
    for _ in range(20):
        base = random_text(rng, 400)
        close, far = edited(rng, base, 3), edited(rng, base, 40)
        assert dedup.jaccard(dedup.shingles(base), dedup.shingles(close)) >= 0.9
        assert dedup.jaccard(dedup.shingles(base), dedup.shingles(far)) < 0.5
        _, a, b = dedup.near_duplicates([base, close, far], bands=40, rows=20, seed=0)
        near += a == 0
        distant += b != 2
    assert near >= 19  # P = 0.994 each
    assert distant == 0  # P < 1e-4 each


PROTECTED = [
    "この保険は元本が保証されているので、預金と同じようにお考えいただいて大丈夫です。",
    "はい、お願いします。",
    "解約返戻金が払込保険料を下回る期間があります。",
]


def test_a_shared_13_gram_is_found_through_four_disguises():
    disguises = [
        "担当者は「この保険は元本が保証されているので安心」と言った。",  # quoted within other text
        "この 保険 は 元本 が 保証 されて いる ので",  # spaces
        "この保険は、\n元本が・保証されているので",  # punctuation and line breaks
        "解約返戻金が払込保険料ヲ下回る。解約返戻金が払込保険料を下回る期間",
    ]
    hits = dedup.ngram_hits(disguises, PROTECTED, n=13)
    assert [(hit.train, hit.protected) for hit in hits] == [(0, 0), (1, 0), (2, 0), (3, 2)]
    assert hits[0].overlap == "この保険は元本が保証されて"
    assert not dedup.ngram_hits(disguises, PROTECTED, n=30)


def test_text_shorter_than_the_n_gram_is_no_leak():
    assert dedup.ngram_hits(["はい、お願いします。"], PROTECTED, n=13) == []


def test_near_test_finds_what_leaves_no_13_gram():
    paraphrase = "この保険は元本が保証済みているので、預金と同じだようにお考えいただければ大丈夫です。"
    assert not dedup.ngram_hits([paraphrase], PROTECTED, n=13)
    (hit,) = dedup.near_hits(["別の話をしましょう。", paraphrase], PROTECTED, threshold=0.3)
    assert (hit.train, hit.protected, hit.overlap) == (1, 0, "")
    assert hit.jaccard == dedup.jaccard(dedup.shingles(paraphrase), dedup.shingles(PROTECTED[0]))
    assert not dedup.near_hits([paraphrase], PROTECTED, threshold=0.9)


def test_leaks_counts_documents_and_reads_them_line_by_line():
    documents = ["無関係な文章です。", "前置きの行です。\n" + PROTECTED[2] + "\n長い後書きが続きます。" * 5]
    assert {
        (hit.train, hit.protected, bool(hit.overlap)) for hit in dedup.leaks(documents, PROTECTED, ngram=13, threshold=0.9)
    } == {
        (1, 2, True),
        (1, 2, False),
    }


CONVERSATIONS = [
    {
        "conversation_id": "c1",
        "pair_id": "p1",
        "turns": [{"speaker": "募集人", "text": "a"}, {"speaker": "お客様", "text": "b"}, {"speaker": "募集人", "text": "悪い"}],
        "evidence": [{"category": "x", "turn": 2, "quote": "悪い"}],
    },
    {
        "conversation_id": "c2",
        "pair_id": "p1",
        "turns": [{"speaker": "募集人", "text": "a"}, {"speaker": "お客様", "text": "b"}, {"speaker": "募集人", "text": "良い"}],
        "evidence": [],
    },
]


def test_protected_are_all_turns_or_those_with_evidence_and_their_twins():
    assert [row["text"] for row in dedup.protected_utterances(CONVERSATIONS, "turns")] == ["a", "b", "悪い", "a", "b", "良い"]
    assert dedup.protected_utterances(CONVERSATIONS, "evidence") == [
        {"conversation_id": "c1", "turn": 2, "text": "悪い"},
        {"conversation_id": "c2", "turn": 2, "text": "良い"},
    ]
    with pytest.raises(ValueError, match="unknown choice"):
        dedup.protected_utterances(CONVERSATIONS, "all")
