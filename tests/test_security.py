"""What comes from outside stays data: no code out of files, no way out of a folder, no markup out of words, no key on disk."""

import ast
import functools
import http.server
import json
import logging
import re
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import corpus_page, door, evaluate, synthesize
from swallow_jax import hf, lineage, run, text
from swallow_jax.data import documents
from swallow_jax.evaluate import robustness
from swallow_jax.task import load_task
from tests import lock
from tests.helpers import write_checkpoint
from tests.test_evaluate import endpoint_config, mini_task
from tests.test_report import Page

ROOT = Path(__file__).parent.parent
CODE = [file for room in ("swallow_jax", "experiments", "tools", "configs") for file in sorted((ROOT / room).rglob("*.py"))]
EVIL = "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b onclick=alert(3)>"
KEY = "sk-live-4f1c0ffee"
UNSAFE = ("trust_remote_code", "allow_pickle", "shell")  # arguments of calls that are True nowhere


# Code out of files


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


@functools.cache
def calls(file: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    return [(ast.unparse(node.func), node) for node in nodes(file) if isinstance(node, ast.Call)]


def test_nothing_here_reads_pickles_or_runs_code_out_of_data():
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    for file in CODE:
        imported = {a.name.split(".")[0] for n in nodes(file) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module.split(".")[0] for n in nodes(file) if isinstance(n, ast.ImportFrom) and n.module}
        assert not imported & unsafe, file
        for name, call in calls(file):
            given = {
                k.arg: ast.unparse(k.value) for k in call.keywords if k.arg in ("trust_remote_code", "allow_pickle", "shell")
            }
            where = f"{file.relative_to(ROOT)}:{call.lineno}"
            assert given.get("trust_remote_code", "False") == "False", where
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("shell", "False") == "False", where
            assert name not in ("eval", "exec", "os.system", "os.popen", "torch.load", "torch.save"), where
            assert not re.search(r"(^|\.)(unsafe_load|full_load|load_all)$", name), where
            if name == "yaml.load":  # with a safe loader, and no other
                source = file.read_text(encoding="utf-8")
                assert "SafeLoader" in source and not re.search(r"\.(C?(Unsafe|Full)?Loader)\b", source), where


def test_config_files_are_the_only_code_that_a_program_is_given():
    """The programs run the config they are given; the library runs no file, whatever a folder holds."""
    users = {file.relative_to(ROOT).parts[0] for file in CODE for name, _ in calls(file) if name.split(".")[0] == "runpy"}
    assert users == {"experiments"}


@pytest.mark.parametrize(
    "expression",
    ["''.__class__.__mro__[1].__subclasses__()", "messages.__init__.__globals__", "cycler.__init__.__globals__.os.popen('id')"],
)
def test_a_chat_template_reaches_no_python(tmp_path, expression):
    text.train_bpe(["yes and no"] * 4, vocab_size=300, folder=tmp_path / "t",
                   chat_template="{{ bos_token }}{% for m in messages %}{{ " + expression + " }}{% endfor %}",
                   special_tokens=text.SPECIAL_TOKENS)  # fmt: skip
    with pytest.raises(ValueError, match="template"):
        text.load_tokenizer(tmp_path / "t").render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)


