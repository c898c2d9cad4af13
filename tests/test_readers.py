"""Readers: every kind of file, and every kind of damage. Nothing is lost silently, nothing becomes mojibake."""

import codecs
import csv
import functools
import gzip
import io
import json
import os
import random
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swallow_jax.data import encodings, readers
from swallow_jax.data.readers import Failure, How, Piece

TEXT = "終身保険は、一生涯の死亡保障が続く保険です。早い時期に解約すると、解約返戻金は払い込んだ保険料の総額を下回ります。"
HOW = How(columns={}, extract="whole", max_bytes=1 << 20)


def how(**columns):
    return How(columns=columns, extract="whole", max_bytes=1 << 20)


def read(path, chosen=HOW):
    return list(readers.read(Piece(path=path, name=path.name), chosen))


def texts(path, chosen=HOW):
    return [row["text"] for row in read(path, chosen)]


def kinds(path, chosen=HOW):
    return [row.kind if isinstance(row, Failure) else "ok" for row in read(path, chosen)]


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def pdf(text, *, password=None):
    """A PDF whose text is read back: a font with a map to Unicode."""
    import pypdf
    from pypdf.generic import ArrayObject, DecodedStreamObject, DictionaryObject, NameObject, NumberObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(600, 800)
    codes = "".join(f"<{ord(char):04X}> <{ord(char):04X}>\n" for char in sorted(set(text)))
    unicode = DecodedStreamObject()
    unicode.set_data(
        f"/CIDInit /ProcSet findresource begin 12 dict begin begincmap 1 begincodespacerange <0000> <FFFF> endcodespacerange\n"
        f"{len(set(text))} beginbfchar\n{codes}endbfchar endcmap end end".encode()
    )
    child = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/CIDFontType2"),
                              NameObject("/BaseFont"): NameObject("/None"), NameObject("/DW"): NumberObject(1000)})  # fmt: skip
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type0"),
                             NameObject("/BaseFont"): NameObject("/None"), NameObject("/Encoding"): NameObject("/Identity-H"),
                             NameObject("/DescendantFonts"): ArrayObject([writer._add_object(child)]),
                             NameObject("/ToUnicode"): writer._add_object(unicode)})  # fmt: skip
    content = DecodedStreamObject()
    content.set_data(f"BT /F1 12 Tf 20 700 Td <{text.encode('utf-16-be').hex()}> Tj ET".encode())
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): writer._add_object(font)})}
    )
    page[NameObject("/Contents")] = writer._add_object(content)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def excel(path, rows):
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


# Each kind


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932", "euc_jp", "iso2022_jp"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".html"])
def test_japanese_is_read_in_whatever_encoding_it_is_kept(tmp_path, encoding, suffix):
    body = {".txt": TEXT, ".csv": f"text\n{TEXT}\n", ".html": f"<p>{TEXT}</p>"}[suffix]
    assert texts(put(tmp_path / f"a{suffix}", body.encode(encoding))) == [TEXT]


def test_vendor_characters_of_cp932_survive(tmp_path):
    line = "㈱山田は①～⑳の約款を№１として髙橋と﨑が確かめました。"
    assert texts(put(tmp_path / "a.txt", line.encode("cp932"))) == [line]


@pytest.mark.parametrize("encoding", ["utf-8", "cp932", "euc_jp"])
def test_json_lines_are_read_in_their_encoding(tmp_path, encoding):
    rows = [{"id": str(i), "text": TEXT} for i in range(3)]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)
    assert texts(put(tmp_path / "a.jsonl", data)) == [TEXT] * 3


def test_an_uncertain_encoding_is_refused_with_the_remedy(tmp_path):
    (failure,) = read(put(tmp_path / "a.txt", "保険".encode("cp932")))
    assert failure.kind == "encoding" and "convert the file to UTF-8" in failure.words
    assert kinds(put(tmp_path / "b.txt", bytes(range(128, 256)) * 3)) == ["encoding"]


@pytest.mark.parametrize(
    "broken",
    [
        TEXT.encode().decode("cp932", "replace"),
        TEXT.encode().decode("latin-1"),
        TEXT.encode().decode("cp1252", "replace"),
        TEXT.encode("euc_jp").decode("utf-8", "replace"),
        TEXT[:20] + "\0" + TEXT,
    ],
)
def test_text_that_was_broken_before_is_refused_not_learned(tmp_path, broken):
    assert kinds(put(tmp_path / "a.jsonl", json.dumps({"text": broken}) + "\n")) == ["mojibake"]
    assert encodings.damage(TEXT) is None


def test_the_encoding_an_html_page_claims_is_not_believed_where_it_lies(tmp_path):
    page = f'<html><meta charset="utf-8"><p>{TEXT}</p>'
    assert texts(put(tmp_path / "a.html", page.encode("cp932"))) == [TEXT]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_packed_json_lines(tmp_path, suffix):
    import zstandard

    data = (json.dumps({"text": TEXT}) + "\n").encode() * 3
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    assert texts(put(tmp_path / f"a.jsonl{suffix}", pack(data))) == [TEXT] * 3


