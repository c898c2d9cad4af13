"""Personal data is found, figures are left alone."""

import random
import re

import pytest

from swallow_jax.data import filters, privacy

ALL = tuple(privacy.TOKENS)


def masked(text, kinds=ALL):
    return privacy.mask(filters.normalise(text)[0], kinds)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("電話：０３－１２３４－５６７８まで", "電話：<PHONE>まで"),
        ("（03）1234-5678", "<PHONE>"),
        ("携帯は09012345678です", "携帯は<PHONE>です"),
        ("+81-3-1234-5678", "<PHONE>"),
        ("フリーダイヤル0120-123-456", "フリーダイヤル<PHONE>"),
        ("〒100-0001 東京都千代田区", "〒<POSTAL> 東京都千代田区"),
        ("普通預金 1234567", "普通預金 <ACCOUNT>"),
        ("記号12345 番号1234567", "記号<ACCOUNT> 番号<ACCOUNT>"),
        ("証券番号：AB-1234567", "証券番号：<POLICY>"),
        ("マイナンバー：123456789018", "マイナンバー：<MYNUMBER>"),
        ("カード番号4111 1111 1111 1111", "カード番号<CARD>"),
        ("連絡先 taro.yamada@example.co.jp", "連絡先 <EMAIL>"),
    ],
)
def test_personal_data_becomes_a_typed_token(raw, clean):
    text, counts = masked(raw)
    assert text == clean
    assert counts.total() == clean.count("<")


@pytest.mark.parametrize(
    "text",
    [
        "売上高120304567890円",
        "売上高は120304567890円、営業利益は12304567890円であった。",
        "基準価額の騰落率0.0012345678",
        "法人番号1234567890123",
        "普通預金残高1234567円",
        "口座数 1234567",
        "当座比率 123456%",
        "2026-11-22から2027-03-31まで",
        "ISBN 978-4-12-345678-9",
        "マイナンバー：123456789012",  # its check digit is wrong
        "カード番号4111 1111 1111 1112",
        "管理番号 09012345678",
        "証券番号は保険証券に記載しています",
        "型番 123-4567",
        "損益 -1234567890",
    ],
)
def test_figures_stay_untouched(text):
    assert masked(text) == (filters.normalise(text)[0], {})


def test_only_the_kinds_asked_for_are_masked_and_unknown_ones_are_named():
    assert masked("a@example.jp 03-1234-5678", ("email",))[0] == "<EMAIL> 03-1234-5678"
    assert masked("a@example.jp", ())[0] == "a@example.jp"
    with pytest.raises(ValueError, match=r"unknown kinds of personal data \['fax'\]"):
        privacy.mask("", ("fax",))


def test_check_digits():
    assert privacy.my_number_checks("123456789018") and not privacy.my_number_checks("123456789012")
    assert privacy.luhn_checks("4111111111111111") and not privacy.luhn_checks("4111111111111112")
    for seed in range(50):  # exactly one last digit fits
        head = "".join(random.Random(seed).choices("0123456789", k=11))
        assert sum(privacy.my_number_checks(head + str(digit)) for digit in range(10)) == 1


def digits(rng, count):
    return "".join(rng.choices("0123456789", k=count))


def with_check(rng, head, length, check):
    """`head` filled up with random digits to `length`, the last of which makes `check` true."""
    body = head + digits(rng, length - 1 - len(head))
    return next(body + str(last) for last in range(10) if check(body + str(last)))