def test_yaml_makes_no_objects(tmp_path):
    """In each file of YAML that a stranger may hand over: a task, a domain, a model card, material for disturbed transcripts."""
    mark = tmp_path / "ran"
    attack = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]"
    for name in ("task.yaml", "domain.yaml"):
        (tmp_path / name).write_text(f"id: {attack}\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(f"---\nlicense: {attack}\n---\n", encoding="utf-8")
    (tmp_path / "ja.yaml").write_text(f"fillers: {attack}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_task(tmp_path)
    with pytest.raises(ValueError, match="not YAML"):
        documents.load_domain(tmp_path)
    assert run.card_licences(tmp_path) == []
    with pytest.raises(Exception, match="python/object"):
        robustness.read_material(str(tmp_path / "ja.yaml"))
    assert not mark.exists()


# Ways out of a folder


OUTSIDE = ["../x", "../../../../etc/passwd", "/etc/passwd", "a/../../x", "..", "a\x00b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_that_name_files_are_plain_words(tmp_path, name):
    """A task's id and its categories' ids become names of files (banks/ID.jsonl)."""
    import yaml

    folder = mini_task(tmp_path / "task")
    whole = yaml.safe_load((folder / "task.yaml").read_text(encoding="utf-8"))
    for change in ({"id": name}, {"categories": [{**whole["categories"][0], "id": name}, *whole["categories"][1:]]}):
        (folder / "task.yaml").write_text(yaml.safe_dump(whole | change), encoding="utf-8")
        with pytest.raises(ValueError, match="task.yaml:"):
            load_task(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors"])
def test_a_weight_index_leads_nowhere_else(tmp_path, name):
    shape = write_checkpoint(tmp_path / "hf", "llama3_fp16_shards")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = dict.fromkeys(raw["weight_map"], name)
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="of this folder alone"):
        hf.open_weights(tmp_path / "hf", shape)


def test_names_in_conversations_and_models_make_no_paths(tmp_path):
    """Conversation ids and model names are free text; whatever they are, an evaluation writes inside its own folder."""
    folder = mini_task(tmp_path / "task")
    rows = run.read_jsonl(folder / "test.jsonl")
    for number, row in enumerate(rows):
        row["conversation_id"] = f"../../{number}"
    run.write_jsonl(folder / "test.jsonl", rows)
    before = files_under(tmp_path)
    with answering("Fine") as server:
        config = endpoint_config(folder, server.url, name="../../../escaped", model="../m")
        evaluate.main(config, tmp_path / "deep" / "er" / "run")
    made = files_under(tmp_path) - before
    assert made and all(file.is_relative_to(tmp_path / "deep" / "er" / "run") for file in made)
    assert {file.name for file in made} >= {"responses_.._.._.._escaped_0.jsonl"}


def files_under(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.is_file()}


def test_members_of_an_archive_are_read_and_never_unpacked():
    for file in CODE:
        assert not [name for name, _ in calls(file) if name.endswith((".extractall", "archive.extract", "unpack_archive"))], file


# Markup out of words


def test_markup_is_made_by_the_escaping_function_alone():
    """`Html(...)` says "already safe": outside its own room it wraps fixed text, constants, and `inert` JSON, no other value."""
    for file in CODE:
        source = file.read_text(encoding="utf-8")
        for name, call in calls(file) if file.name != "figures.py" else ():
            if name.split(".")[-1] == "Html" and call.args:
                inside = [ast.unparse(n.value) for n in ast.walk(call.args[0]) if isinstance(n, ast.FormattedValue)]
                fixed = isinstance(call.args[0], (ast.Constant, ast.JoinedStr)) and not call.args[1:]
                free = [value for value in inside if value != "inert" and not value.split(".")[-1].isupper()]
                assert fixed and not free, f"{file.relative_to(ROOT)}:{call.lineno} wraps what it did not escape"
                if "inert" in inside:
                    assert 'for character in "<>&' in source and "inert.replace(character" in source, file


def hostile(value, kept=()):
    """The same data with every word turned hostile, names of fields too, but for those in `kept`."""
    if isinstance(value, dict):
        return {k if k in kept else f"{k}{EVIL}": hostile(v, kept) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, kept) for v in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_a_hostile_corpus_changes_no_tag_of_its_page():
    """Ids, sources, licences, quoted overlaps and texts come from documents and domain files of others."""
    counts = {"documents_in": 3, "kept": 1, "characters": 10, "tokens": 5}
    report = {
        "documents_in": 3, "kept": 1, "tokens": 5, "rows": {"train": 1}, "contamination_left": 0,
        "failed_by_reason": {"encoding": 1}, "dropped_by_reason": {"short": 1},
        "sources": {"s": counts}, "would_fall_by_swallow_v1": {"s": {"rule": 1}},
        "characters_by_sector": {"bank": 10}, "documents_by_length": {"100": 1},
        "glossary": {"terms": 2, "found": 1, "missing": ["term"]}, "documents_with_seed_word": {"word": 1},
        "personal_data_masked": {"email": 1}, "characters_rewritten": {"width": 2}, "paragraphs_dropped": {"menu": 1},
        "contaminated": [{"source": "s", "id": "1", "test_set": "t", "conversation_id": "c", "turn": 0, "ngram": "n"}],
        "licences": [{"source": "s", "licence": "MIT", "attribution": "a", "reason": "r"}],
        "mixture": [{"source": "s", "folder": "f", "weight": 1, "share_of_rows": 1.0, "tokens": 5, "epochs": 1.0}],
        "samples": {"kept": [{"source": "s", "id": "1", "text": "t"}], "short": [{"source": "s", "id": "2", "text": "t"}]},
    }  # fmt: skip
    review = {"reviewed": 1, "disagreed": 1, "share": 1.0, "ci95": [0.1, 1.0],
              "by_rule": [{"rule": "short", "reviewed": 1, "disagreed": 1}]}  # fmt: skip
    kept = {*report, *review, *counts, *report["contaminated"][0], *report["licences"][0], *report["mixture"][0], "100",
            *report["glossary"], "text", "kept", "rule"}  # fmt: skip
    plain = Page(corpus_page.page(report, review))
    markup = corpus_page.page(hostile(report, kept), hostile(review, kept))
    assert Page(markup).tags == plain.tags and "script" not in plain.tags and "img" not in plain.tags
    assert " onerror=" not in re.sub(r">[^<]*<", "><", markup)


def test_each_page_forbids_what_it_does_not_bring():
    """The pages of the other writers are looked at with hostile words in test_report, test_browser and test_synth_stages."""
    from swallow_jax import figures

    page = figures.document(EVIL, [figures.h("p", EVIL, title=EVIL)])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src &#x27;none&#x27;" in policy and "script-src &#x27;none&#x27;" in policy and "unsafe-eval" not in policy
    assert Page(page).tags == ["html", "head", "meta", "meta", "meta", "title", "style", "body", "main", "p"]
    assert not Page(page).references


# Keys


class answering(http.server.ThreadingHTTPServer):  # noqa: N801 (a context)
    """An endpoint that answers `said`, or, told to leak, refuses and repeats the key it was sent."""

    daemon_threads = True

    def __init__(self, said: str, *, leaks: bool = False):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.said, self.leaks, self.keys = said, leaks, set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        self.server.keys.add(key)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.server.said}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        if self.server.leaks:
            body = {"error": {"message": f"the key {key} is not welcome", "headers": dict(self.headers)}}
        data = json.dumps(body).encode()
        self.send_response(401 if self.server.leaks else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def found_in(folder: Path) -> list[str]:
    return [str(file) for file in files_under(folder) if KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize("leaks", [False, True])
def test_a_key_is_sent_and_stands_nowhere(tmp_path, monkeypatch, capsys, caplog, leaks):
    """In no file, no message and no log line, also when the server repeats it."""
    monkeypatch.setenv("THE_KEY", KEY)
    caplog.set_level(logging.INFO)
    folder = mini_task(tmp_path / "task")
    with answering("Fine", leaks=leaks) as server:
        config = endpoint_config(folder, server.url, api_key_env="THE_KEY")
        if leaks:
            with pytest.raises(ValueError, match=r"\*\*\*") as stopped:
                evaluate.main(config, tmp_path / "run")
            assert KEY not in str(stopped.value)
        else:
            evaluate.main(config, tmp_path / "run")
    assert server.keys == {f"Bearer {KEY}"}
    printed = capsys.readouterr()
    assert not found_in(tmp_path) and KEY not in printed.out + printed.err + caplog.text
    assert "THE_KEY" in (tmp_path / "run" / "config.json").read_text()


def test_a_teachers_key_stands_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("THE_KEY", KEY)
    config = door.load_config(str(ROOT / "configs" / "synthesize" / "own.py") + f":{ROOT / 'configs' / 'tasks' / '_template'}")
    config.teachers.teacher.quotas.update({"train_pairs": 1, "dev_pairs": 0})
    config.budget.rounds = 1
    with answering("no JSON", leaks=True) as server:
        config.teachers.teacher.backend.update(
            {"base_url": server.url, "api_key_env": "THE_KEY", "attempts": 1, "backoff_s": 0.0}
        )
        synthesize.main(config, tmp_path / "run")
    assert server.keys == {f"Bearer {KEY}"}
    printed = capsys.readouterr()
    assert not found_in(tmp_path) and KEY not in printed.out + printed.err


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"backend": {"api_key": KEY}}, r"config\.backend\.api_key"),
        ({"models": [{"base_url": f"https://me:{KEY}@example.org/v1"}]}, r"config\.models\[0\]\.base_url"),
        ({"hub": {"hf_token": KEY}}, r"config\.hub\.hf_token"),
    ],
)
def test_a_config_that_holds_a_key_is_refused_before_it_is_written(tmp_path, config, where):
    with pytest.raises(ValueError, match=where) as stopped:
        run.open_run(tmp_path / "run", config, inputs={})
    assert KEY not in str(stopped.value) and not (tmp_path / "run").exists()