def test_parquet_is_read_whole_and_by_row_groups(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"body": [f"{TEXT}{i}" for i in range(10)], "when": [None] * 10})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    chosen = how(text="body", retrieved_at="when")
    whole = read(tmp_path / "a.parquet", chosen)
    parts = readers.pieces(tmp_path / "a.parquet", "a.parquet", 400)
    assert len(parts) > 1
    assert [row for part in parts for row in readers.read(part, chosen)] == whole
    assert [row["default_id"] for row in whole] == [f"a.parquet#{i}" for i in range(1, 11)]


def test_call_logs_become_one_document_a_conversation(tmp_path):
    rows = [["通話ID", "話者", "発話", "時刻"], ["1", "募集人", "こんにちは。\n本日は、", "9:00"],
            ["1", "お客様", "はい。", "9:01"], ["2", "募集人", "もしもし。", "9:05"]]  # fmt: skip
    chosen = how(text="発話", conversation="通話ID", speaker="話者", retrieved_at="時刻")
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    expected = [("1", "募集人：こんにちは。\n本日は、\nお客様：はい。", "9:00"), ("2", "募集人：もしもし。", "9:05")]
    for path in (put(tmp_path / "a.csv", out.getvalue().encode("cp932")), excel(tmp_path / "a.xlsx", rows)):
        assert [(row["id"], row["text"], row["retrieved_at"]) for row in read(path, chosen)] == expected


def test_edinet_csv_gives_the_text_blocks_of_a_filing(tmp_path):
    rows = [
        ["要素ID", "項目名", "コンテキストID", "値"],
        ["jpcrp_cor:NetSales", "売上高", "Current", "120304567890"],
        ["jpcrp_cor:BusinessRisksTextBlock", "事業等のリスク [テキストブロック]", "Current", TEXT],
    ]
    data = "\r\n".join("\t".join(f'"{cell}"' for cell in row) for row in rows).encode("utf-16")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("XBRL_TO_CSV/jpcrp030000.csv", data)
    assert texts(put(tmp_path / "a.csv", data)) == texts(tmp_path / "a.zip") == [f"事業等のリスク\n{TEXT}"]


def test_a_law_becomes_lines_with_its_article_numbers(tmp_path):
    law = """<Law><LawBody><LawTitle>保険業法</LawTitle><MainProvision><Chapter><ChapterTitle>第一章　総則</ChapterTitle>
      <Article><ArticleCaption>（目的）</ArticleCaption><ArticleTitle>第一条</ArticleTitle><Paragraph><ParagraphNum/>
      <ParagraphSentence><Sentence>この法律は、保険業の公共性にかんがみ。</Sentence></ParagraphSentence>
      <Item><ItemTitle>一</ItemTitle><ItemSentence><Sentence>契約者の保護</Sentence></ItemSentence></Item>
      </Paragraph></Article></Chapter></MainProvision></LawBody></Law>"""
    expected = ["保険業法", "第一章　総則", "（目的）", "第一条　この法律は、保険業の公共性にかんがみ。", "一　契約者の保護"]
    assert texts(put(tmp_path / "a.xml", law))[0].split("\n") == expected
    assert kinds(put(tmp_path / "b.xml", "<html/>")) == ["not_xml"]


def test_pdf_text_and_what_hides_it(tmp_path):
    import pypdf

    assert texts(put(tmp_path / "a.pdf", pdf(TEXT)))[0].strip() == TEXT
    assert kinds(put(tmp_path / "b.pdf", pdf(TEXT, password="secret"))) == ["encrypted"]
    writer, out = pypdf.PdfWriter(), io.BytesIO()
    writer.add_blank_page(100, 100)
    writer.write(out)
    (failure,) = read(put(tmp_path / "c.pdf", out.getvalue()))
    assert failure.kind == "no_text" and "OCR" in failure.words


def test_the_article_of_a_page_without_what_surrounds_it(tmp_path):
    menu = "<div class='menu'><a href='/'>ホーム</a><a href='/a'>商品一覧</a></div>"
    page = f"<html><body>{menu}<article><h1>終身保険</h1><p>{TEXT * 3}</p></article></body></html>"
    (text,) = texts(put(tmp_path / "a.html", page), How(columns={}, extract="article", max_bytes=1 << 20))
    assert TEXT in text and "商品一覧" not in text


def test_dialogues_without_a_text_become_lines(tmp_path):
    row = {"turns": [{"speaker": "募集人", "text": "はい。"}, {"speaker": None, "text": "ええ。"}]}
    assert texts(put(tmp_path / "a.jsonl", json.dumps(row))) == ["募集人：はい。\nええ。"]


# Pieces


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["", "あ", TEXT, TEXT * 5, "x" * 200]), min_size=1, max_size=30),
    st.integers(20, 2000),
    st.booleans(),
)
def test_pieces_of_a_line_file_are_the_file(lines, target, ends):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"pieces-{os.getpid()}.jsonl"
    data = "\n".join(json.dumps({"text": line}, ensure_ascii=False) if line else "" for line in lines) + ("\n" if ends else "")
    put(path, data)
    whole = read(path)
    parts = readers.pieces(path, path.name, target)
    found = [row for part in parts for row in readers.read(part, HOW)]
    path.unlink()
    if any(lines):
        assert [row for row in found if not isinstance(row, Failure)] == whole