def planted(rng):
    """One personal datum (kind, text, the string that must go) in a sentence of its kind."""
    first = rng.choice("123456789")
    mobile = rng.choice(["070", "080", "090"]) + "-" + first + digits(rng, 3) + "-" + digits(rng, 4)
    land = rng.choice([f"0{first}-{first}{digits(rng, 3)}-{digits(rng, 4)}",
                       f"0{first}2-{first}{digits(rng, 2)}-{digits(rng, 4)}",
                       f"0{first}63-{first}{digits(rng, 1)}-{digits(rng, 4)}"])  # fmt: skip
    card = with_check(rng, rng.choice(["4", "52", "35"]), 16, privacy.luhn_checks)
    grouped = "-".join(card[i : i + 4] for i in range(0, 16, 4))
    number = with_check(rng, "", 12, privacy.my_number_checks)
    wide = str.maketrans("0123456789-", "０１２３４５６７８９－")
    name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7))
    return rng.choice(
        [
            ("phone", f"ご不明な点は{rng.choice([mobile, land])}までお電話ください。"),
            ("phone", f"TEL：{rng.choice([mobile, land]).translate(wide)}"),
            ("phone", f"担当の携帯電話{mobile.replace('-', '')}へご連絡ください。"),
            ("phone", f"電話番号は{land.replace('-', '')}です。"),
            ("phone", f"Tel +81-{land[1:]} (代表)"),
            ("postal_code", f"〒{digits(rng, 3)}-{digits(rng, 4)} 大阪府大阪市"),
            ("postal_code", f"郵便番号：{digits(rng, 7)}"),
            ("postal_code", f"住所は{digits(rng, 3)}-{digits(rng, 4)} 東京都港区です。"),
            ("account", f"振込先は普通預金 {digits(rng, 7)} です。"),
            ("account", f"口座番号：{digits(rng, 7)}"),
            ("account", f"当座預金の口座番号は{digits(rng, 7)}、名義は田中"),
            ("policy_number", f"証券番号 {digits(rng, 3)}-{digits(rng, 7)} のご契約"),
            ("policy_number", f"保険証券番号：{rng.choice('ABCDEF')}{digits(rng, 9)}"),
            ("policy_number", f"契約番号は{digits(rng, 10)}です。"),
            ("my_number", f"マイナンバー：{number}"),
            ("my_number", f"個人番号は{number[:4]} {number[4:8]} {number[8:]}です。"),
            ("email", f"{name}.{digits(rng, 2)}@example.co.jp までご連絡ください。"),
            ("email", f"メール：{name}@mail.example.jp"),
            ("card", f"クレジットカード番号 {card} を控えた。"),
            ("card", f"カードは{grouped}でした。"),
        ]
    )


def look_alike(rng):
    """Figures, codes and dates of finance text with the shapes of personal data."""
    first = rng.choice("123456789")
    return rng.choice(
        [
            f"売上高{first}{digits(rng, 11)}円",
            f"当期純利益は{first}{digits(rng, 9)}円であった。",
            f"純資産総額 {first}{digits(rng, 10)}円",
            f"利回り0.{digits(rng, 10)}",
            f"騰落率は-0.{digits(rng, 9)}%",
            f"普通預金残高{first}{digits(rng, 6)}円",
            f"定期預金{first}{digits(rng, 6)}千円",
            f"口座数は{first}{digits(rng, 6)}",
            f"契約件数{first}{digits(rng, 6)}件",
            f"法人番号{first}{digits(rng, 12)}",
            f"EDINETコード E{digits(rng, 5)}、証券コード{first}{digits(rng, 3)}",
            f"20{digits(rng, 2)}-0{first}-1{digits(rng, 1)}から施行",
            f"発行済株式総数{first}{digits(rng, 8)}株",
            f"ISIN JP{digits(rng, 10)}",
            f"型番 {digits(rng, 3)}-{digits(rng, 4)}",
            f"取引ID {digits(rng, 16)}",
            f"約定代金1,{digits(rng, 3)},{digits(rng, 3)},{digits(rng, 3)}円",
            f"第{first}{digits(rng, 2)}-{digits(rng, 4)}号",
            f"管理番号 090{first}{digits(rng, 7)}",
            f"為替 1ドル=1{digits(rng, 2)}.{digits(rng, 8)}円",
            f"伝票番号 {digits(rng, 12)}",
            f"証券コード {first}{digits(rng, 3)}-{digits(rng, 1)}",
        ]
    )


def test_of_300_planted_strings_and_300_figures_the_right_ones_are_masked():
    rng = random.Random(7)
    missed, wrong = [], []
    for _ in range(300):
        kind, text = planted(rng)
        out, counts = masked(text)
        if not counts[kind] or re.search(r"\d{4,}|@", re.sub(r"<[A-Z]+>", "", out)):
            missed.append((kind, text, out))
        figure = look_alike(rng)
        if masked(figure)[1]:
            wrong.append((figure, masked(figure)[0]))
    assert len(missed) <= 0.02 * 300, missed
    assert len(wrong) <= 0.005 * 300, wrong
