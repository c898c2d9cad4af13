"""Which encoding Japanese bytes are in, or a clear refusal: never mojibake.

UTF-8 is certain where it decodes; CP932 and EUC-JP need evidence (enough Japanese characters, and of the usual kind).
"""

import codecs
import re

EVIDENCE = 8  # Japanese characters below which CP932 and EUC-JP are not told apart from noise
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_ISO2022 = re.compile(rb"\x1b\$[@B]|\x1b\(J")
# What Japanese text is made of, and what the wrong one of the two encodings makes of it.
_USUAL = re.compile("[\u3041-\u3096\u30a1-\u30fc、。「」・（）\uff10-\uff5a]")
_KANJI = re.compile("[\u4e00-\u9fff]")
_ODD = re.compile("[\uff61-\uff9f\ue000-\uf8ff\u2500-\u257f\u0370-\u04ff\x80-\x9f]")
# UTF-8 that was read as CP932, Latin-1 or CP1252 and stored so: the lead bytes E3..E9 and the continuation 80..83 of kana.
_MOJIBAKE = re.compile(
    "縺[\u3040-\u9fff\uff61-\uff9f]|繧[\u3040-\u9fff\uff61-\uff9f]|ã[\x80-\x83€‚ƒ\xa0]|[å-é][\x80-\xbf][\x80-\xbf]"
)


def detect(data: bytes, *, partial: bool = False) -> str:
    """The name of the encoding of `data`; `partial` says that it may end within a character.

    Raises ValueError where no encoding fits, or too little speaks for one.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name
    if _ISO2022.search(data):
        return "iso2022_jp"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=not partial)
        return "utf-8"
    except UnicodeDecodeError as error:
        where = error.start
    scores = {name: score for name in ("cp932", "euc_jp") if (score := _score(data, name, partial)) is not None}
    best = max(scores, key=scores.get, default=None)
    if best is None or scores[best] < EVIDENCE or list(scores.values()).count(scores[best]) > 1:
        raise ValueError(f"byte {where} is not utf-8; convert the file to UTF-8 (neither CP932 nor EUC-JP is certain)")
    return best


def _score(data: bytes, encoding: str, partial: bool) -> float | None:
    """How Japanese the decoded text looks, in characters; None where it does not decode."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=not partial)
    except UnicodeDecodeError:
        return None
    usual, kanji, odd = (len(pattern.findall(text)) for pattern in (_USUAL, _KANJI, _ODD))
    return usual + kanji / 2 - 2 * odd


def damage(text: str) -> str | None:
    """What shows that `text` was already broken when it was stored, or None."""
    if "\0" in text:
        return "NUL characters: a binary file, or UTF-16 without its mark"
    if text.count("\ufffd") * 100 > len(text):
        return "more than one character in a hundred is U+FFFD: it was decoded wrongly before"
    if len(_MOJIBAKE.findall(text)) * 20 > len(text):
        return "mojibake: UTF-8 that was read as another encoding before"
    return None
