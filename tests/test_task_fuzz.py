"""Every broken task.yaml is refused with file, line and remedy: 500 ways to break one, drawn by hypothesis."""

import contextlib
import copy
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from swallow_jax import task as task_lib

FOLDER = Path(__file__).parents[1] / "configs" / "tasks" / "_template"
SOURCE = (FOLDER / "task.yaml").read_text(encoding="utf-8")
RAW = yaml.safe_load(SOURCE)
OPTIONAL = {"form", "output", "labels_may_occur", "aliases", "near_miss", "legal_basis", "keywords", "constraints", "personas",
            "meta_talk", "notes", "dev_sets", "attributes"}  # fmt: skip
# Fields whose value may be anything: a field of `metric` but primary, and the names of attributes' values.
FREE = re.compile(r"^(metric\.(?!primary)|test_sets\.|dev_sets\.)")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    shutil.copytree(FOLDER / "prompts", folder / "prompts")

    def write(data: bytes) -> Path:
        (folder / "task.yaml").write_bytes(data)
        return folder

    return write


def refused(folder: Path) -> tuple[str, int, str]:
    """(file, line, words) of the refusal; fails where the folder loads, or where the sentence lacks one of them."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        task_lib.load_task(folder)
    words = str(error.value)
    found = re.match(rf"{re.escape(str(folder))}/(task\.yaml|prompts/\w+\.md):(\d+): (.*)", words, re.DOTALL)
    assert found, words
    assert ";" in found[3], f"no remedy: {words}"
    assert 1 <= int(found[2]) <= len((folder / found[1]).read_text(encoding="utf-8", errors="replace").splitlines()) + 1, words
    return found[1], int(found[2]), found[3]


def places(value, path=()):
    """Every path into the raw task, with what stands there."""
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def named(path) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


PLACES = [path for path, _ in places(RAW) if not FREE.match(named(path))]
KEYS = [path for path in PLACES if isinstance(path[-1], str)]


def at(raw, path):
    for key in path:
        raw = raw[key]
    return raw


@st.composite
def wrong_value(draw):
    """A value of a kind that does not belong there."""
    path = draw(st.sampled_from(PLACES))
    old = at(RAW, path)
    kinds = {
        str: st.sampled_from([17, None, [], {}, ["a"], {"a": "b"}, 2.5, "", "   ", True]),
        list: st.sampled_from([17, "text", {"a": 1}, True, [17], [None], [""]]),
        dict: st.sampled_from([17, "text", [1], True, {3: "x"}]),
        bool: st.sampled_from([17, "text", [1]]),
    }
    value = draw(kinds.get(type(old), st.sampled_from(["text", None, [], -1, 0, float("nan"), float("inf"), True])))
    raw = copy.deepcopy(RAW)
    at(raw, path[:-1])[path[-1]] = value
    return path, raw


MAY_GO = re.compile(r"(attributes|keywords|constraints|prompts|categories\[\d\]\.legal_basis)")
NEEDED = [p for p in KEYS if p[-1] not in OPTIONAL and not MAY_GO.match(named(p))]


@st.composite
def missing_field(draw):
    path = draw(st.sampled_from(NEEDED))
    assume(not (path[-1] == "required_items" and at(RAW, path[:-1])["kind"] == "utterance"))
    raw = copy.deepcopy(RAW)
    del at(raw, path[:-1])[path[-1]]
    return path, raw


@st.composite
def unknown_field(draw):
    holders = [(), *(p for p in PLACES if isinstance(at(RAW, p), dict) and p[0] in ("categories", "compliant", "constraints")
                     and p[-1] not in ("when", "never"))]  # fmt: skip
    path = draw(st.sampled_from(holders))
    name = draw(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)) + "_x"
    raw = copy.deepcopy(RAW)
    at(raw, path)[name] = draw(st.sampled_from(["text", 1, [], {}]))
    return (*path, name), raw


CONTRADICTIONS = {
    "twice": lambda r: r["categories"][1].update(id="false_promise"),
    "shared": lambda r: r["categories"][1].update(label="promise"),
    "date": lambda r: r["categories"][0]["legal_basis"][0].update(effective_from="2024-13-40"),
    "ends": lambda r: r["categories"][0]["legal_basis"][0].update(effective_to="1999-01-01"),
    "weight": lambda r: r["attributes"]["channel"].update(phone=-3),
    "empty": lambda r: r["attributes"].update(channel={}),
    "constraint": lambda r: r["constraints"][0]["when"].update(channel=["pigeon"]),
    "attribute": lambda r: r["constraints"][0]["never"].update(weather=["rain"]),
    "keyword": lambda r: r["keywords"].update(nothing=["x"]),
    "prompt": lambda r: r.update(default_prompt="guess"),
    "file": lambda r: r["prompts"].update(classify="prompts/none.md"),
    "policy": lambda r: r.update(label_policy="binary"),
    "form": lambda r: r.update(form="document"),
    "speaker": lambda r: r.update(speakers=["Agent", "Agent"]),
    "braces": lambda r: r.update(turn_format="{speaker} {text} {"),
    "hole": lambda r: r.update(turn_format="{speaker} {text} {time}"),
    "reserved": lambda r: r["categories"][0].update(id="compliant"),
    "omission": lambda r: r["categories"][1].update(required_items=[]),
    "no categories": lambda r: r.update(categories=[]),
    "violations": lambda r: r["attributes"].update(violations={"3": 1}),
}


@st.composite
def contradiction(draw):
    raw = copy.deepcopy(RAW)
    CONTRADICTIONS[draw(st.sampled_from(sorted(CONTRADICTIONS)))](raw)
    return None, raw


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=st.one_of(wrong_value(), missing_field(), unknown_field(), contradiction()))
def test_a_wrong_missing_or_unknown_field_is_refused_where_it_stands(broken, case):
    path, raw = case
    text = yaml.safe_dump(raw, allow_unicode=True, sort_keys=False)
    assume(raw != RAW)
    folder = broken(text.encode())
    file, line, words = refused(folder)
    if path is None or file != "task.yaml":
        return
    # The line is that of the field, of what holds it, or of what should hold it; the sentence names one of them too.
    nodes = lines_of(text)
    fitting = {nodes[named(path[:n])] for n in range(len(path) + 1) if named(path[:n]) in nodes}
    below = {at_line for name, at_line in nodes.items() if name.startswith(named(path))}
    related = "default_prompt" in words or "shares the spelling" in words or "prompts" in words or "twice" in words
    assert line in fitting | below or related or "constraints" in words or "keywords" in words, (path, words, line)


def lines_of(text: str) -> dict[str, int]:
    """Field -> line, written again for the test, from the events of PyYAML's own loader."""
    found = {"": 1}

    def walk(node, name):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                field = f"{name}.{key.value}".lstrip(".")
                found[field] = key.start_mark.line + 1
                walk(value, field)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                found[f"{name}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{name}[{i}]")

    walk(yaml.compose(text), "")
    return found


