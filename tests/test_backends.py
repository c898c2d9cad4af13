"""One door to three generators: the same requests, the same keys, and jobs that go on where they were killed."""

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from swallow_jax import hf, llama, run, text
from swallow_jax.generate import backends, endpoint

COMPUTE = llama.Compute(dtype="float32", remat="none", scan_layers=False, attention="xla")
JAPANESE = "募集人が重要事項を説明しました🎌。お客様は保険料について質問しました。"
MESSAGES = ({"role": "user", "content": "保険の説明"},)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An HF folder: a byte-level vocabulary with few merges (characters span tokens) and a tiny random model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = text.train_bpe(
        [JAPANESE] * 4, vocab_size=280, folder=folder, chat_template=text.LLAMA3_CHAT_TEMPLATE,
        special_tokens=text.SPECIAL_TOKENS,
    )  # fmt: skip
    config = llama.LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    params = llama.init_params(config, jax.random.key(1), jnp.float32)
    # An embedding that prefers the bytes of the Japanese text, so that whole characters come out now and then.
    params["embed"] = params["embed"].at[jnp.array(sorted(set(tokenizer.encode(JAPANESE))))].multiply(2.0)
    hf.save(folder / "hf", params, config, dtype="float32", source_folder=folder)
    return folder / "hf"


@pytest.fixture(scope="module")
def local(checkpoint):
    section = {"kind": "jax", "path": str(checkpoint), "dtype": "float32", "slots": 2, "max_length": 128, "chunk": 8}
    return backends.open_backend(section | {"name": "tiny", "licence": "Apache-2.0", "tokens_per_batch": 64})


