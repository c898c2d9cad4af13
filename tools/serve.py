"""Serve a model with OpenAI's protocol: /v1/models, /v1/completions, /v1/chat/completions, /health, /openapi.json.

    python -m tools.serve --path=exported --dtype=bfloat16 --max_length=8192
    python -m tools.serve --path=configs/base --dtype=float32 --max_length=512 --port=8000

--path is an HF folder (tools.export makes one of a run) or a GGUF file. The server listens on this machine alone; another
--host needs --api_key_env, the name of an environment variable that holds the key clients must send. It says when it is
ready. SIGTERM or Ctrl-C: it takes no new requests, finishes those under way within --drain_s, and ends. lm-eval's
local-completions takes base_url=http://127.0.0.1:8000/v1/completions,model=NAME,tokenizer=PATH, for Llama 2 and 3 also
add_bos_token=True, or its scores are those of texts without a beginning. For fleets serve the exported folder with vLLM.
"""

import ipaddress
import os
import signal
import socket
import sys
from typing import Any

from absl import flags

from experiments import door

_PATH = flags.DEFINE_string("path", None, "HF folder or GGUF file")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype")
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "tokens of a prompt and its answer together")
_INT8 = flags.DEFINE_boolean("int8", False, "weights of 8 bits")
_NAME = flags.DEFINE_string("name", None, "what clients call the model (default: the folder's name)")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer folder, where it does not lie beside the weights")
_SLOTS = flags.DEFINE_integer("slots", 8, "sequences decoded together")
_CHUNK = flags.DEFINE_integer("chunk", 8, "decode steps between two looks at the queue")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port; 0 takes a free one")
_KEY = flags.DEFINE_string("api_key_env", None, "environment variable that holds the key clients must send")
_REQUESTS = flags.DEFINE_integer("requests", 128, "requests under way at once, waiting ones included; more are answered 429")
_CHOICES = flags.DEFINE_integer("choices", 128, "answers to one request: prompts times n")
_BODY = flags.DEFINE_integer("body_bytes", 1 << 20, "largest body")
_BODY_S = flags.DEFINE_float("body_s", 20.0, "seconds a client has to send its body")
_ANSWER_S = flags.DEFINE_float("answer_s", 600.0, "seconds one answer may take, waiting for a slot included")
_DRAIN_S = flags.DEFINE_integer("drain_s", 60, "seconds that requests under way have to finish after SIGTERM")


def main() -> dict[str, Any]:
    """Serve until a signal comes; returns what was answered."""
    missing = [f"--{f.name}" for f in (_PATH, _DTYPE, _MAX_LENGTH) if f.value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; --help shows an example")
    api_key = None
    if _KEY.value:
        api_key = os.environ.get(_KEY.value)
        if not api_key:
            raise ValueError(f"set the environment variable {_KEY.value} to the key that clients must send")
    elif not _loopback(_HOST.value):
        raise ValueError(f"--host={_HOST.value} is reachable by others; name the key's variable with --api_key_env")
    import uvicorn

    from swallow_jax.generate import backends, server

    listening = _listen(_HOST.value, _PORT.value)  # before the weights: a port that is taken is told at once
    backend = backends.open_backend(
        {
            "kind": "jax", "path": _PATH.value, "dtype": _DTYPE.value, "slots": _SLOTS.value, "max_length": _MAX_LENGTH.value,
            "int8": _INT8.value, "name": _NAME.value, "tokenizer": _TOKENIZER.value, "chunk": _CHUNK.value,
        }
    )  # fmt: skip
    limits = server.Limits(
        body_bytes=_BODY.value, body_s=_BODY_S.value, answer_s=_ANSWER_S.value, requests=_REQUESTS.value, choices=_CHOICES.value
    )
    warm_up = backends.Request(
        prompt="a", max_new_tokens=2, temperature=1.0, top_k=0, top_p=1.0, seed=0, stop=()
    )  # the programs are compiled before the first client waits for them
    for _ in backend.generate([warm_up]):
        pass
    service = server.Service(backend.name, backend.engine, backend.tokenizer, limits=limits)
    failed = False

    def stop() -> None:
        nonlocal failed
        failed = serving.should_exit = True

    config = uvicorn.Config(
        server.app(service, api_key=api_key, on_failure=stop), log_level="warning", access_log=False, http="h11", ws="none",
        lifespan="off", timeout_graceful_shutdown=_DRAIN_S.value, server_header=False,
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    class Serving(uvicorn.Server):
        async def startup(self, *args: Any, **kwargs: Any) -> None:
            await super().startup(*args, **kwargs)
            print(f"serving {backend.name} on {url}", file=sys.stderr, flush=True)

    serving = Serving(config)
    # uvicorn raises the signal again once it has drained; it must not end the process before the result is printed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    serving.run(sockets=[listening])
    result = {"answered": service.answered, "url": url, **service.sampler.counts}
    if failed:
        raise RuntimeError("the engine stopped; its error stands above")
    service.close()
    return result


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ValueError(f"--host={host} --port={port}: {error.strerror}; choose another") from None
    return listening


if __name__ == "__main__":
    door.tool(main, __doc__)