@st.composite
def torn_text(draw):
    """The file as an editor, a bad disk or a wrong encoding leaves it."""
    lines = SOURCE.splitlines(keepends=True)
    kind = draw(
        st.sampled_from(["tab", "bracket", "quote", "cut", "byte", "colon", "twice", "indent", "control", "empty", "list"])
    )
    i = draw(st.sampled_from([n for n, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]))
    line = lines[i]
    if kind == "tab":
        lines[i] = "\t" + line
    elif kind == "bracket":
        lines[i] = line.rstrip("\n") + " [\n"
    elif kind == "quote":
        lines[i] = line.split(":")[0] + ': "never closed\n'
    elif kind == "cut":
        return "".join(lines[:i]).encode()[: draw(st.integers(1, 2000))]
    elif kind == "byte":
        whole = SOURCE.encode()
        n = draw(st.integers(0, len(whole) - 1))
        return whole[:n] + draw(st.sampled_from([b"\xff", b"\x82\xa0", b"\xc3\x28"])) + whole[n:]
    elif kind == "colon":
        lines[i] = line.rstrip("\n") + ": : :\n"
    elif kind == "twice":
        top = [
            n for n, each in enumerate(lines) if re.match(r"(id|version|language|turn_format|label_policy|default_prompt):", each)
        ]
        lines.append(lines[draw(st.sampled_from(top))])
    elif kind == "indent":
        lines[i] = "   " + line
    elif kind == "control":
        lines[i] = line.rstrip("\n") + "\x01\n"
    elif kind == "empty":
        return draw(st.sampled_from([b"", b"\n", b"# nothing\n", b"null\n", b"&a [*a]\n", b"a: &x\n  b: *x\n"]))
    else:
        return b"- " + draw(st.sampled_from([b"text\n", b"id: x\n", b"[1, 2]\n"]))
    return "".join(lines).encode()


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=torn_text())
def test_a_torn_file_is_refused_with_its_line(broken, data):
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        same = yaml.safe_load(data.decode())
        # Some damage is harmless (an indented comment), or falls on text alone: what still loads must then load whole.
        if isinstance(same, dict) and set(same) == set(RAW) and len(data) >= len(SOURCE.encode()):
            with contextlib.suppress(ValueError, FileNotFoundError):
                assert task_lib.load_task(broken(data)).id == same["id"]
                assert b"\xff" not in data
                return
    refused(broken(data))


def test_a_field_that_stands_twice_is_refused_and_not_silently_the_last(broken):
    file, line, words = refused(broken((SOURCE + "version: v1\n").encode()))
    first = SOURCE.splitlines().index(next(each for each in SOURCE.splitlines() if each.startswith("version:"))) + 1
    assert (file, line) == ("task.yaml", len(SOURCE.splitlines()) + 1)
    assert words == f"field 'version' stands twice, first in line {first}; remove one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("## user\n\n{{converstaion}}\n", ":3: nothing gives {{converstaion}}; known: "),
        ("user\n{{conversation}}\n", "has the sections []; a prompt is '## user'"),
        ("## user\na\n## text\nb\n", "a prompt is '## user' with an optional '## system'"),
    ],
)
def test_a_broken_prompt_is_named_too(broken, text, said):
    folder = broken(SOURCE.encode())
    before = (folder / "prompts" / "classify.md").read_text()
    try:
        (folder / "prompts" / "classify.md").write_text(text)
        with pytest.raises(ValueError) as error:
            task_lib.load_task(folder)
        assert said in str(error.value)
    finally:
        (folder / "prompts" / "classify.md").write_text(before)
