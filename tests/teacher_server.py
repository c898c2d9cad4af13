"""A teacher on loopback: a real HTTP server that answers chat requests as a function of what was asked, and can misbehave."""

import collections
import contextlib
import dataclasses
import http.server
import json
import random
import threading
import time
from collections.abc import Callable, Iterator

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def english(name: str, words: int) -> str:
    """A made-up English-looking sentence, a function of its name; it shares no 13 letters with others."""
    rng = random.Random(name)
    said = " ".join("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4))) for _ in range(words))
    return said.capitalize() + "."


@dataclasses.dataclass
class Answer:
    text: str = ""
    status: int = 200
    finish_reason: str = "stop"
    delay: float = 0.0


class Server(http.server.ThreadingHTTPServer):
    """`behave(content, attempt)` gives the answer to the last message of a request that comes for the attempt-th time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave: Callable[[str, int], Answer]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.asked: list[str] = []
        self.times: collections.Counter = collections.Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed hangs up


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(content)
            self.server.times[content] += 1
            attempt = self.server.times[content]
        answer = self.server.behave(content, attempt)
        time.sleep(answer.delay)
        message = {"role": "assistant", "content": answer.text}
        usage = {"prompt_tokens": len(content) // 4, "completion_tokens": len(answer.text) // 4, "total_tokens": 0}
        data = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "usage": usage,
                "choices": [{"index": 0, "finish_reason": answer.finish_reason, "message": message}]}  # fmt: skip
        data = json.dumps(data if answer.status == 200 else {"error": {"message": "planned"}}).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(behave: Callable[[str, int], Answer]) -> Iterator[Server]:
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