def test_names_of_variables_and_counts_of_tokens_are_no_keys(tmp_path):
    config = {"api_key_env": "OPENAI_API_KEY", "tokens_per_batch": 2048, "tokenizer": "runs/x", "base_url": "https://a.b/v1:8@c"}
    run.open_run(tmp_path / "run", config, inputs={})


# What the tests ran with


def test_the_lock_pins_all_that_the_tests_install_within_the_bounds_of_setup():
    import importlib.metadata

    pins = lock.read(lock.LOCK.read_text(encoding="utf-8"))
    here = ".".join(map(str, __import__("sys").version_info[:2]))
    wanted = lock.closure("swallow_jax", "test") - {"swallow-jax"}
    assert not [name for name in sorted(wanted) if here not in pins.get(name, {})], "run `python -m tests.lock`"
    for line in map(Requirement, importlib.metadata.requires("swallow_jax")):
        if line.marker is None or line.marker.evaluate({"extra": "test"}):
            version = pins[canonicalize_name(line.name)][here]
            assert line.specifier.contains(version), f"{line} is pinned to {version}; run `python -m tests.lock`"
    assert lock.read(lock.written(pins)) == pins


def test_a_remade_run_sends_nothing(tmp_path):
    """What an endpoint said is not asked for again in passing."""
    folder = mini_task(tmp_path / "task")
    with answering("Fine") as server:
        evaluate.main(endpoint_config(folder, server.url), tmp_path / "run")
    with pytest.raises(ValueError, match="endpoint"):
        lineage.remake(tmp_path / "run", lambda *_: pytest.fail("nothing is to be run"))
