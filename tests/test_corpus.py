"""The corpus as a whole: planted duplicates, leaks and damage are found; quotas, experts and licences have their say."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from configs.prepare import tiny
from experiments import prepare
from swallow_jax import run, text
from swallow_jax.data import corpus, dedup, documents, mixture, shards, staging
from tests.test_prepare import texts_of

ROOT = Path(__file__).parent.parent
KANA = [chr(code) for code in range(0x3041, 0x3094)]
WORDS = [
    "保険",
    "預金",
    "株式",
    "投資",
    "信託",
    "契約",
    "利息",
    "口座",
    "手数料",
    "約款",
    "解約",
    "返戻金",
    "募集人",
    "金利",
    "配当",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def sentence(rng, size=60):
    return "".join(rng.choice(KANA) + (rng.choice(WORDS) if rng.random() < 0.15 else "") for _ in range(size)) + "。"


def document(rng, sentences=6):
    return "\n".join(sentence(rng) for _ in range(sentences))


def config(tmp_path, files, *, sources=None, **domain):
    """A config over a domain folder with these files {name: rows or bytes}; one source a file unless `sources` says otherwise."""
    folder = tmp_path / "domain"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            run.write_jsonl(folder / name, content)
    plain = {"licence": "CC0-1.0", "attribution": "us", "allowed_uses": ["training"], "sector": "other", "profile": "all"}
    sources = sources or [{"id": f"s{i}", "path": name} for i, name in enumerate(files)]
    content = {
        "id": "d",
        "language": "ja",
        "description": "test",
        "replay_share": 0.2,
        "seed_words": ["保険"],
        "profiles": {"all": {"paragraph": {}, "document": {}}},
        "sources": [plain | source for source in sources],
    }
    (folder / "domain.yaml").write_text(yaml.safe_dump(content | domain, allow_unicode=True), encoding="utf-8")
    made = tiny.get_config()
    made.corpus.domains = (str(folder),)
    made.corpus.unique_paragraphs = False
    made.train_tokenizer.texts = ("configs/prepare/tiny_data/paragraphs.jsonl",)
    made.pack.heldout_share = 0.0
    return made


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def dropped(folder):
    return {row["id"]: row["reasons"][0] for row in run.iter_jsonl(folder / "dropped.jsonl")}


def edited(rng, text, wanted):
    """`text` with characters replaced until its Jaccard similarity is just above or below what `wanted` says."""
    characters, places = list(text), [i for i, char in enumerate(text) if char != "\n"]
    low, high = wanted
    step = 3 if low > 0.8 else 8
    while not low <= (similarity := dedup.jaccard(dedup.shingles(text), dedup.shingles("".join(characters)))) <= high:
        if similarity < low:
            characters = list(text)
        for _ in range(step):
            characters[rng.choice(places)] = rng.choice(KANA)
    return "".join(characters)


def test_planted_duplicates_are_found_across_sources_and_similar_documents_stay(tmp_path):
    rng = random.Random(0)
    originals = [document(rng) for _ in range(600)]
    rows = [{"id": f"o{i}", "text": one} for i, one in enumerate(originals)]
    exact = [{"id": f"e{i}", "text": one.replace("。", "．").replace("\n", " ")} for i, one in enumerate(originals[:200])]
    near = [{"id": f"n{i}", "text": edited(rng, one, (0.9, 1))} for i, one in enumerate(originals[200:400])]
    far = [{"id": f"f{i}", "text": edited(rng, one, (0.3, 0.499))} for i, one in enumerate(originals[400:])]
    near = [row | {"text": row["text"][:-1] + "！"} for row in near]  # never the very same characters
    made = config(tmp_path, {"a.jsonl": rows, "b.jsonl": exact + near + far})
    result = prepare.main(made, tmp_path / "run")
    found = dropped(tmp_path / "run")
    assert sum(found.get(f"e{i}") == "exact_duplicate" for i in range(200)) == 200
    assert sum(f"n{i}" in found for i in range(200)) >= 0.92 * 200
    assert sum(f"f{i}" in found for i in range(200)) <= 0.01 * 200
    assert not any(name.startswith("o") for name in found)  # the first of its kind stays
    assert result["documents_in"] == result["kept"] + sum(result["dropped_by_reason"].values()) == 1200


def test_100_leaks_in_four_disguises_are_dropped_and_listed(tmp_path):
    rng = random.Random(1)
    conversations = [
        {"conversation_id": f"c{i}", "turns": [{"speaker": "募集人", "text": sentence(rng, 40)}], "labels": [], "evidence": []}
        for i in range(100)
    ]
    run.write_jsonl(tmp_path / "test.jsonl", conversations)
    wide = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
    rows = [{"id": f"clean{i}", "text": document(rng)} for i in range(100)]
    for i, conversation in enumerate(conversations):
        told = conversation["turns"][0]["text"]
        disguise = [
            f"{sentence(rng)}担当者は「{told[3:30]}」と述べた。{sentence(rng)}",  # quoted in part within a line
            "\n".join(told[k : k + 7] for k in range(0, len(told), 7)) + "\n" + sentence(rng),  # broken into lines
            sentence(rng) + " ・".join(told).translate(wide),  # spaced and dotted, full width
            f"{sentence(rng)}\n{edited(rng, told, (0.5, 0.75))}",  # a word changed here and there
        ][i % 4]
        rows.append({"id": f"leak{i}", "text": disguise})
    rng.shuffle(rows)
    made = config(tmp_path, {"a.jsonl": rows})
    made.contamination = ConfigDict(
        {"test_sets": (str(tmp_path / "test.jsonl"),), "protect": "turns", "ngram": 13, "jaccard": 0.5}
    )
    result = prepare.main(made, tmp_path / "run")
    assert sorted(dropped(tmp_path / "run")) == sorted(f"leak{i}" for i in range(100))
    assert result["contamination_left"] == 0
    assert {(hit["id"], hit["conversation_id"]) for hit in report(tmp_path / "run")["contaminated"]} == {
        (f"leak{i}", f"c{i}") for i in range(100)
    }


def mixed_folder(tmp_path, rng):
    """JSON lines, a CP932 table of calls, HTML, PDF, and files broken in several ways; their documents and failures."""
    from tests.test_readers import pdf

    calls = "通話ID,話者,発話\r\n" + "".join(f"{i // 2},{'募集人' if i % 2 else 'お客様'},{sentence(rng)}\r\n" for i in range(20))
    lines = [json.dumps({"id": f"j{i % 8}", "text": document(rng)}, ensure_ascii=False) for i in range(10)]
    files = {
        "a.jsonl": "\n".join([*lines, '{"text": ', '{"text": 3}']).encode(),
        "calls.csv": calls.encode("cp932"),
        "page.html": f"<html><body><nav>目次</nav><p>{document(rng)}</p></body></html>".encode("euc_jp"),
        "paper.pdf": pdf(sentence(rng)),
        "locked.pdf": pdf(sentence(rng), password="secret"),
        "cut.jsonl.gz": gzip.compress(lines[0].encode() * 3)[:-9],
        "noise.bin": b"\0\1\2",
        "empty.txt": b"",
    }
    sources = [
        {"id": "calls", "path": "*.csv", "columns": {"text": "発話", "conversation": "通話ID", "speaker": "話者"}},
        {"id": "files", "path": "*.[!cy]*"},
    ]
    files |= {"more.jsonl": (lines[3] + "\n").encode()}
    return (
        config(tmp_path, files, sources=sources),
        10 + 1 + 1 + 1 + 10,
        ["not_json", "no_text", "encrypted", "damaged", "unknown_kind", "empty"],
    )


def test_a_mixed_folder_gives_its_documents_and_accounts_for_every_one(tmp_path):
    made, count, failures = mixed_folder(tmp_path, random.Random(2))
    result = prepare.main(made, tmp_path / "run")
    assert result["failed_by_reason"] == dict(Counter(failures))
    assert result["documents_in"] == result["kept"] + sum(result["dropped_by_reason"].values()) + len(failures)
    assert result["documents_in"] == count + len(failures) and result["dropped_by_reason"] == {"exact_duplicate": 1}
    for row in run.iter_jsonl(tmp_path / "run/failed.jsonl"):
        assert row["source"] and not row["where"].startswith("/") and row["words"]
    kept = [row["text"] for row in staging.read_documents(tmp_path / "run") if row["split"]]
    assert texts_of(tmp_path / "run/train", text.load_tokenizer(tmp_path / "run/tokenizer")) == kept
    assert any(one.startswith("お客様：") for one in kept) and not any("目次" in one for one in kept)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    for words in ("encrypted", "exact duplicate", "CC0-1.0", "calls"):
        assert words in page


def test_ids_that_occur_twice_are_told_apart(tmp_path):
    rng = random.Random(3)
    made = config(tmp_path, {"a.jsonl": [{"id": "same", "text": document(rng)} for _ in range(3)]})
    prepare.main(made, tmp_path / "run")
    ids = [row["id"] for row in staging.read_documents(tmp_path / "run")]
    assert ids == ["same", "same~1", "same~2"]


def fingerprint(folder):
    """All that a run made, without what tells when and where."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("manifest.json", "config.json")]
    return {str(path.relative_to(folder)): run.sha256_file(path) for path in files if "documents" not in path.parts} | {
        "documents": run.sha256_json(list(staging.read_documents(folder)))
    }


