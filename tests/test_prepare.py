"""The program: what comes out of the shards is what was kept, and the report accounts for every document."""

import json
from collections import Counter
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.prepare import demo_base, demo_cpt, tiny
from experiments import prepare
from swallow_jax import run, text
from swallow_jax.data import documents, filters, shards

ROOT = Path(__file__).parent.parent
PARAGRAPHS = ROOT / "configs/prepare/tiny_data/paragraphs.jsonl"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name their data relative to the checkout


def corpus(tmp_path, rows, files=(), **profile):
    """A config over a domain folder that holds `rows` (JSONL) and `files` {name: text}."""
    folder = tmp_path / "domain"
    folder.mkdir()
    run.write_jsonl(folder / "rows.jsonl", rows)
    for name, content in dict(files).items():
        run.write_text(folder / name, content)
    domain = json.loads(json.dumps(_yaml(ROOT / "configs/prepare/tiny_data/domain.yaml")))
    domain["sources"][0]["path"] = "[!d]*"  # everything but domain.yaml
    domain["profiles"]["paragraphs"] = {"paragraph": {}, "document": {}} | profile
    run.write_text(folder / "domain.yaml", json.dumps(domain))
    config = tiny.get_config()
    config.corpus.domains = (str(folder),)
    return config


def _yaml(path):
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def texts_of(folder, tokenizer):
    """Documents as the shards hold them: the stream of tokens, cut at EOS."""
    opened = shards.open_shards(folder, verify_sha256=True)
    stream = [int(t) for i in range(len(opened)) for t in opened[i].tokens[opened[i].segments > 0]]
    ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_ids[0]]
    return [tokenizer.decode(stream[a + 1 : b + 1]) for a, b in zip([-1, *ends], ends, strict=False)]


def test_the_shards_hold_the_kept_text_exactly(tmp_path):
    result = prepare.main(tiny.get_config(), tmp_path / "run")
    tokenizer = text.load_tokenizer(tmp_path / "run" / "tokenizer")
    found = texts_of(tmp_path / "run/train", tokenizer) + texts_of(tmp_path / "run/heldout", tokenizer)
    expected = [filters.normalise(row["text"])[0] for row in run.read_jsonl(PARAGRAPHS)][:40]
    assert Counter(found) == Counter(expected)
    assert (result["documents_in"], result["kept"]) == (42, 40)
    assert result["dropped_by_reason"] == {"exact_duplicate": 1, "japanese_letters": 1}


def test_twice_the_same_config_gives_the_same_bytes_and_a_finished_run_is_left_alone(tmp_path):
    first = prepare.main(tiny.get_config(), tmp_path / "a")
    second = prepare.main(tiny.get_config(), tmp_path / "b")
    assert first == second
    one, two = (shards.read_index(tmp_path / name / "train") for name in "ab")
    assert one == two
    before = (tmp_path / "a/train/index.json").stat().st_mtime_ns
    assert prepare.main(tiny.get_config(), tmp_path / "a") == first
    assert (tmp_path / "a/train/index.json").stat().st_mtime_ns == before
    other = tiny.get_config()
    other.pack.row_length = 32
    with pytest.raises(ValueError, match="holds another config"):
        prepare.main(other, tmp_path / "a")


def test_every_document_is_kept_or_dropped_with_a_reason(tmp_path):
    long = "終身保険は一生涯の死亡保障が続く保険です。早い時期に解約すると、解約返戻金は払い込んだ保険料の総額を下回ります。" * 3
    rows = [
        {"id": "good", "text": long + "\n繰り返される段落です。"},
        {"id": "copy", "text": long.replace("、", "") + "\n繰り返される段落です！"},
        {"id": "repeated", "text": "繰り返される段落です。"},
        {"id": "english", "text": "English text only, and nothing else."},
        {"id": "other", "text": "定期預金は満期まで引き出さないことを前提とした預金です。\n繰り返される段落です。"},
    ]
    config = corpus(tmp_path, rows, document={"japanese_fraction": {"min": 0.5}})
    result = prepare.main(config, tmp_path / "run")
    dropped = {row["id"]: row["reasons"] for row in run.read_jsonl(tmp_path / "run/dropped.jsonl")}
    assert dropped["copy"] == ["exact_duplicate"]
    assert dropped["repeated"] == ["only_repeated_paragraphs"]
    assert dropped["english"] == ["japanese_fraction"]
    assert result["documents_in"] == result["kept"] + sum(result["dropped_by_reason"].values()) == 5
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert report["sources"]["tiny_paragraphs"]["kept"] == result["kept"]
    assert report["licences"] == [
        {"source": "tiny_paragraphs", "licence": "Apache-2.0", "attribution": "written for this project"}
    ]


