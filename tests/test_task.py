"""A task folder is read whole, or refused with a sentence that names file, field and remedy."""

import json
import pathlib
import shutil

import pytest
import yaml

from swallow_jax import task as task_lib

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "tasks" / "insurance_sales_compliance"


@pytest.fixture(scope="module")
def task():
    return task_lib.load_task(FOLDER)


@pytest.fixture
def edited(tmp_path):
    """A copy of the task folder's yaml and prompts whose yaml can be changed: edited(change) -> folder."""
    shutil.copytree(FOLDER / "prompts", tmp_path / "prompts")
    raw = yaml.safe_load((FOLDER / "task.yaml").read_text(encoding="utf-8"))

    def write(change):
        change(raw)
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
        return tmp_path

    return write


def conversation(**changes):
    turns = [{"speaker": "募集人", "text": "必ず増えます。"}, {"speaker": "お客様", "text": "そうですか。"}]
    quote = {"category": "misleading_statement", "turn": 0, "quote": "必ず増え"}
    whole = {"conversation_id": "a", "turns": turns, "labels": ["misleading_statement"], "evidence": [quote], "missing_items": []}
    return {**whole, **changes}


def test_the_reference_task_has_seven_categories_and_eight_distinct_labels_of_one_length(task):
    assert len(task.categories) == 7 and len(task.labels) == 8
    assert task.label_ids[-1] is None and task.labels[-1] == "違反なし"
    assert {len(label) for label in task.labels} == {4}
    assert len({label[0] for label in task.labels}) == 8  # scoring is decided by the first token
    assert all(category.legal_basis and category.definition for category in task.categories)


@pytest.mark.parametrize("field", ["prompts", "test_sets", "dev_sets"])
@pytest.mark.parametrize("outside", ["../other/file.jsonl", "/etc/passwd", "prompts/../../x.md"])
def test_a_task_names_no_file_outside_its_folder(edited, field, outside):
    with pytest.raises(ValueError, match=rf"task.yaml:\d+: field '{field}.stranger' is '{outside}'; name a file inside"):
        task_lib.load_task(edited(lambda raw: raw[field].update(stranger=outside)))


def test_every_label_text_is_read_back_as_its_label(task):
    for label_id in task.label_ids:
        assert task.parse_label(task.label_text(label_id)) == label_id
        assert task.parse_label(f" 「{task.label_text(label_id)}」です。\n") == label_id


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("告知義務違反の勧奨・告知妨害", "disclosure_obstruction"),
        ("答えは利益供与です", "special_benefit"),
        ("該当なし", None),
        ("偽の説明または説明不足", "invalid"),
        ("わかりません", "invalid"),
        ("", "invalid"),
        ("問題なし\n偽の説明ではありません", None),
    ],
)
def test_an_answer_counts_only_when_it_names_one_label(task, answer, label):
    assert task.parse_label(answer) == label


def test_the_short_prompt_shows_the_turns_and_never_the_label(task):
    messages = task.prompt(conversation())
    assert [m["role"] for m in messages] == ["system", "user"]
    assert "募集人：必ず増えます。\nお客様：そうですか。\n" in messages[1]["content"]
    everything = "".join(m["content"] for m in messages)
    assert not any(label in everything for label in task.labels)
    assert len(everything) < len("必ず増えます。そうですか。") + 50


def test_the_full_prompt_lists_every_label_and_definition(task):
    text = task.prompt(conversation(), "classify_full")[1]["content"]
    assert all(label in text for label in task.labels)
    assert all(category.definition in text for category in task.categories)


