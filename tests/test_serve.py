"""The server on a real socket: the engine's own answers, a 4xx with a reason for all else, and slots that come back."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import uvicorn

from swallow_jax.generate import backends, protocol, server
from swallow_jax.generate.echo import Echo
from tests.test_backends import MESSAGES, checkpoint, request  # noqa: F401  (checkpoint is a fixture)

ROOT = Path(__file__).parent.parent
LIMITS = server.Limits(body_bytes=20_000, body_s=1.0, answer_s=60.0, requests=6, choices=8)


@contextlib.contextmanager
def serving(backend, *, limits=LIMITS, **options):
    """A server in a thread: (service, port)."""
    service = server.Service("tiny", backend.engine, backend.tokenizer, limits=limits)
    app = server.app(service, **({"api_key": None} | options))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", http="h11", ws="none", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield service, listening.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()
        listening.close()
        if not service.sampler.failed:
            service.close()


@pytest.fixture(scope="module")
def local(checkpoint):  # noqa: F811
    section = {"kind": "jax", "path": str(checkpoint), "dtype": "float32", "slots": 2, "max_length": 128, "chunk": 4}
    return backends.open_backend(section | {"name": "tiny", "tokens_per_batch": 64})


@pytest.fixture(scope="module")
def served(local):
    with serving(local) as found:
        yield found


def post(port, path, body, *, headers=None, method="POST"):
    """(status, JSON answer)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def complete(port, **fields):
    status, answer = post(
        port, "/v1/completions", {"model": "tiny", "prompt": "保険", "max_tokens": 6, "temperature": 0} | fields
    )
    assert status == 200, answer
    return answer


