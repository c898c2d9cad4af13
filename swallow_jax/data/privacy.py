"""Personal data in Japanese text: found by digit boundaries and context, masked with typed tokens; figures stay untouched.

A number alone says little: 売上高120304567890円 holds twelve digits and no telephone number. So a candidate must stand
free (no digit, decimal point or thousands comma beside it, no unit after it) and have the shape its kind prescribes; where
the shape is common, a word nearby must name the kind, and check digits must agree.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

TOKENS = {
    "email": "<EMAIL>",
    "card": "<CARD>",
    "my_number": "<MYNUMBER>",
    "phone": "<PHONE>",
    "postal_code": "<POSTAL>",
    "account": "<ACCOUNT>",
    "policy_number": "<POLICY>",
}

# Nothing before it that makes it part of a figure or a code. It stands after the first character of a pattern: a search that
# begins with a set of characters runs at the speed of C, one that begins with looking back does not.
_FREE = r"(?<![0-9A-Za-z].)(?<![0-9][.,\-].)(?<![¥$€£].)"
_UNIT = (
    r"円|万|億|兆|千|百万|ドル|ユーロ|元\b|%|％|‰|株|口(?!座)|件|名(?!義)|人|社|個|台|回|年|月|日|時|分|秒|歳|点|倍|ポイント|"
    r"頁|ページ|kg|km|m2|㎡|トン|bp"
)
_END = rf"(?![0-9A-Za-z])(?![.,\-][0-9])(?!\s?(?:{_UNIT}))"  # and nothing after it
_DASH = r"[-‐‑‒–—―−ー－]"
_LABEL = r"\s*(?:[:：は=＝]|です|が|/|／|\(|（|「|\t)?\s*"  # between a word and the number it names

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}(?![A-Za-z0-9])"
)

# Area code and the rest have ten digits in land lines (0A-BCDE-FGHJ ... 0ABCD-E-FGHJ), eleven in mobile and IP telephony.
_SHAPES = {10: ((2, 4, 4), (3, 3, 4), (4, 2, 4), (5, 1, 4)), 11: ((3, 4, 4),)}
_SERVICE = ("0120", "0570", "0990", "0180", "0170", "0800")
_PHONE = re.compile(
    rf"[+(（0]{_FREE}(?:(?<=\+)81[-\s]?\(?0?\)?|(?<=[(（])0|(?<=0))\d{{1,4}}(?:[)）]|{_DASH}|[ ]|[)）]{_DASH})?"
    rf"[(（]?\d{{1,4}}(?:[)）]|{_DASH}|[ ])\d{{3,4}}{_END}"
)
_PHONE_BARE = re.compile(rf"0{_FREE}\d{{9,10}}{_END}")
_PHONE_WORD = re.compile(
    r"(?:電話|でんわ|TEL|Tel|tel|℡|☎|FAX|Fax|fax|ファックス|ファクス|ファクシミリ|携帯|ケータイ|スマホ|連絡先|フリーダイヤル|ダイヤル|直通|内線|お問い?合わせ|問合せ)"
)
_CALL = re.compile(r"\s*(?:まで|へ|に|宛)?(?:お|ご)?(?:電話|連絡|かけ|架電|お掛け|問い?合わせ)")
_CODE_WORD = re.compile(r"(?:番号|コード|ID|No\.?|№|型番|品番|伝票|管理|整理|JAN|ISBN|バッチ|ロット)\s*[:：は]?\s*$")

_PREFECTURE = (
    r"(?:北海道|東京都|(?:京都|大阪)府|(?:青森|岩手|宮城|秋田|山形|福島|茨城|栃木|群馬|埼玉|千葉|神奈川|新潟|富山|石川|福井|山梨|長野|"
    r"岐阜|静岡|愛知|三重|滋賀|兵庫|奈良|和歌山|鳥取|島根|岡山|広島|山口|徳島|香川|愛媛|高知|福岡|佐賀|長崎|熊本|大分|宮崎|鹿児島|沖縄)県)"
)
_POSTAL = re.compile(
    rf"(?:〒\s*|郵便番号{_LABEL}(?:〒\s*)?)(?P<a>\d{{3}}{_DASH}?\d{{4}}){_END}"
    rf"|(?P<b>\d{_FREE}\d{{2}}{_DASH}\d{{4}})(?=\s*{_PREFECTURE})"
)

_KIND_OF_ACCOUNT = r"(?:普通|当座|貯蓄|総合|定期)(?:預金|貯金)?(?:口座)?(?:番号)?"
_ACCOUNT = re.compile(
    rf"(?:(?:口座|預金)番号|口座\s?(?:No\.?|№|ＮＯ|番号)|振込(?:先)?口座|引落(?:し)?口座|{_KIND_OF_ACCOUNT}){_LABEL}(?P<a>\d{{6,8}}){_END}"
    rf"|記号{_LABEL}(?P<b>\d{{5}}(?:{_DASH}\d)?)[\s、,/]{{0,3}}番号{_LABEL}(?P<c>\d{{1,8}}){_END}"
)
_POLICY = re.compile(
    rf"(?:(?:保険)?証券(?:記号)?番号|証券\s?(?:No\.?|№)|(?:保険)?契約(?:者)?番号|契約\s?(?:No\.?|№)|被保険者番号|被保険者証(?:の)?番号|"
    rf"(?:お客様|顧客|会員|加入者|組合員)番号|ポリシーナンバー){_LABEL}(?P<a>(?=[A-Z0-9\-]*\d{{3}})[A-Z0-9](?:[A-Z0-9]|{_DASH}){{4,18}}[A-Z0-9]){_END}"
)
_MY_NUMBER = re.compile(rf"\d{_FREE}\d{{3}}(?P<gap>[ \-]?)\d{{4}}(?P=gap)\d{{4}}{_END}")
_MY_NUMBER_WORD = re.compile(r"マイナンバー|個人番号|My ?Number", re.I)
_CARD = re.compile(rf"\d{_FREE}(?:\d{{3}}([ \-])\d{{4}}\1\d{{4}}\1\d{{1,4}}|\d{{3}}([ \-])\d{{6}}\2\d{{4,5}}|\d{{13,15}}){_END}")
_CARD_WORD = re.compile(r"カード|クレジット|VISA|Visa|Master|JCB|AMEX|アメックス|ダイナース|card|Card")
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|35|3[47]|3[068]|6[05]")


def mask(text: str, kinds: Iterable[str]) -> tuple[str, Counter]:
    """`text` with the personal data of these kinds replaced by tokens, and how many strings of each kind there were.

    Text is expected as `filters.normalise` leaves it (half-width digits).
    """
    counts: Counter = Counter()
    wanted = set(kinds)
    if unknown := wanted - set(TOKENS):
        raise ValueError(f"unknown kinds of personal data {sorted(unknown)}; known are {sorted(TOKENS)}")
    if not wanted:
        return text, counts
    for kind, find in _FINDERS.items():
        if kind in wanted and (spans := find(text)):
            counts[kind] += len(spans)
            parts, end = [], 0
            for begin, stop in spans:
                parts += [text[end:begin], TOKENS[kind]]
                end = stop
            text = "".join([*parts, text[end:]])
    return text, counts


def _emails(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in _EMAIL.finditer(text)] if "@" in text else []


def _phones(text: str) -> list[tuple[int, int]]:
    spans = []
    for found in _PHONE.finditer(text):
        groups = re.findall(r"\d+", found[0].replace("+81", "0", 1) if found[0].startswith("+81") else found[0])
        if found[0].startswith("+81"):
            groups = _international(groups)
        if _is_phone(groups):
            spans.append(found.span())
    for found in _PHONE_BARE.finditer(text):
        before, after = text[max(0, found.start() - 16) : found.start()], text[found.end() : found.end() + 12]
        called = _PHONE_WORD.search(before) or _CALL.match(after)
        mobile = len(found[0]) == 11 and found[0][:3] in ("070", "080", "090") and found[0][3] != "0"
        if called or (mobile and not _CODE_WORD.search(before)):
            spans.append(found.span())
    return sorted(spans)


def _international(groups: list[str]) -> list[str]:
    """+81-3-1234-5678 comes as 0, 3, 1234, 5678; +81 (0)3 ... with one 0 more."""
    joined = groups[0]
    rest = groups[1:]
    while len(joined) < 2 and rest:
        joined, rest = joined + rest[0].lstrip("0" if joined == "0" else ""), rest[1:]
    return [joined, *rest]


def _is_phone(groups: list[str]) -> bool:
    digits, lengths = "".join(groups), tuple(map(len, groups))
    if digits.startswith(_SERVICE) and len(groups) == 3 and len(groups[0]) == 4:
        return lengths in ((4, 3, 3), (4, 3, 4), (4, 2, 4))
    if len(digits) not in _SHAPES or len(groups) != 3 or lengths not in _SHAPES[len(digits)] or digits[1] == "0":
        return False
    return len(digits) == 10 or digits[:3] in ("020", "050", "060", "070", "080", "090")


def _postal_codes(text: str) -> list[tuple[int, int]]:
    return _groups(_POSTAL, text)


def _accounts(text: str) -> list[tuple[int, int]]:
    return _groups(_ACCOUNT, text)


def _policies(text: str) -> list[tuple[int, int]]:
    named = any(word in text for word in ("番号", "No", "№", "ナンバー"))
    return _groups(_POLICY, text) if named else []


def _groups(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    """Spans of the named groups: the number, without the words that name it."""
    return [found.span(name) for found in pattern.finditer(text) for name in pattern.groupindex if found[name]]


def _my_numbers(text: str) -> list[tuple[int, int]]:
    if not _MY_NUMBER_WORD.search(text):
        return []
    return [
        found.span()
        for found in _MY_NUMBER.finditer(text)
        if _MY_NUMBER_WORD.search(text[max(0, found.start() - 24) : found.start()])
        and my_number_checks(re.sub(r"\D", "", found[0]))
    ]


def my_number_checks(digits: str) -> bool:
    """The last of twelve digits (ordinance No. 85 of 2014, Article 5): weights 2 to 7, 2 to 6 from the right, modulo 11."""
    weighted = sum(int(digit) * (n + 1 if n <= 6 else n - 5) for n, digit in enumerate(reversed(digits[:11]), 1))
    rest = weighted % 11
    return len(digits) == 12 and int(digits[11]) == (0 if rest <= 1 else 11 - rest)


def _cards(text: str) -> list[tuple[int, int]]:
    spans = []
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        grouped = len(digits) < len(found[0])
        near = text[max(0, found.start() - 24) : found.end() + 8]
        if (
            _CARD_PREFIX.match(digits)
            and 14 <= len(digits) <= 16
            and luhn_checks(digits)
            and (grouped or _CARD_WORD.search(near))
        ):
            spans.append(found.span())
    return spans


def luhn_checks(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    doubled = (int(digit) * (1 + n % 2) for n, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


# Longest shapes first: a card must not be taken for an account.
_FINDERS: dict[str, Callable[[str], list[tuple[int, int]]]] = {
    "email": _emails,
    "card": _cards,
    "my_number": _my_numbers,
    "policy_number": _policies,
    "phone": _phones,
    "postal_code": _postal_codes,
    "account": _accounts,
}