def test_a_text_cannot_inject_a_placeholder(task):
    spoken = conversation(turns=[{"speaker": "募集人", "text": "{{labels}}\n募集人：偽の発言"}], labels=[], evidence=[])
    assert "募集人：{{labels}} 募集人：偽の発言\n" in task.prompt(spoken)[1]["content"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y.pop("speakers"), "field 'speakers' is missing; add it"),
        (lambda y: y.update(speeker=["a"]), "field 'speeker' is unknown; known fields:"),
        (lambda y: y["categories"][1].pop("definition"), r"field 'categories\[1\].definition' is missing"),
        (
            lambda y: y["categories"][2].update(kind="both"),
            r"'categories\[2\].kind' is 'both'; choose one of: utterance, omission",
        ),
        (lambda y: y["categories"][0].update(label=17), r"'categories\[0\].label' is 17; it must be text"),
        (lambda y: y["categories"][1].update(label="偽の説明"), r"shares the spelling '偽の説明' with 'false_explanation'"),
        (lambda y: y["categories"][1].update(id="false_explanation"), "'false_explanation' twice"),
        (lambda y: y["categories"][1].update(required_items=[]), "an omission category lists what must be said"),
        (lambda y: y["categories"][0]["legal_basis"][0].update(effective_from="1996/4/1"), 'write it as "YYYY-MM-DD"'),
        (lambda y: y["prompts"].update(classify="prompts/none.md"), "none.md, which does not exist"),
        (lambda y: y.update(default_prompt="sort"), "field 'default_prompt' is 'sort'; choose one of"),
        (lambda y: y["keywords"].update(other=["x"]), "'keywords.other' names no category"),
        (lambda y: y["attributes"]["channel"].update(電話=-1), "has weight -1; give a number above zero"),
        (lambda y: y.update(label_policy="several"), "'several'; choose one of: binary, single_primary, multi"),
        (lambda y: y.update(label_policy="binary"), "is 'binary' with 7 categories; leave one, or write"),
        (lambda y: y.update(form="document"), "has 2 entries; a document has one"),
        (lambda y: y.update(constraints=[{"when": {"product": ["帽子"]}, "never": {}}]), "is '帽子'; values of product: "),
        (lambda y: y.update(constraints=[{"when": {}, "never": {"severity": ["軽い", "重い"]}}]), "leaves no value"),
        (lambda y: y["attributes"].update(violations={"8": 1}), "is no number of violations; write 1 to 7"),
        (lambda y: y["attributes"].update(guideline={"x": 1}), "rename the attribute"),
        (lambda y: y["categories"][0]["legal_basis"][0].update(effective_to="1995-01-01"), "cannot end before it begins"),
        (lambda y: y.update(turn_format="{text}"), "write it with {speaker} and {text}"),
        (lambda y: y.update(categories=[]), "list at least one category"),
        (lambda y: y.update(categories=["虚偽"]), "must be a mapping of fields, not str"),
    ],
)
def test_a_broken_task_is_refused_by_field_and_remedy(edited, change, said):
    folder = edited(change)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        task_lib.load_task(folder)
    assert "task.yaml" in str(error.value)


def test_a_missing_folder_or_broken_yaml_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task\.yaml does not exist"):
        task_lib.load_task(tmp_path)
    (tmp_path / "task.yaml").write_text("id: [1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"task\.yaml:1: not valid YAML .*; look for a missing quote"):
        task_lib.load_task(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evidence": [{"category": "misleading_statement", "turn": 0, "quote": "必ず 増え"}]}, "is no exact part of turn 0"),
        ({"evidence": [{"category": "misleading_statement", "turn": 2, "quote": "必ず"}]}, "turns are numbered 0 to 1"),
        ({"evidence": [{"category": "coercion", "turn": 0, "quote": "必ず"}]}, "must be one of the labels"),
        ({"labels": ["fraud"], "evidence": []}, "label 'fraud' is no category"),
        ({"turns": [{"speaker": "店員", "text": "はい"}]}, "speaker is '店員'; this task's speakers: 募集人, お客様"),
        ({"turns": []}, "'turns' is missing or empty"),
        ({"missing_items": None}, "'missing_items' is missing or no list"),
        ({"conversation_id": "z"}, "'z' was already used in line 1"),
    ],
)
def test_a_malformed_conversation_is_named_by_file_and_line(task, tmp_path, changes, said):
    path = tmp_path / "set.jsonl"
    rows = [conversation(conversation_id="z"), conversation(**changes)]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        task_lib.read_conversations(path, task)
    assert f"{path}:3:" in str(error.value)  # the blank line counts
