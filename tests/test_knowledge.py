"""Questions of other sources: pfnet's finance sets are read from their own files, whatever the number of choices."""

import json

import pytest

from swallow_jax import run
from swallow_jax.evaluate import knowledge
from swallow_jax.generate import backends

SETTINGS = {
    "files": (),
    "prompt": "{question}\n{choices}\n答え：",
    "choice": "{answer}. {text}",
    "chat": False,
    "normalise": "sum",
}


def question(number, texts, answer, context=""):
    """One entry in the layout of pfnet's data.json; the texts are our own."""
    choices = [{"id": i, "text": text} for i, text in enumerate(texts)]
    return {"id": number, "question": f"第{number}問", "context": context, "choices": choices, "answer": answer, "comment": ""}


DATA = [question(0, ["○", "×"], 1, "株式は元本が保証される。"), question(1, ["1％", "2％", "3％", "4％"], 2)]


def write(folder, data, name="fp2"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "data.json").write_text(json.dumps({"data-name": name, "data": data}, ensure_ascii=False), encoding="utf-8")
    return folder / name / "data.json"


def workbook(path, rows, header=("", "question", "ア", "イ", "ウ", "エ", "オ", "カ", 1, 2, 3, 4, 5, 6, "a_no", "abnormal_flg")):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(row)
    book.save(path)
    return path


def test_questions_of_two_and_four_choices_keep_their_answer_and_bear_their_sets_name(tmp_path):
    file = write(tmp_path, DATA)
    rows = knowledge.read_questions(file)
    assert knowledge.set_name(file) == "fp2" and [row["id"] for row in rows] == ["fp2-0", "fp2-1"]
    assert [(row["choices"][row["answer"]], len(row["choices"])) for row in rows] == [("×", 2), ("3％", 4)]
    assert [row["question"] for row in rows] == ["第0問\n株式は元本が保証される。", "第1問"]


def test_the_answer_is_the_choice_of_that_id_wherever_it_stands(tmp_path):
    turned = question(0, ["甲", "乙", "丙", "丁"], 3)
    turned["choices"].reverse()
    (row,) = knowledge.read_questions(write(tmp_path, [turned]))
    assert row["choices"][row["answer"]] == "丁" and row["answer"] == 0


def test_a_table_of_six_choices_joins_its_statements_and_leaves_abnormal_rows_out(tmp_path):
    letters = ["アイ", "アウ", "アエ", "イウ", "イエ", "ウエ"]
    rows = [
        (
            0,
            "正しい組合せはどれか。",
            "監査は保証する。",
            "監査人は独立である。",
            "試査による。",
            None,
            None,
            None,
            *letters,
            4,
            0,
        ),
        (1, "採点から外れた問い。", "あ", "い", None, None, None, None, *letters, 1, 1),
        (2, None, None, None, None, None, None, None, *[None] * 6, None, None),
    ]
    (row,) = knowledge.read_questions(workbook(tmp_path / "CPA_AUDIT.xlsx", rows))
    assert row["choices"] == letters and row["choices"][row["answer"]] == "イウ" and row["id"] == "CPA_AUDIT-2"
    assert row["question"] == "正しい組合せはどれか。\nア: 監査は保証する。\nイ: 監査人は独立である。\nウ: 試査による。"


class Last:
    """Thinks that the last choice is the right one."""

    name = "last"

    def __init__(self):
        self.asked = []

    def score(self, requests):
        for request in requests:
            self.asked.append(request)
            n = len(request.continuations)
            yield backends.ScoreResult(key=request.key, logprobs=tuple(map(float, range(-n, 0))), greedy=(False,) * n,
                                       tokens=(1,) * n)  # fmt: skip


def test_each_question_is_asked_with_as_many_letters_as_it_has_choices(tmp_path):
    questions = knowledge.read_questions(write(tmp_path, DATA))
    backend = Last()
    rows = list(knowledge.ask_questions(questions, backend, knowledge.Questions(**SETTINGS, answers=tuple("ABCDEF"))))
    assert [request.continuations for request in backend.asked] == [("A", "B"), ("A", "B", "C", "D")]
    assert "A. ○\nB. ×" in backend.asked[0].prompt
    assert [(row["gold"], row["pred"]) for row in rows] == [(1, 1), (2, 3)]
    with pytest.raises(ValueError, match="CPA-1 has 5 choices; add letters"):
        five = [{"id": "CPA-1", "conversation_id": "CPA-1", "question": "?", "choices": list("vwxyz"), "answer": 0}]
        list(knowledge.ask_questions(five, backend, knowledge.Questions(**SETTINGS, answers=tuple("ABCD"))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 2}, r"question 2: the answer 2 is the id of no choice; there are \[0, 1\]"),
        ({"choices": [{"id": 0, "text": "○"}]}, "question 2: 'choices' must be two or more"),
        ({"choices": [{"id": 0, "text": "○"}, {"id": 0, "text": "×"}]}, "ids of their own"),
        ({"choices": None}, "question 2 lacks one of"),
        ({"question": " "}, "question 2: 'question' is ' '"),
        ({"id": 0}, "question 2: the id 0 stands twice"),
    ],
)
def test_a_broken_question_of_theirs_is_named(tmp_path, change, words):
    file = write(tmp_path, [DATA[0], question(1, ["○", "×"], 0) | change])
    with pytest.raises(ValueError, match=rf"data.json: .*{words}"):
        knowledge.read_questions(file)


@pytest.mark.parametrize(("text", "words"), [("[1, 2]", "no list 'data'"), ("{", "not JSON"), ('{"data": []}', "holds nothing")])
def test_a_file_that_is_not_theirs_is_refused(tmp_path, text, words):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        knowledge.read_questions(tmp_path / "data.json")


def test_a_table_without_their_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no column a_no, abnormal_flg"):
        knowledge.read_questions(workbook(tmp_path / "other.xlsx", [], header=("", "question", 1, 2)))


def test_ours_and_theirs_are_sets_of_their_own_in_one_evaluation(tmp_path):
    """Three files called data.json are three test sets."""
    files = [write(tmp_path, DATA, name) for name in ("fp2", "security_sales_1", "cma_basics")]
    run.write_jsonl(tmp_path / "ours.jsonl", [{"id": "a", "question": "?", "choices": list("wxyz"), "answer": 0}])
    assert [knowledge.set_name(f) for f in (*files, tmp_path / "ours.jsonl")] == ["fp2", "security_sales_1", "cma_basics", "ours"]
