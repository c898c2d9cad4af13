"""Normalisation of finance text and quality rules."""

import pytest

from swallow_jax.data import filters


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("約定利率：１．５％～２．０％", "約定利率：1.5%～2.0%"),  # a range stays a range
        ("①保険金額 ⑳特約", "①保険金額 ⑳特約"),  # a number stays a number
        ("㈱銀行 ㍻31年 ㌔", "(株)銀行 平成31年 キロ"),
        ("利率½、10²", "利率½、10²"),  # not 1⁄2, not 102
        ("売上高120304567890円", "売上高120304567890円"),
        ("はい，そうです．", "はい、そうです。"),
        ("１，０００万円、３．５％", "1,000万円、3.5%"),
        ("ｶﾞｲﾄﾞ", "ガイド"),
        ("次です。 また、 別に A です。 B", "次です。また、別に A です。 B"),
        ("一\r\n\r\n 二\u200b\u0007\n", "一\n二"),
        ("〜と——「元本保証」", "〜と——「元本保証」"),
    ],
)
def test_normalise_keeps_what_finance_text_means(raw, clean):
    assert filters.normalise(raw)[0] == clean
    assert filters.normalise(clean)[0] == clean  # once is enough


def test_every_kind_of_rewrite_is_counted():
    _, counts = filters.normalise("①ＡＢ，は，い．\u200b。 次")
    assert counts == {"protected": 1, "nfkc": 3, "comma": 1, "period": 1, "control": 1, "space": 1}


@pytest.mark.parametrize(
    ("measure", "text", "value"),
    [
        ("letters", "あ い\nう", 3),
        ("japanese_letters", "あカ漢々ー、aB1", 5),
        ("japanese_fraction", "あいab", 0.5),
        ("hiragana_fraction", "あい漢字", 0.5),
        ("katakana_fraction", "カー漢字", 0.5),
        ("kanji_fraction", "漢字々あ", 0.75),
        ("duplicate_paragraph_fraction", "一\n一\n二\n一", 0.5),
        ("duplicate_paragraph_chars", "一一一\n一一一\n二", 3 / 7),
    ],
)
def test_measures(measure, text, value):
    assert filters.MEASURES[measure](text) == pytest.approx(value)


def test_measures_of_an_empty_text_are_zero():
    assert {measure("") for measure in filters.MEASURES.values()} == {0.0}


def test_annotation_gives_every_verdict_and_failed_names_those_against():
    rules = {"letters": {"min": 3}, "katakana_fraction": {"max": 0.5}, "swallow_mean_sentence": {"min": 2, "max": 4}}
    verdicts = filters.annotate("カカ", rules)
    assert verdicts == {
        "letters": {"value": 2.0, "passes": False},
        "katakana_fraction": {"value": 1.0, "passes": False},
        "swallow_mean_sentence": {"value": 2.0, "passes": True},
    }
    assert filters.failed(verdicts) == ["letters", "katakana_fraction"]


def test_limits_themselves_pass():
    assert filters.failed(filters.annotate("ああ", {"letters": {"min": 2, "max": 2}})) == []


def test_profiles_judge_the_same_text_differently():
    table = "売上高 120億円\n営業利益 12億円\n" * 40
    assert filters.failed(filters.annotate(table, filters.SWALLOW_V1))
    assert not filters.failed(filters.annotate(table, {"japanese_letters": {"min": 40}}))


def test_clean_drops_foreign_paragraphs_and_says_why():
    profile = {
        "paragraph": {"japanese_letters": {"min": 2}, "japanese_fraction": {"min": 0.5}},
        "document": {"japanese_letters": {"min": 8}},
    }
    cleaned = filters.clean("これは日本語です。\nEnglish only.\nls -l コマンド abcdef\nつぎの行", profile)
    assert cleaned.text == "これは日本語です。\nつぎの行"
    assert cleaned.removed == {"japanese_letters": 1, "japanese_fraction": 1}
    assert cleaned.reasons == []
    assert filters.clean("これは", profile).reasons == ["japanese_letters"]
    assert filters.clean("English only.", profile).reasons == ["empty"]


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"p": {"document": {}}}, "p: a profile has rules for paragraph and for document"),
        ({"p": {"paragraph": {}, "document": {"letter": {"min": 1}}}}, "p.document: unknown rule 'letter'"),
        ({"p": {"paragraph": {"letters": {"minimum": 1}}, "document": {}}}, "p.paragraph.letters"),
        ({"p": {"paragraph": {"letters": 4}, "document": {}}}, "p.paragraph.letters"),
        ({"p": {"paragraph": {}, "document": "swallow_v9"}}, "unknown rule set 'swallow_v9'"),
    ],
)
def test_a_wrong_profile_is_named(profiles, message):
    with pytest.raises(ValueError, match=message):
        filters.check_profiles(profiles, "profiles")


def test_the_published_rules_can_be_named():
    profiles = filters.check_profiles({"web": {"paragraph": {}, "document": "swallow_v1"}}, "profiles")
    assert profiles["web"]["document"] == filters.SWALLOW_V1


def test_a_profile_may_change_single_published_rules():
    changed = {"based_on": "swallow_v1", "swallow_letters": {"min": 100}, "swallow_longest_sentence": False}
    profiles = filters.check_profiles({"law": {"paragraph": {}, "document": changed}}, "profiles")
    expected = {**filters.SWALLOW_V1, "swallow_letters": {"min": 100}}
    del expected["swallow_longest_sentence"]
    assert profiles["law"]["document"] == expected


def test_every_document_is_measured_by_every_published_rule_whatever_its_profile():
    cleaned = filters.clean("短い文です。", {"paragraph": {}, "document": {}})
    assert set(cleaned.statistics) == set(filters.SWALLOW_V1)
    assert (cleaned.verdicts, cleaned.reasons) == ({}, [])


def test_personal_data_is_masked_before_rules_look_and_counted():
    cleaned = filters.clean("電話：０３－１２３４－５６７８", {"paragraph": {}, "document": {}}, ("phone",))
    assert (cleaned.text, cleaned.masked) == ("電話：<PHONE>", {"phone": 1})