def test_a_near_duplicate_falls_and_the_first_of_its_kind_stays(tmp_path):
    paragraphs = [row["text"] for row in run.read_jsonl(PARAGRAPHS)]
    texts = ["".join(paragraphs[:20]), "".join(paragraphs[20:40]), "".join(paragraphs[:20]).replace("一生涯", "いっしょう")]
    config = corpus(tmp_path, [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    assert prepare.main(config, tmp_path / "run")["dropped_by_reason"] == {"near_duplicate": 1}
    assert [row["id"] for row in run.read_jsonl(tmp_path / "run/dropped.jsonl")] == ["2"]


CONVERSATION = {
    "conversation_id": "c1",
    "turns": [
        {"speaker": "募集人", "text": "この保険は元本が保証されているので、預金と同じようにお考えいただいて大丈夫です。"},
        {"speaker": "お客様", "text": "本日はよろしくお願いいたします。"},
    ],
    "labels": ["false_explanation"],
    "evidence": [{"category": "false_explanation", "turn": 0, "quote": "元本が保証されている"}],
    "missing_items": [],
}
FILLER = "この文書は保険の仕組みを説明しています。契約の前に内容を確かめてください。"


def test_a_planted_leak_is_dropped_and_listed(tmp_path):
    rows = [
        {"id": "clean", "text": FILLER},
        {"id": "leak", "text": "例として「この保険は元本が保証されているので、預金と同じ」と述べた。"},
        {
            "id": "near",
            "text": "別の話です。\nこの保険は元本が保証済みているので、預金と同じだようにお考えいただければ大丈夫です。",
        },
        {"id": "greeting", "text": "手紙は「本日はよろしくお願いいたします」で始まります。"},
    ]
    run.write_jsonl(tmp_path / "test.jsonl", [CONVERSATION])
    for protect, expected in (("evidence", ["leak", "near"]), ("turns", ["greeting", "leak", "near"])):
        place = tmp_path / protect
        place.mkdir()
        config = corpus(place, rows)
        config.pack.heldout_share = 0.0
        config.contamination = ConfigDict(
            {"test_sets": (str(tmp_path / "test.jsonl"),), "protect": protect, "ngram": 13, "jaccard": 0.3}
        )
        result = prepare.main(config, place / "run")
        report = json.loads((place / "run/report.json").read_text(encoding="utf-8"))
        assert sorted({hit["id"] for hit in report["contaminated"]}) == expected
        assert result["dropped_by_reason"] == {"contaminated": len(expected)}
        assert result["contamination_left"] == 0
        assert {hit["conversation_id"] for hit in report["contaminated"]} == {"c1"}


def test_files_of_several_kinds_become_one_corpus(tmp_path):
    files = {
        "a.html": f"<html><body><p>{FILLER}</p></body></html>",
        "b.txt": "投資信託は、多くの人から集めた資金を専門家が運用する商品です。元本は保証されません。",
    }
    config = corpus(tmp_path, [{"id": "r", "text": "普通預金はいつでも預け入れと引き出しができます。"}], files)
    result = prepare.main(config, tmp_path / "run")
    assert (result["documents_in"], result["kept"]) == (3, 3)


def test_dialogues_are_packed_whole_with_weights_on_the_answers(tmp_path):
    result = prepare.main(tiny.get_config("dialogues"), tmp_path / "run")
    assert result["kept"] == 8
    tokenizer = text.load_tokenizer(tmp_path / "run" / "tokenizer")
    trained = []
    for name in ("train", "heldout"):
        opened = shards.open_shards(tmp_path / "run" / name)
        for i in range(len(opened)):
            row = opened[i]
            for segment in range(1, int(row.segments.max()) + 1):
                inside = row.segments == segment
                trained.append(tokenizer.decode(row.tokens[inside & (row.weights > 0)].tolist()))
    answers = [row["messages"][1]["content"] for row in run.read_jsonl(ROOT / "configs/prepare/tiny_data/chats.jsonl")]
    assert sorted(trained) == sorted(answers)


def test_too_long_dialogues_are_dropped_and_counted_where_the_config_says_so(tmp_path):
    config = tiny.get_config("dialogues")
    config.pack.row_length = 50
    with pytest.raises(ValueError, match="exceed row_length=50"):
        prepare.main(config, tmp_path / "error")
    config.dialogues.too_long = "drop"
    result = prepare.main(config, tmp_path / "drop")
    assert 0 < result["dropped_by_reason"]["too_long"] == 8 - result["kept"] < 8


def test_an_existing_tokenizer_can_be_used(tmp_path):
    prepare.main(tiny.get_config(), tmp_path / "first")
    config = tiny.get_config()
    config.train_tokenizer = None
    config.tokenizer = str(tmp_path / "first/tokenizer")
    prepare.main(config, tmp_path / "second")
    assert shards.read_index(tmp_path / "first/train") == shards.read_index(tmp_path / "second/train")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"corpus": None}, "state one of corpus and dialogues"),
        (None, {"tokenizer": "x"}, "state one of tokenizer and train_tokenizer"),
        ("corpus", {"domains": ("nowhere",)}, "nowhere.* does not exist"),
        ("train_tokenizer", {"texts": ("nowhere/*.jsonl",)}, "nothing matches 'nowhere"),
        ("pack", {"heldout_share": 1.5}, "held-out share 1.5"),
        ("pack", {"row_length": "64"}, "config.pack.row_length: '64' is str"),
    ],
)
def test_a_wrong_config_is_named_and_leaves_no_shards(tmp_path, section, change, message):
    content = tiny.get_config().to_dict()
    (content[section] if section else content).update(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare.main(ConfigDict(content), tmp_path / "run")
    assert not (tmp_path / "run/train").exists()


def test_an_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing is left of 1 documents"):
        prepare.main(corpus(tmp_path, [{"id": "e", "text": " "}]), tmp_path / "run")


@pytest.mark.parametrize("module", [tiny, demo_base, demo_cpt])
def test_every_config_has_all_fields(module):
    prepare.read_settings(module.get_config())


@pytest.mark.parametrize("path", sorted((ROOT / "configs/domains").glob("*/domain.yaml")), ids=lambda path: path.parent.name)
def test_every_domain_folder_passes_the_licence_gate(path):
    assert documents.load_domain(path.parent).sources
