"""Marked-up pages to readable text, one paragraph a line: HTML, manual pages, the XML of Japanese laws."""

import html.parser
import re
from xml.etree import ElementTree

# HTML

_DROPPED = frozenset(
    ("script", "style", "nav", "header", "footer", "aside", "noscript", "button", "select", "svg", "head", "template", "iframe")
)
_BLOCKS = frozenset(
    ("p", "div", "br", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ul", "ol", "dl", "dt", "dd", "table", "tr", "thead", "tbody")
    + ("td", "th", "caption", "pre", "blockquote", "section", "article", "main", "body", "figure", "figcaption", "hr", "form")
    + ("fieldset", "details", "summary", "address")
)
_JAPANESE = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_JOIN = re.compile(rf"(?<=[{_JAPANESE}])[ \t\r\n]*\n[ \t\r\n]*(?=[{_JAPANESE}])")


class _TextOf(html.parser.HTMLParser):
    """Collects text outside dropped elements, one paragraph for each block element."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._parts: list[str] = []
        self._dropped: list[str] = []  # open dropped elements
        self._pre = 0

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            self._dropped.clear()  # </head> may be left out
        if tag in _DROPPED:
            self._dropped.append(tag)
        elif tag in _BLOCKS:
            self._break()
            self._pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in self._dropped:
            # An unclosed <nav> inside must not swallow the page: close up to the matching one.
            while self._dropped.pop() != tag:
                pass
        elif tag in _BLOCKS:
            self._break()
            self._pre -= tag == "pre" and self._pre > 0

    def handle_startendtag(self, tag, attrs):
        if tag in _BLOCKS:
            self._break()

    def handle_data(self, data):
        if not self._dropped and data != "¶":  # Sphinx's link to a heading
            self._parts.append(data)

    def _break(self):
        text = "".join(self._parts)
        self._parts.clear()
        if not self._pre:
            # A line break in the source is no space between two Japanese characters.
            text = re.sub(r"[ \t\r\n\f\v]+", " ", _JOIN.sub("", text))
        if text.strip():
            self.paragraphs.append(text.strip())

    def close(self):
        super().close()
        self._break()


def html_text(page: str) -> str:
    """Readable text of an HTML page: block elements become lines; scripts, navigation and the head are dropped."""
    parser = _TextOf()
    parser.feed(page)
    parser.close()
    return "\n".join(parser.paragraphs)


# Manual pages

_FONTS = re.compile(r"[.'](?:B|I|R|BR|BI|RB|RI|IR|IB|SM|SB)\s+(.*)")
_HEADS = re.compile(r"[.'](?:SH|SS|Sh|Ss)\s+(.*)")
_ESCAPES = (
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^,/:%)!c]|\\\*\(..|\\\*.|\\\".*"), ""),
    (re.compile(r"\\\(bu|\\\[bu\]"), "・"),
    (re.compile(r"\\\(em|\\\(en|\\\[e[mn]\]"), "-"),
    (re.compile(r"\\\((?:[lr]q|aq|dq)|\\\[(?:[lr]q|aq|dq)\]"), '"'),
    (re.compile(r"\\\(..|\\\[[^]]*\]|\\[nhvwkz](?:\(..|'[^']*'|.)"), ""),
    (re.compile(r"\\[~0 ]"), " "),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
)


def roff_text(page: str) -> str:
    """Readable text of a manual page (man macros): headings and paragraphs become lines, unfilled text (code) is dropped."""
    paragraphs: list[list[str]] = [[]]
    filling = True
    for line in page.splitlines():
        if line[:1] not in (".", "'"):
            if filling:
                paragraphs[-1].append(line)
            if not line.strip():
                paragraphs.append([])
            continue
        macro = line[1:].split(maxsplit=1)[0] if line[1:].strip() else ""
        if macro in ("nf", "EX"):
            filling = False
        elif macro in ("fi", "EE"):
            filling = True
        if found := _FONTS.match(line):
            if filling:
                words = re.findall(r'"([^"]*)"|(\S+)', found[1])
                glue = " " if len(macro) == 1 or macro == "SM" else ""  # BR, IR ... join what they alternate
                paragraphs[-1].append(glue.join(quoted or word for quoted, word in words))
        elif found := _HEADS.match(line):
            paragraphs += [[found[1].strip('"')], []]
        elif macro not in ("ft", "ad", "hy", "ne", "ie", "el", "if") and not macro.startswith('\\"'):
            paragraphs.append([])
    lines = (_JOIN.sub("", "\n".join(parts)) for parts in paragraphs)
    lines = (re.sub(r"\s+", " ", _unescape(line)).strip() for line in lines)
    return "\n".join(line for line in lines if line)


def _unescape(text: str) -> str:
    for pattern, to in _ESCAPES:
        text = pattern.sub(to, text)
    return text


# Laws


def law_text(data: bytes) -> str:
    """Readable text of a law in e-Gov's XML: title, chapter and article headings, one line a sentence or item.

    Raises ValueError where the data is no XML or no law. (Expat refuses entity bombs by itself since 2.4.1.)
    """
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML ({error})") from error
    if root.tag != "Law" and root.find(".//Law") is None:
        raise ValueError(f"no law of e-Gov: the root is <{root.tag}>")
    lines: list[str] = []
    wanted = ("LawTitle", "PartTitle", "ChapterTitle", "SectionTitle", "SubsectionTitle", "ArticleCaption", "SupplProvisionLabel")
    glue = ""  # an article's number stands before its first sentence, as in print
    for element in root.iter():
        if element.tag in wanted or element.tag == "Sentence":
            words = glue + "".join(element.itertext()).strip()
            glue = ""
            if words:
                lines.append(words)
        elif element.tag == "ArticleTitle" or (element.tag.endswith("Title") and element.tag.startswith(("Item", "Subitem"))):
            glue = "".join(element.itertext()).strip() + "\u3000"
        elif element.tag == "ParagraphNum" and (number := "".join(element.itertext()).strip()):
            glue += number + "\u3000"
    return "\n".join(lines)


def article_text(page: str) -> str:
    """The main text of an HTML page, without what surrounds it (trafilatura; extra `data`)."""
    try:
        import trafilatura
    except ImportError as error:
        raise ValueError("extract: article needs trafilatura; pip install 'swallow_jax[data]'") from error
    return trafilatura.extract(page, include_comments=False, include_tables=True, favor_recall=True) or ""