# Damage


def test_a_200_mb_line_fails_alone_and_is_never_held(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    good = (json.dumps({"text": TEXT}) + "\n").encode()
    with path.open("wb") as file:
        file.write(good + b'{"text": "')
        for _ in range(200):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n' + good)
    tracemalloc.start()
    assert kinds(path) == ["ok", "too_long", "ok"]
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert kinds(path.rename(tmp_path / "a.csv")) in (["no_text"], ["too_long"])


def test_bombs_are_stopped(tmp_path):
    zeros = b"0" * (70 << 20)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(zeros)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", b"text\n" + zeros)
    with zipfile.ZipFile(tmp_path / "c.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", zeros)
    for name in ("a.jsonl.gz", "b.zip", "c.xlsx"):
        found = kinds(tmp_path / name, How(columns={}, extract="whole", max_bytes=1 << 30))
        assert found == ["bomb"], name


def test_links_that_lead_in_a_circle_or_nowhere(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    assert [kinds(tmp_path / name) for name in ("a.jsonl", "c.txt")] == [["unreadable"]] * 2


def test_an_encrypted_archive_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # the flag of encryption, in the local header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert kinds(put(tmp_path / "a.zip", bytes(data))) == ["encrypted"]


@functools.cache
def seeds():
    """A good file of each kind: (suffix, bytes, how to read it, documents in it)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = "".join(json.dumps({"id": "same", "text": f"{TEXT}{i}"}, ensure_ascii=False) + "\n" for i in range(4)).encode()
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [TEXT] * 4}), out)
    sheet, archive = io.BytesIO(), io.BytesIO()
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text"], *[[TEXT]] * 4):
        book.active.append(row)
    book.save(sheet)
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(4):
            file.writestr(f"{i}.txt", TEXT)
    table = "text,id\n" + f'"{TEXT}",a\n' * 4
    return [
        (".jsonl", lines, 4),
        (".jsonl.gz", gzip.compress(lines), 4),
        (".jsonl.zst", zstandard.ZstdCompressor().compress(lines), 4),
        (".parquet", out.getvalue(), 4),
        (".csv", table.encode("cp932"), 4),
        (".tsv", table.replace(",", "\t").encode("utf-16"), 4),
        (".xlsx", sheet.getvalue(), 4),
        (".txt", TEXT.encode("euc_jp"), 1),
        (".html", f"<html><body><p>{TEXT}</p></body></html>".encode(), 1),
        (".xml", f"<Law><LawTitle>法</LawTitle><Sentence>{TEXT}</Sentence></Law>".encode(), 1),
        (".pdf", pdf(TEXT), 1),
        (".zip", archive.getvalue(), 4),
        (".1", f".SH 名前\n{TEXT}\n".encode(), 1),
    ]


def _damaged(data, kind, rng):
    """One of the ways in which files arrive broken."""
    place = rng.randrange(len(data) + 1)
    if kind == "cut":
        return data[:place]
    if kind == "nul":
        return data[:place] + b"\0" * rng.choice([1, 3, 1000]) + data[place:]
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 5, 50])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == "noise":
        return rng.randbytes(rng.choice([1, 50, 5000]))
    if kind == "encoding":
        return (
            data[:place]
            + rng.choice([b"\xff\xfe", b"\x82\xa0" * 20, "縺ゅ".encode(), codecs.BOM_UTF16_BE, b"\xe3\x81"])
            + data[place:]
        )
    if kind == "twice":
        return data + data
    if kind == "swapped":
        return zlib.compress(data)
    return b""


@pytest.mark.parametrize("number", range(13))
def test_the_good_files_are_good(tmp_path, number):
    suffix, data, count = seeds()[number]
    assert kinds(put(tmp_path / f"a{suffix}", data)) == ["ok"] * count


@settings(max_examples=1300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    number=st.integers(0, 12),
    kind=st.sampled_from(["cut", "nul", "flip", "noise", "encoding", "twice", "swapped", "empty"]),
    seed=st.integers(0, 2**32),
)
@example(number=3, kind="cut", seed=0)
def test_a_damaged_file_gives_documents_and_failures_with_reasons_and_nothing_else(tmp_path_factory, number, kind, seed):
    """1,300 files: reading never raises, never hangs, and every failure says where, what kind, and what to do."""
    suffix, data, count = seeds()[number]
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    put(path, _damaged(data, kind, random.Random(seed)))
    found = read(path)
    assert found, "a file must give a document or say why not"
    for row in found:
        if isinstance(row, Failure):
            assert row.where.startswith(str(path)) and row.kind and len(row.words) > 10
        else:
            assert isinstance(row["text"], str) and row["default_id"] and encodings.damage(row["text"]) is None
            row["text"].encode()
    assert sum(not isinstance(row, Failure) for row in found) <= 2 * count + 1  # none from nothing (a second header is a row)
