"""Raw files to documents; the domain folder and its licence gate."""

import gzip
import json

import pytest
import yaml

from swallow_jax.data import documents, markup

PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>題</title><script>var x = "悪";</script></head>
<body><nav>目次<ul><li>章</li></ul></nav>
<h1>保険<a class="headerlink" href="#a">¶</a></h1>
<p>終身保険は、一生涯の
   保障が続く<b>保険</b>です。A
   B &amp; C</p>
<ul><li>一つ目</li><li>二つ目</li></ul>
<table><tr><td>料率</td><td>1.5%</td></tr></table>
<pre>x = 1
y = 2</pre>
<footer>フッター</footer></body></html>"""

MANUAL = r""".\" comment
.TH CP 1
.SH 名前
cp \- ファイルを\fBコピー\fRする
.SH 説明
.PP
ディレクトリも
コピーできる。
.BR mv (1)
も見よ。
.nf
cp a b
.fi
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def domain(tmp_path, **changes):
    """A domain folder with one source, of which `changes` replaces fields (None removes one)."""
    source = {
        "id": "s",
        "path": "*.jsonl",
        "licence": "Apache-2.0",
        "attribution": "us",
        "sector": "insurance",
        "allowed_uses": ["training"],
        "profile": "p",
    }
    source = {name: value for name, value in (source | changes).items() if value is not None}
    content = {
        "id": "d",
        "language": "ja",
        "description": "test",
        "replay_share": 0.1,
        "seed_words": ["保険"],
        "profiles": {"p": {"paragraph": {}, "document": {}}},
        "sources": [source],
    }
    write(tmp_path / "domain.yaml", yaml.safe_dump(content, allow_unicode=True))
    return tmp_path


def test_html_becomes_paragraphs_without_navigation_scripts_and_spaces_inside_japanese():
    assert markup.html_text(PAGE).split("\n") == [
        "保険",
        "終身保険は、一生涯の保障が続く保険です。A B & C",
        "一つ目",
        "二つ目",
        "料率",
        "1.5%",
        "x = 1",
        "y = 2",
    ]


def test_html_without_closed_head_or_nav_keeps_its_body():
    assert markup.html_text("<head><title>題</title><body><p>本文</p><div><nav>目次</div><p>a</nav>続き") == "本文\n続き"


def test_manual_page_becomes_paragraphs_without_code():
    assert markup.roff_text(MANUAL).split("\n") == [
        "名前",
        "cp - ファイルをコピーする",
        "説明",
        "ディレクトリもコピーできる。 mv(1) も見よ。",
    ]


def test_rows_keep_their_own_source_and_take_the_given_licence(tmp_path):
    rows = [{"text": "一"}, {"id": "x", "text": "二", "source": "own", "licence": "MIT", "url": "u"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = documents.read(path, source="s", licence="CC0-1.0")
    assert (first["text"], first["source"], first["licence"]) == ("一", "s", "CC0-1.0")
    assert second == {"id": "x", "text": "二", "source": "own", "licence": "MIT", "url": "u"}
    assert first["id"].endswith("a.jsonl#1")


def test_compressed_and_plain_files_give_the_same_document(tmp_path):
    plain = write(tmp_path / "a.html", PAGE)
    packed = tmp_path / "b.html.gz"
    packed.write_bytes(gzip.compress(PAGE.encode()))
    one, two = documents.read([plain, packed], source="s", licence="MIT")
    assert one["text"] == two["text"]
    assert one["id"] != two["id"]


def test_html_in_a_declared_legacy_encoding_is_read(tmp_path):
    path = tmp_path / "a.html"
    path.write_bytes('<html><meta charset="euc-jp"><body>保険料</body></html>'.encode("euc-jp"))
    assert [row["text"] for row in documents.read(path, source="s", licence="MIT")] == ["保険料"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:2: not a JSON object"),
        (b'["a"]', r"a\.jsonl:2: needs a JSON object with a string"),
        (b'{"text": 3}', r"a\.jsonl:2: needs a JSON object with a string"),
        ('{"text": "保険"}'.encode("cp932"), r"a\.jsonl:2: byte 10 is not utf-8; convert"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(documents.read(path, source="s", licence="MIT"))


def test_what_cannot_be_a_corpus_is_refused(tmp_path):
    empty = write(tmp_path / "empty.jsonl", "\n")
    with pytest.raises(ValueError, match="empty corpus"):
        list(documents.read(empty, source="s", licence="MIT"))
    with pytest.raises(ValueError, match='states no "licence"'):
        list(documents.read(write(tmp_path / "a.jsonl", '{"text": "a"}'), source="s"))
    with pytest.raises(ValueError, match="names no source or licence"):
        list(documents.read(write(tmp_path / "a.txt", "a")))
    with pytest.raises(ValueError, match=r"cannot read \.xyz"):
        list(documents.read(write(tmp_path / "a.xyz", "a"), source="s", licence="MIT"))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        list(documents.read(cut, source="s", licence="MIT"))


def test_domain_source_fills_in_what_it_knows(tmp_path):
    folder = domain(tmp_path, url="https://example.org")
    write(folder / "a.jsonl", '{"id": "1", "text": "保険"}\n')
    loaded = documents.load_domain(folder)
    (source,) = loaded.sources
    (file,) = source.files(folder, tmp_path)
    assert list(source.read(file, folder, tmp_path)) == [
        {"id": "1", "text": "保険", "source": "s", "licence": "Apache-2.0", "sector": "insurance", "url": "https://example.org"}
    ]


def test_ids_do_not_depend_on_where_the_place_was_unpacked(tmp_path):
    folder = domain(tmp_path, path=None, place="/usr/share/doc/*.txt")
    (source,) = documents.load_domain(folder).sources
    ids = []
    for root in (tmp_path / "one", tmp_path / "two"):
        (root / "usr/share/doc").mkdir(parents=True)
        write(root / "usr/share/doc/a.txt", "text")
        (file,) = source.files(folder, root)
        ids += [document["id"] for document in source.read(file, folder, root)]
    assert ids == ["s:usr/share/doc/a.txt"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "states no licence"),
        ({"licence": ""}, "states no licence"),
        ({"allowed_uses": ["quotation"]}, "does not contain 'training'"),
        ({"allowed_uses": None}, "missing fields"),
        ({"place": "usr/*"}, "either path"),
        ({"profile": "q"}, "profile 'q' is not among"),
        ({"licences": "MIT"}, "unknown fields"),
    ],
)
def test_licence_gate_and_field_names(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        documents.load_domain(domain(tmp_path, **changes))


def test_a_source_that_is_not_there_is_named(tmp_path):
    folder = domain(tmp_path)
    with pytest.raises(ValueError, match="source s: nothing matches"):
        documents.load_domain(folder).sources[0].files(folder, tmp_path)