def request(number=0, **changes):
    fields = {"prompt": f"質問{number}", "max_new_tokens": 12, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
    return backends.Request(**(fields | {"seed": number, "stop": ()} | changes))


# Requests.


def test_a_key_is_a_function_of_the_request_and_never_changes():
    chat = request(messages=MESSAGES, prompt=None)
    assert chat.key == request(messages=tuple(dict(m) for m in MESSAGES), prompt=None).key
    changes = {"prompt": "別", "max_new_tokens": 9, "temperature": 0.1, "top_k": 0, "top_p": 1.0, "seed": 5, "stop": ("。",)}
    assert len({request(**{name: value}).key for name, value in changes.items()} | {request().key}) == 8
    assert request(temperature=0).key == request(temperature=0.0).key
    assert request().key == run.sha256_json(dataclasses.asdict(request()))
    # Golden: recorded files in the repository are found by these keys.
    assert request().key.startswith("ce09a763b089")
    assert backends.ScoreRequest(prompt="a", continuations=("b",)).key.startswith("f2a1a126ebe4")


def test_a_request_has_a_prompt_or_messages():
    with pytest.raises(ValueError, match="one of the two"):
        request(messages=MESSAGES)
    with pytest.raises(ValueError, match="one of the two"):
        backends.ScoreRequest(continuations=("a",))


def test_the_door_is_cheap_to_import():
    code = "import sys, swallow_jax.generate.backends; print([m for m in ('jax', 'openai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# The JAX engine.


def test_texts_end_before_the_first_stop_string(local):
    free = {r.key: r for r in local.generate([request(i, max_new_tokens=40) for i in range(6)])}
    stops = 0
    for i in range(6):
        whole = free[request(i, max_new_tokens=40).key]
        characters = [c for c in whole.text[2:] if c != "\ufffd"]
        if not characters:
            continue
        stop = characters[len(characters) // 2]
        (cut,) = local.generate([request(i, max_new_tokens=40, stop=("never there", stop))])
        assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
        assert cut.completion_tokens < whole.completion_tokens
        stops += 1
    assert stops >= 3


def test_results_carry_key_counts_and_logprob(local):
    requests = [request(i, temperature=0.0, max_new_tokens=6) for i in range(3)] + [
        request(9, prompt=None, messages=MESSAGES, temperature=0.0)
    ]
    results = {result.key: result for result in local.generate(requests)}
    assert set(results) == {r.key for r in requests}
    for asked in requests[:3]:
        result = results[asked.key]
        assert result.prompt_tokens == len(local.tokenizer.encode(asked.prompt, add_bos=True))
        assert result.finish_reason in ("stop", "length") and result.logprob < 0
        assert result.completion_tokens == 6 or result.finish_reason == "stop"
    assert results[requests[3].key].prompt_tokens == len(local.tokenizer.render_chat(list(MESSAGES), add_generation_prompt=True))
    assert local.describe()["licence"] == "Apache-2.0" and len(local.describe()["sha256"]) == 64


def test_incomplete_characters_are_held_back_however_the_tokens_are_cut(local):
    ids = local.tokenizer.encode(JAPANESE)
    assert len(ids) > len(JAPANESE)  # characters do span tokens
    for size in (1, 2, 3, 7, len(ids)):
        seen = backends.StopText(local.tokenizer.decode, ())
        for start in range(0, len(ids), size):
            assert seen.push(ids[start : start + size]) is None
            assert JAPANESE.startswith(seen.text)
        assert seen.text == JAPANESE
        stopped = backends.StopText(local.tokenizer.decode, ("お客様", "説明しました"))
        for start in range(0, len(ids), size):
            if (count := stopped.push(ids[start : start + size])) is not None:
                break
        assert stopped.text == "募集人が重要事項を"
        assert local.tokenizer.decode(ids[: start + count]).endswith("説明しました")
    half = backends.StopText(local.tokenizer.decode, ())
    half.push(local.tokenizer.encode("あ🎌")[:-1])
    assert half.text == "あ"


def test_continuations_have_the_tokens_that_training_saw(local):
    asked = backends.ScoreRequest(messages=MESSAGES, continuations=("虚偽の説明", "説明"))
    context = backends.context_ids(local.tokenizer, asked)
    for label in asked.continuations:
        ids, weights = local.tokenizer.chat_sample([*MESSAGES, {"role": "assistant", "content": label}], train_on="last")
        trained = [i for i, w in zip(ids, weights, strict=True) if w]
        assert backends.continuation_ids(local.tokenizer, asked, context, label) == trained[:-1]  # without the end of turn
        assert ids[: len(context)] == context
    merged = backends.ScoreRequest(prompt="重要", continuations=("事項",))
    context = backends.context_ids(local.tokenizer, merged)
    assert local.tokenizer.decode(backends.continuation_ids(local.tokenizer, merged, context, "事項")) == "事項"


def test_a_tokenizer_larger_than_the_model_is_refused(local, checkpoint):
    params, config = hf.load(checkpoint)
    with pytest.raises(ValueError, match=r"280 tokens.*100.*do not belong together"):
        backends.JaxBackend(
            params, dataclasses.replace(config, vocab_size=100), local.tokenizer, compute=COMPUTE, slots=2, max_length=64,
            chunk=4, tokens_per_batch=64, name="wrong",
        )  # fmt: skip


def test_a_section_with_a_wrong_field_is_refused():
    with pytest.raises(ValueError, match="kind='vllm'; known: jax, endpoint, recorded"):
        backends.open_backend({"kind": "vllm"})
    with pytest.raises(ValueError, match="unknown field slot"):
        backends.open_backend({"kind": "jax", "path": "x", "dtype": "float32", "slot": 2, "max_length": 10})
    with pytest.raises(ValueError, match="missing field slots"):
        backends.open_backend({"kind": "jax", "path": "x", "dtype": "float32", "max_length": 10})


# Recorded files.


class Counting:
    """A real backend, seen from outside: which requests reached it."""

    def __init__(self, backend):
        self.backend, self.name, self.asked = backend, backend.name, []

    def _note(self, requests):
        for asked in requests:
            self.asked.append(asked.key)
            yield asked

    def generate(self, requests):
        return self.backend.generate(self._note(requests))

    def score(self, requests):
        return self.backend.score(self._note(requests))


def test_a_killed_job_continues_and_ends_with_the_same_lines(local, tmp_path):
    requests = [request(i) for i in range(10)]
    straight = list(backends.record(local, tmp_path / "straight.jsonl").generate(requests))
    killed = tmp_path / "killed.jsonl"
    job = backends.record(Counting(local), killed, teacher="tiny").generate(requests)
    for _ in range(4):
        next(job)
    job.close()
    with open(killed, "ab") as f:  # the kill came in the middle of a line
        f.write('{"key": "abc", "text": "途'.encode()[:-1])
    counting = Counting(local)
    rest = list(backends.record(counting, killed, teacher="tiny").generate([*requests, *requests]))
    assert len(counting.asked) == 6
    assert {r.key: r for r in rest} == {r.key: r for r in straight} and len(rest) == 10
    lines = run.read_jsonl(killed)
    assert sorted(line["key"] for line in lines) == sorted(r.key for r in requests)
    assert {line["teacher"] for line in lines} == {"tiny"} and {line["model"] for line in lines} == {"tiny"}
    again = Counting(local)
    assert len(list(backends.record(again, killed, teacher="tiny").generate(requests))) == 10 and again.asked == []


def test_what_was_recorded_is_replayed(local, tmp_path):
    texts, scores = [request(i) for i in range(3)], [backends.ScoreRequest(messages=MESSAGES, continuations=("あ", "説明"))]
    kept = backends.record(local, tmp_path / "kept.jsonl")
    first = [*kept.generate(texts), *kept.score(scores)]
    recorded = backends.open_backend({"kind": "recorded", "path": str(tmp_path / "kept.jsonl")})
    replayed = [*recorded.generate(texts), *recorded.score(scores)]
    assert {r.key: r for r in replayed} == {r.key: r for r in first}
    assert recorded.describe()["model"] == "tiny"


def test_a_job_tells_its_progress_at_a_terminal_alone(local, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    requests = [request(i) for i in range(5)]
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread is left behind
        job = backends.record(local, tmp_path / "job.jsonl").generate(requests)
        for _ in job:
            time.sleep(0.12)  # the bar is drawn ten times a second at most
        if not stream.isatty():
            assert stream.getvalue() == ""
            (tmp_path / "job.jsonl").unlink()
    bar = stream.getvalue().split("\r")
    assert any("tiny:" in part and "/5 " in part and "tok/s" in part and "/2 slots" in part and "GB/s" in part for part in bar)


def test_a_hand_written_recording_needs_only_key_and_text(tmp_path):
    path = tmp_path / "teacher.jsonl"
    run.write_jsonl(path, [{"key": request(1).key, "text": "答え", "provenance": "written for a test"}])
    recorded = backends.RecordedBackend(path, missing="skip")
    assert [r.text for r in recorded.generate([request(0), request(1)])] == ["答え"] and recorded.missed == 1
    with pytest.raises(ValueError, match="holds no answer to '質問0'"):
        list(backends.RecordedBackend(path).generate([request(0)]))


def test_a_broken_recording_is_refused_with_its_place(tmp_path, local):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"key": "a", "text": "1"}\n{"key": "b"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.jsonl:2: not JSON"):
        backends.RecordedBackend(path)
    path.write_text('{"key": "a", "text": "1"}\n{"key": "a", "text": "2"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="two different answers for the key a"):
        backends.RecordedBackend(path)
    with pytest.raises(ValueError, match="begun with the model None, not 'tiny'"):
        backends.record(local, path)


# An endpoint: a real server on loopback, the real client.


class Server(http.server.ThreadingHTTPServer):
    """Speaks the API as far as we use it; `plan` holds statuses to give before answering, in order."""

    daemon_threads = True

    def __init__(self, local, plan=(), *, logprobs=True, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.local, self.plan, self.logprobs, self.delay = local, list(plan), logprobs, delay
        self.seen, self.keys, self.busy, self.busiest, self.lock = [], set(), 0, 0, threading.Lock()

    @functools.cached_property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            server.seen.append((self.path, body))
            server.keys.add(self.headers["Authorization"])
            status = server.plan.pop(0) if server.plan else 200
        time.sleep(server.delay)
        if status == 200:
            answer = self.scores(body) if body.get("echo") else self.answer(body)
        else:
            answer = {"error": {"message": f"planned {status} for {self.headers['Authorization']}"}}
        with server.lock:
            server.busy -= 1
        data, kind = json.dumps(answer).encode(), "application/json"
        if isinstance(status, tuple):  # a proxy's own words instead of an answer
            status, kind, data = status
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body):
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        shared = {"id": "x", "created": 1, "model": body["model"], "usage": usage}
        if "messages" in body:
            message = {"role": "assistant", "content": "答え:" + body["messages"][-1]["content"]}
            return shared | {
                "object": "chat.completion",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
        choice = {"index": 0, "finish_reason": "length", "text": "続き:" + body["prompt"], "logprobs": None}
        return shared | {"object": "text_completion", "choices": [choice]}

    def scores(self, body):
        """Echo with log-probabilities from a full forward of the same checkpoint; one greedy token behind, as servers give it."""
        local, prompt = self.server.local, body["prompt"]
        ids = local.tokenizer.encode(prompt, add_bos=True) if isinstance(prompt, str) else prompt
        tokens = np.zeros((1, 96), np.int32)  # one shape: one compilation
        tokens[0, : len(ids)] = ids
        logprobs_TV = np.asarray(_full(local.engine.params, tokens, config=local.engine.config))[: len(ids)]
        ids = [*ids, int(logprobs_TV[-1].argmax())]
        given = [None] + [float(logprobs_TV[t, i]) for t, i in enumerate(ids[1:])]
        top = [None] + [{str(int(row.argmax())): float(row.max())} for row in logprobs_TV]
        starts = [len(local.tokenizer.decode(ids[:t]).rstrip("\ufffd")) for t in range(len(ids))]
        logprobs = {"tokens": [str(i) for i in ids], "token_logprobs": given, "top_logprobs": top, "text_offset": starts}
        choice = {"index": 0, "finish_reason": "length", "text": "", "logprobs": logprobs if self.server.logprobs else None}
        return {"id": "x", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}


@functools.partial(jax.jit, static_argnames="config")
def _full(params, tokens, *, config):
    hidden, _ = llama.forward(params, config, COMPUTE, tokens, jnp.arange(tokens.shape[1])[None])
    return jax.nn.log_softmax(llama.logits(params, config, hidden[0]))


@contextlib.contextmanager
def serving(local, *plan, **options):
    server = Server(local, plan, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "secret-key-123")


def connect(server, **changes):
    section = {
        "kind": "endpoint", "base_url": server.url, "model": "teacher-70b", "api_key_env": "TEST_ENDPOINT_KEY",
        "concurrency": 3, "attempts": 4, "backoff_s": 0.01, "timeout_s": 20.0, "cache": None,
    }  # fmt: skip
    return backends.open_backend(section | changes)


def test_throttling_and_server_errors_are_retried(local):
    requests = [request(i, prompt=None, messages=({"role": "user", "content": str(i)},), stop=("。",)) for i in range(5)]
    with serving(local, 429, 500, 503) as server:
        backend = connect(server)
        results = {r.key: r for r in backend.generate(requests)}
    assert [results[r.key].text for r in requests] == [f"答え:{i}" for i in range(5)]
    assert backend.counts == {"sent": 8, "retried": 3, "cached": 0, "prompt_tokens": 15, "completion_tokens": 20}
    path, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stop"], body["top_k"]) == (12, 0.9, 0.95, ["。"], 30)
    assert {body["seed"] for _, body in server.seen} == set(range(5))
    assert server.keys == {"Bearer secret-key-123"}


def test_an_answer_that_is_none_is_asked_for_again(local):
    strange = [(200, "text/html", b"<p>busy"), (200, "application/json", b"{"), (200, "application/json", b'{"choices": []}')]
    with serving(local, *strange) as server:
        backend = connect(server)
        (result,) = backend.generate([request()])
        assert result.text == "続き:質問0" and backend.counts["retried"] == 3
    with (
        serving(local, *strange) as server,
        pytest.raises(endpoint.EndpointError, match="in 3 attempts .an answer without choices"),
    ):
        list(connect(server, attempts=3).generate([request()]))


def test_schema_and_cost_are_passed_through_and_told(local):
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    with serving(local) as server:
        backend = connect(server, extra={"response_format": schema}, prices={"prompt": 2.0, "completion": 10.0})
        list(backend.generate([request(), request(1)]))
        assert [body["response_format"] for _, body in server.seen] == [schema] * 2
        assert backend.describe()["cost_dollars"] == pytest.approx((6 * 2.0 + 8 * 10.0) / 1e6)
        assert "$0.00" in backend.activity(1.0)
        with pytest.raises(ValueError, match="dollars a million tokens"):
            connect(server, prices={"input": 1.0})


def test_a_refused_request_is_not_retried_and_the_key_stays_secret(local, tmp_path):
    with (
        serving(local, 400) as server,
        pytest.raises(endpoint.EndpointError, match=r"refuses the request .400.: .*planned 400") as e,
    ):
        list(connect(server, cache=str(tmp_path / "cache.jsonl")).generate([request()]))
    assert len(server.seen) == 1
    assert "secret" not in str(e.value)
    backend = connect(server)
    assert "secret" not in json.dumps(backend.describe()) + repr(backend.options)


def test_a_server_that_stays_down_is_an_error_after_the_allowed_attempts(local):
    with (
        serving(local, *[500] * 9) as server,
        pytest.raises(endpoint.EndpointError, match=r"no answer in 4 attempts .status 500"),
    ):
        list(connect(server, concurrency=1).generate([request()]))
    assert len(server.seen) == 4
    with pytest.raises(endpoint.EndpointError, match=r"no answer in 2 attempts .APIConnectionError"):  # closed by now
        list(connect(server, attempts=2).generate([request()]))


def test_successes_are_cached_by_payload(local, tmp_path):
    cache = str(tmp_path / "cache.jsonl")
    with serving(local, 500) as server:
        first = list(connect(server, cache=cache).generate([request(1), request(2)]))
        assert len(server.seen) == 3
        again = connect(server, cache=cache)
        assert {r.key: r for r in again.generate([request(1), request(2), request(3)])} == {r.key: r for r in first} | {
            request(3).key: next(connect(server).generate([request(3)]))
        }
        assert again.counts["cached"] == 2 and again.counts["sent"] == 1
        list(connect(server, cache=cache, model="another").generate([request(1)]))
        assert len(server.seen) == 6  # another model: another payload
    assert "secret" not in (tmp_path / "cache.jsonl").read_text()


def test_at_most_the_configured_number_of_requests_is_under_way(local):
    with serving(local, delay=0.05) as server:
        assert len(list(connect(server).generate([request(i) for i in range(9)]))) == 9
    assert server.busiest == 3


def test_a_reader_that_stops_leaves_no_thread_behind(local):
    before = threading.active_count()
    with serving(local) as server:
        results = connect(server).generate([request(i) for i in range(9)])
        next(results)
        results.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_endpoint_scores_equal_those_of_the_engine(local, checkpoint):
    chat = backends.ScoreRequest(messages=MESSAGES, continuations=("虚偽の説明", "説明"))
    plain = backends.ScoreRequest(prompt="保険", continuations=("の説明", "料"))
    with serving(local) as server:
        with_tokens = {r.key: r for r in connect(server, tokenizer=str(checkpoint)).score([chat, plain])}
        as_text = next(connect(server).score([plain]))
        with pytest.raises(endpoint.EndpointError, match="name the model's `tokenizer`"):
            list(connect(server).score([chat]))
    for expected in local.score([chat, plain]):
        got = with_tokens[expected.key]
        assert (got.greedy, got.tokens) == (expected.greedy, expected.tokens)
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(as_text.logprobs, with_tokens[plain.key].logprobs, rtol=1e-6)
    assert as_text.tokens == with_tokens[plain.key].tokens


def test_an_endpoint_without_prompt_logprobs_says_so(local):
    with serving(local, logprobs=False) as server, pytest.raises(endpoint.EndpointError, match="gives no log-probabilities"):
        list(connect(server).score([backends.ScoreRequest(prompt="a", continuations=("b",))]))


def test_a_missing_key_names_its_variable(local, monkeypatch):
    monkeypatch.delenv("TEST_ENDPOINT_KEY")
    with serving(local) as server, pytest.raises(ValueError, match="set the environment variable TEST_ENDPOINT_KEY"):
        connect(server)