def settled(service, seconds=20.0):
    """The service once nothing runs any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = service.health()
        if (state["under_way"], state["running"], state["queued"]) == (0, 0, 0):
            return state
        time.sleep(0.02)
    raise AssertionError(f"still at work: {service.health()}")


def test_texts_are_those_of_the_engine(local, served):
    _, port = served
    asked = [request(i, stop=("の",)) for i in range(3)] + [request(4, prompt=None, messages=MESSAGES, temperature=0.0)]
    expected = {r.key: r for r in local.generate(asked)}
    for one in asked:
        fields = {"model": "tiny", "max_tokens": one.max_new_tokens, "temperature": one.temperature, "top_k": one.top_k}
        fields |= {"top_p": one.top_p, "seed": one.seed, "stop": list(one.stop)}
        if one.messages is None:
            status, answer = post(port, "/v1/completions", fields | {"prompt": one.prompt})
            text = answer["choices"][0]["text"]
        else:
            status, answer = post(port, "/v1/chat/completions", fields | {"messages": list(one.messages)})
            text = answer["choices"][0]["message"]["content"]
        right = expected[one.key]
        assert (status, text, answer["choices"][0]["finish_reason"]) == (200, right.text, right.finish_reason)
        counts = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
        assert counts == (right.prompt_tokens, right.completion_tokens)


def test_samples_differ_from_each_other_and_not_from_run_to_run(local, served):
    _, port = served
    ids = local.tokenizer.encode("保険", add_bos=True)
    fields = {"prompt": ["保険", ids], "n": 3, "temperature": 2.0, "max_tokens": 32, "logprobs": 0}
    answers = [complete(port, **fields, seed=s)["choices"] for s in (1, 1, 2)]
    tokens = [[tuple(choice["logprobs"]["tokens"]) for choice in choices] for choices in answers]
    assert tokens[0] == tokens[1] and [choice["index"] for choice in answers[0]] == list(range(6))
    assert tokens[0][:3] == tokens[0][3:]  # a text and its token ids are one prompt
    assert len(set(tokens[0][:3])) == 3 and not set(tokens[0][:3]) & set(tokens[2][:3])


def test_the_endpoint_backend_scores_through_it_as_the_engine_does(local, served, checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _, port = served
    section = {
        "kind": "endpoint", "base_url": f"http://127.0.0.1:{port}/v1", "model": "tiny", "api_key_env": None, "concurrency": 2,
        "attempts": 1, "backoff_s": 0.1, "timeout_s": 60.0, "cache": None,
    }  # fmt: skip
    chat = backends.ScoreRequest(messages=MESSAGES, continuations=("虚偽の説明", "説明"))
    plain = backends.ScoreRequest(prompt="保険", continuations=("の説明", "料"))
    got = {r.key: r for r in backends.open_backend(section | {"tokenizer": str(checkpoint)}).score([chat, plain])}
    for expected in local.score([chat, plain]):
        assert (got[expected.key].greedy, got[expected.key].tokens) == (expected.greedy, expected.tokens)
        np.testing.assert_allclose(got[expected.key].logprobs, expected.logprobs, atol=1e-4)
    (as_text,) = backends.open_backend(section).score([plain])
    assert as_text == got[plain.key]


def test_logprobs_of_generated_tokens_are_those_of_the_echo(local, served):
    _, port = served
    ids = local.tokenizer.encode("保険の説明", add_bos=True)
    generated = complete(port, prompt=ids, logprobs=3)["choices"][0]
    echoed = complete(port, prompt=ids, logprobs=3, echo=True)["choices"][0]
    alone = complete(port, prompt=ids, logprobs=1, echo=True, max_tokens=1)["choices"][0]
    assert (
        echoed["text"] == "保険の説明" + generated["text"]
        and alone["logprobs"]["tokens"] == echoed["logprobs"]["tokens"][: len(ids) + 1]
    )
    new = generated["logprobs"]["token_logprobs"]
    assert len(new) == 6 and echoed["logprobs"]["token_logprobs"][len(ids) :] == new
    np.testing.assert_allclose(
        alone["logprobs"]["token_logprobs"][1:], echoed["logprobs"]["token_logprobs"][1 : len(ids) + 1], atol=1e-5
    )
    for logprob, top in zip(new, generated["logprobs"]["top_logprobs"], strict=True):
        assert logprob == max(top.values()) and len(top) == 3  # greedy
    nothing = complete(port, prompt=ids, logprobs=0, echo=True, max_tokens=0)
    assert nothing["usage"]["completion_tokens"] == 0 and len(nothing["choices"][0]["logprobs"]["tokens"]) == len(ids)
    fields = {"model": "tiny", "messages": list(MESSAGES), "max_completion_tokens": 3, "temperature": 0}
    _, answer = post(port, "/v1/chat/completions", fields | {"logprobs": True, "top_logprobs": 2})
    content = answer["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)


def test_long_texts_are_scored_in_pieces_as_in_one(local, monkeypatch):
    from swallow_jax.generate import echo

    ids = list(np.random.default_rng(0).integers(0, 280, 100))
    tell = Echo(local.engine.params, local.engine.config, local.engine.compute)
    whole = tell(ids, top=2)
    monkeypatch.setattr(echo, "_PIECE", 32)
    monkeypatch.setattr(echo, "_SCORES", 288 * 5)
    jax.clear_caches()
    pieces = tell(ids, top=2)
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_array_equal(pieces.top_ids, whole.top_ids)


BAD = {
    "no JSON": b"prompt",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe",
    "nested": b"[" * 15_000,
    "a long number": b'{"model": "tiny", "prompt": "a", "seed": ' + b"1" * 5000 + b"}",
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "no object": b"[1]",
    "half a surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
    "half a surrogate in a name": b'{"model": "tiny", "prompt": "a", "\\ud800": 1}',
    "half a surrogate as a model": b'{"model": "\\ud800", "prompt": "a"}',
    "another model": {"model": "gpt", "prompt": "a"},
    "no model": {"prompt": "a"},
    "no prompt": {"model": "tiny"},
    "null prompt": {"model": "tiny", "prompt": None},
    "no prompts": {"model": "tiny", "prompt": []},
    "no tokens": {"model": "tiny", "prompt": [[]]},
    "mixed prompt": {"model": "tiny", "prompt": [1, "a"]},
    "booleans": {"model": "tiny", "prompt": [True, False]},
    "a token outside": {"model": "tiny", "prompt": [288]},
    "a negative token": {"model": "tiny", "prompt": [5, -1]},
    "too long": {"model": "tiny", "prompt": "保" * 200},
    "too many tokens": {"model": "tiny", "prompt": "a", "max_tokens": 128},
    "no tokens wanted": {"model": "tiny", "prompt": "a", "max_tokens": 0},
    "too many samples": {"model": "tiny", "prompt": "a", "n": 9},
    "too many prompts": {"model": "tiny", "prompt": ["a"] * 5, "n": 2},
    "cold": {"model": "tiny", "prompt": "a", "temperature": 1e-30},
    "hot": {"model": "tiny", "prompt": "a", "temperature": 2.5},
    "no nucleus": {"model": "tiny", "prompt": "a", "top_p": 0},
    "a word for a number": {"model": "tiny", "prompt": "a", "max_tokens": "6"},
    "truth for a number": {"model": "tiny", "prompt": "a", "max_tokens": True},
    "half a token": {"model": "tiny", "prompt": "a", "max_tokens": 1.5},
    "a negative seed": {"model": "tiny", "prompt": "a", "seed": -1},
    "numbers to stop at": {"model": "tiny", "prompt": "a", "stop": [1]},
    "too many stops": {"model": "tiny", "prompt": "a", "stop": ["x"] * 17},
    "too many logprobs": {"model": "tiny", "prompt": "a", "logprobs": 21},
    "streaming": {"model": "tiny", "prompt": "a", "stream": True},
    "a penalty": {"model": "tiny", "prompt": "a", "presence_penalty": 0.5},
    "unknown": {"model": "tiny", "prompt": "a", "min_p": 0.1},
}
BAD_CHATS = {
    "no messages": {"messages": []},
    "a text": {"messages": "a"},
    "texts": {"messages": ["a"]},
    "an unknown role": {"messages": [{"role": "wizard", "content": "a"}]},
    "a role that cannot be": {"messages": [{"role": [], "content": "a"}]},
    "no content": {"messages": [{"role": "user"}]},
    "a name": {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "half a surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
    "two limits": {"messages": list(MESSAGES), "max_tokens": 1, "max_completion_tokens": 1},
    "top without logprobs": {"messages": list(MESSAGES), "top_logprobs": 1},
    "a schema": {"messages": list(MESSAGES), "response_format": {"type": "json_object"}},
    "a tool": {"messages": list(MESSAGES), "tools": []},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_completion_is_refused_with_a_reason(served, name):
    status, answer = post(served[1], "/v1/completions", BAD[name])
    assert 400 <= status < 500 and len(answer["error"]["message"]) > 10
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_chat_is_refused_with_a_reason(served, name):
    status, answer = post(served[1], "/v1/chat/completions", {"model": "tiny"} | BAD_CHATS[name])
    assert 400 <= status < 500 and len(answer["error"]["message"]) > 10


def test_other_refusals_and_the_health_of_the_service(served):
    service, port = served
    good = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert post(port, "/v1/completions", good, headers={"Content-Type": "text/plain"})[0] == 415
    assert post(port, "/v1/completions", b"x" * 3_000_000)[0] == 413  # the answer arrives though the body is not wanted
    assert post(port, "/v2/nothing", good)[0] == 404
    assert post(port, "/v1/completions", b"", method="GET")[0] == 405
    status, listed = post(port, "/v1/models", b"", method="GET")
    assert (status, listed["data"][0]["id"]) == (200, "tiny")
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in slow.recv(100)
    state = settled(service)
    assert state["status"] == "ok" and state["slots"] == 2
    paths = post(port, "/openapi.json", b"", method="GET")[1]["paths"]
    assert set(paths) == {"/v1/models", "/health", "/v1/completions", "/v1/chat/completions"}


def test_the_key_is_asked_for(local):
    with serving(local, api_key="right") as (_, port):
        good = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer right"}, 200)):
            assert post(port, "/v1/completions", good, headers=headers)[0] == status
            assert post(port, "/v1/models", b"", method="GET", headers=headers)[0] == status
        assert post(port, "/health", b"", method="GET")[0] == 200


def hang_up(port, body, after):
    """Send a request and close the connection without reading."""
    data = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 100, "temperature": 1.0} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        time.sleep(after)


def test_clients_that_hang_up_leave_no_slot_behind(local):
    with serving(local) as (service, port):
        expected = complete(port)["choices"]
        given_up = []
        service.sampler.submit, submit = lambda *a: given_up.append(submit(*a)) or given_up[-1], service.sampler.submit
        threads = [threading.Thread(target=hang_up, args=(port, {"n": 8, "seed": i}, 0.02)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settled(service)
        # Those that had not begun are cancelled; of the others most ended early.
        lengths = [len(t.future.result().tokens) for t in given_up if not t.future.cancelled()]
        assert given_up and sum(lengths) < len(given_up) * 50
        assert complete(port)["choices"] == expected


def test_more_requests_than_allowed_are_told_to_come_again(local):
    import dataclasses

    with serving(local, limits=dataclasses.replace(LIMITS, requests=1)) as (service, port):
        thread = threading.Thread(target=hang_up, args=(port, {"n": 8, "max_tokens": 126}, 1.0))
        thread.start()
        while not service.under_way:
            time.sleep(0.005)
        assert post(port, "/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 429
        thread.join()
        settled(service)


def test_an_answer_that_takes_too_long_is_given_up(local):
    import dataclasses

    with serving(local, limits=dataclasses.replace(LIMITS, answer_s=0.01)) as (service, port):
        status, answer = post(port, "/v1/completions", {"model": "tiny", "prompt": ["b"] * 8, "max_tokens": 126})
        assert status == 503 and "no answer within 0.01 s" in answer["error"]["message"]
        settled(service)


def test_an_engine_that_fails_is_no_engine_that_hangs(local, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            return getattr(local.engine, name)

        def generate(self, jobs):
            next(iter(jobs))
            raise ValueError("the model's scores are not finite")

    class Backend:
        engine, tokenizer = Broken(), local.tokenizer

    died = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with serving(Backend, on_failure=died.set) as (_, port):
        status, answer = post(port, "/v1/completions", {"model": "tiny", "prompt": "a"})
        assert status == 503 and "engine has stopped" in answer["error"]["message"] and died.is_set()
        assert post(port, "/health", b"", method="GET")[0] == 503
        assert post(port, "/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 503


def test_tokens_that_are_no_characters_are_told_by_number(local):
    speller = protocol.Speller(local.tokenizer)
    piece = local.tokenizer.encode("🎌")
    assert all(speller.spell(i).startswith("token_id:") for i in piece) and len(piece) > 1
    ids = local.tokenizer.encode("a🎌b")
    assert speller.offsets(ids) == [0, *[1] * len(piece), 2]


def test_a_signal_lets_requests_under_way_finish(checkpoint):  # noqa: F811
    command = [
        sys.executable, "-m", "tools.serve", f"--path={checkpoint}", "--dtype=float32", "--max_length=128", "--port=0",
        "--slots=2", "--name=tiny", "--api_key_env=TEST_SERVE_KEY",
    ]  # fmt: skip
    environment = os.environ | {"TEST_SERVE_KEY": "secret-key"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(next(line for line in process.stderr if line.startswith("serving")).rsplit(":", 1)[1].split("/")[0])
        found = []
        body = {"model": "tiny", "prompt": ["a"] * 16, "max_tokens": 120, "temperature": 1.0, "seed": 3}
        key = {"Authorization": "Bearer secret-key"}
        asking = threading.Thread(target=lambda: found.append(post(port, "/v1/completions", body, headers=key)))
        asking.start()
        while not post(port, "/health", b"", method="GET")[1]["running"]:
            assert not found, found
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking.join()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert found[0][0] == 200 and len(found[0][1]["choices"]) == 16
    assert process.returncode == 0 and json.loads(out.splitlines()[-1])["answered"] == 1 and "secret" not in out + err
    with pytest.raises(ConnectionRefusedError):
        post(port, "/health", b"", method="GET")


def test_only_this_machine_is_served_without_a_key():
    command = [sys.executable, "-m", "tools.serve", "--path=x", "--dtype=float32", "--max_length=9", "--host=0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "name the key's variable with --api_key_env" in done.stderr