def big(tmp_path, rng, count=60):
    rows = [{"id": str(i % 50), "text": document(rng)} for i in range(count)]
    rows += [{"id": f"again{i}", "text": rows[i * 5]["text"]} for i in range(5)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    return config(tmp_path, {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.txt": document(rng).encode("cp932")})


def test_the_result_does_not_depend_on_the_size_of_tasks(tmp_path):
    made = big(tmp_path, random.Random(4))
    made.pack.heldout_share = 0.1
    prints = []
    for task_mb in (16.0, 0.02):
        made.corpus.task_mb = task_mb
        prepare.main(made, tmp_path / str(task_mb))
        prints.append(fingerprint(tmp_path / str(task_mb)))
    assert prints[0] == prints[1]


def test_quotas_bound_a_sector_and_keep_as_much_as_they_can(tmp_path):
    rng = random.Random(5)
    files = {
        f"{name}.jsonl": [{"id": f"{name}{i}", "text": document(rng)} for i in range(count)]
        for name, count in (("bank", 40), ("life", 10))
    }
    sources = [{"id": name, "path": f"{name}.jsonl", "sector": name} for name in ("bank", "life")]
    made = config(tmp_path, files, sources=sources, quotas={"bank": 0.6})
    result = prepare.main(made, tmp_path / "run")
    sizes = report(tmp_path / "run")["characters_by_sector"]
    assert 0.52 < sizes["bank"] / sum(sizes.values()) <= 0.6
    assert result["dropped_by_reason"] == {"sector_quota": 40 - 15 + (1 if result["kept"] == 24 else 0)}
    assert corpus.quota_characters({"a": 100, "b": 100, "c": 10}, {"a": 0.5, "b": 0.25, "c": 0.25}) == {"a": 20, "b": 10, "c": 10}
    assert corpus.quota_characters({"a": 100, "b": 300}, {"a": 0.9}) == {"a": 100, "b": 300}


def test_a_glossary_is_covered_or_what_is_missing_is_named(tmp_path):
    rows = [{"text": "解約返戻金は保険料を下回る。"}, {"text": "保険料を払う。"}]
    made = config(tmp_path, {"a.jsonl": rows}, glossary="terms.txt",
                  sources=[{"id": "s", "path": "a.jsonl"}])  # fmt: skip
    (tmp_path / "domain/terms.txt").write_text("保険料\n解約返戻金\n告知義務\n", encoding="utf-8")
    prepare.main(made, tmp_path / "run")
    found = report(tmp_path / "run")["glossary"]
    assert (found["terms"], found["found"], found["missing"]) == (3, 2, ["告知義務"])
    assert found["documents"] == {"保険料": 2, "解約返戻金": 1}


def test_experts_overrule_the_rules_but_not_the_test_sets(tmp_path):
    rng = random.Random(6)
    rows = [{"id": "short", "text": "短い。"}, {"id": "long", "text": document(rng)}, {"id": "bad", "text": document(rng)}]
    profile = {"all": {"paragraph": {}, "document": {"letters": {"min": 50}}}}
    made = config(tmp_path, {"a.jsonl": rows}, profiles=profile)
    decisions = [{"source": "s0", "id": "short", "decision": "keep"}, {"source": "s0", "id": "bad", "decision": "drop"}]
    run.write_jsonl(tmp_path / "corrections.jsonl", decisions)
    made.corpus.corrections = str(tmp_path / "corrections.jsonl")
    prepare.main(made, tmp_path / "run")
    assert dropped(tmp_path / "run") == {"bad": "expert"}
    assert report(tmp_path / "run")["overruled_by_experts"] == {"keep": 1, "drop": 1}
    turn = {"speaker": "募集人", "text": rows[1]["text"].split("\n")[0]}
    run.write_jsonl(tmp_path / "test.jsonl", [{"conversation_id": "c", "turns": [turn], "labels": [], "evidence": []}])
    run.write_jsonl(tmp_path / "corrections.jsonl", [{"source": "s0", "id": "long", "decision": "keep"}])
    made.contamination = ConfigDict(
        {"test_sets": (str(tmp_path / "test.jsonl"),), "protect": "turns", "ngram": 13, "jaccard": 0.5}
    )
    prepare.main(made, tmp_path / "other")
    assert dropped(tmp_path / "other")["long"] == "contaminated"


def test_a_row_under_another_licence_than_its_source_states_is_refused(tmp_path):
    rows = [
        {"id": "ours", "text": "保険の話です。"},
        {"id": "theirs", "text": "預金の話です。", "licence": "all rights reserved"},
    ]
    prepare.main(config(tmp_path, {"a.jsonl": rows}), tmp_path / "run")
    assert dropped(tmp_path / "run") == {"theirs": "other_licence"}


def test_a_forbidden_source_is_read_only_with_a_reason_which_the_manifest_keeps(tmp_path):
    source = {"id": "s", "path": "a.jsonl", "allowed_uses": []}
    files = {"a.jsonl": [{"text": "保険の話です。"}]}
    with pytest.raises(ValueError, match="does not contain 'training': it may not be read without a `reason`"):
        prepare.main(config(tmp_path, files, sources=[source]), tmp_path / "a")
    made = config(tmp_path, files, sources=[source | {"reason": "our own contract no. 7 allows it"}])
    prepare.main(made, tmp_path / "b")
    manifest = json.loads((tmp_path / "b/manifest.json").read_text(encoding="utf-8"))
    assert manifest["attributions"][0]["reason"] == "our own contract no. 7 allows it"
    with pytest.raises(ValueError, match="states no licence"):
        prepare.main(config(tmp_path, files, sources=[source | {"licence": ""}]), tmp_path / "c")


def test_files_that_change_while_a_run_is_interrupted_are_noticed(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    run.write_jsonl(tmp_path / "place/a.jsonl", [{"text": "保険の話です。"}])
    made = config(tmp_path, {}, sources=[{"id": "s", "place": "place/*.jsonl"}])
    made.corpus.root = str(tmp_path)
    monkeypatch.setattr(corpus, "decide", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.main(made, tmp_path / "run")
    run.write_jsonl(tmp_path / "place/a.jsonl", [{"text": "保険の話です。"}, {"text": "預金の話です。"}])
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since this run began"):
        prepare.main(made, tmp_path / "run")


def test_weights_are_small_integers_and_the_realised_shares_are_told(tmp_path, capsys):
    rng = random.Random(7)
    made = config(
        tmp_path,
        {"a.jsonl": [{"text": document(rng)} for _ in range(30)], "b.jsonl": [{"text": document(rng)} for _ in range(10)]},
    )
    prepare.main(made, tmp_path / "general")
    made.train_tokenizer, made.tokenizer = None, str(tmp_path / "general/tokenizer")
    made.mix = ConfigDict({"replay": (str(tmp_path / "general/train"),), "chat": (), "chat_share": 0.0, "train_rows": 1000})
    prepare.main(made, tmp_path / "run")
    mix = json.loads((tmp_path / "run/mixture.json").read_text(encoding="utf-8"))
    assert [weight for _, weight in mix["mixture"]] == [4, 1]  # replay_share: 0.2, one number, in domain.yaml
    rows = shards.read_index(tmp_path / "run/train")["rows"]
    lines = mixture.table(mix["mixture"], rows=1000)
    assert [line["source"] for line in lines] == ["s0", "s1", "s0", "s1"]
    assert sum(line["share_of_rows"] for line in lines) == pytest.approx(1)
    assert lines[0]["epochs"] == round(800 / rows, 2)
    assert "epochs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add up to 1"):
        mixture.weights([("a", 0.5), ("b", 0.4)])
    with pytest.raises(ValueError, match="state both, or neither"):
        mixture.with_replay("a", replay=(), replay_share=0.2, chat=(), chat_share=0.0)


def test_laws_conditions_filings_tables_and_faq_survive_their_own_profiles():
    profiles = documents.load_domain(ROOT / "configs/domains/japanese_finance").profiles
    from swallow_jax.data import filters

    texts = {
        "law": "第三百条　保険会社等若しくは外国保険会社等、これらの役員、保険募集人又は保険仲立人は、"
        + "保険契約の締結又は自らが締結した団体保険に係る保険契約に加入することを勧誘する行為に関して、" * 4
        + "次に掲げる行為をしてはならない。\n一　保険契約者又は被保険者に対して、虚偽のことを告げる行為",
        "conditions": "第1条（用語の定義）\n①保険金額　保険証券記載の保険金額をいいます。\n②免責金額　差し引く金額をいいます。\n"
        * 2
        + "第2条（保険金を支払う場合）\n当会社は、次の事故で生じた損害に対して保険金を支払います。\n③風災、雹災または雪災",
        "filing": "経営成績の状況\n売上高は120,304百万円（前年同期比3.2%増）、営業利益は12,345百万円（同1.5%減）となりました。\n"
        + "セグメント別の業績は次のとおりであります。国内事業においては、資金利益が増加しました。" * 2,
        "table": "科目 金額(百万円) 前年比\n現金預け金 12,345 1.2%\n有価証券 67,890 -3.4%\n貸出金 123,456 2.1%",
        "faq": "Q. 口座を解約したいのですが、どうすればよいですか。\nA. 通帳をお持ちのうえ、窓口までお越しください。",
    }
    for name, content in texts.items():
        assert filters.clean(content, profiles[name]).reasons == [], name
        assert filters.failed(filters.annotate(content, filters.SWALLOW_V1)), f"{name} would have fallen by the web rules"
    noise = "0 1 2 3 4 5 6 7 8 9 " * 30
    for name in texts:
        assert filters.clean(noise, profiles[name]).reasons, name
