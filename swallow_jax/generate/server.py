"""A small OpenAI-compatible server on the in-process engine: enough for harnesses; fleets use vLLM on an exported folder.

The engine runs in a thread of its own and takes jobs from a queue; what a request asks for beyond its own limits is refused with
a 4xx and a sentence. A request whose client hangs up, or which takes too long, gives its slots back at the next chunk.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import queue
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np

import swallow_jax
from swallow_jax.generate import protocol
from swallow_jax.generate.backends import StopText
from swallow_jax.generate.echo import Echo, Told
from swallow_jax.generate.engine import Engine, Job, Output
from swallow_jax.generate.protocol import Call, Refused

_DISCARDED = 1 << 26  # bytes of a refused body that are read, so that the client reads our answer instead of a reset connection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    body_bytes: int
    body_s: float  # to send a body
    answer_s: float  # to answer one
    requests: int  # under way at once, those waiting for a slot included; more are told to come again (429)
    choices: int  # answers to one request: prompts times n


@dataclasses.dataclass(eq=False)
class _Ticket:
    job: Job
    text: StopText
    future: "concurrent.futures.Future[Output]"
    given_up: bool = False

    def until(self, tokens: list[int]) -> int | None:
        return 0 if self.given_up else self.text.push(tokens)


class Sampler:
    """The engine in its thread. Jobs go in from any thread, outputs come out as futures."""

    def __init__(self, engine: Engine, decode: Callable[[Sequence[int]], str]):
        self._engine, self._decode = engine, decode
        self._inbox: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._running: set[_Ticket] = set()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.failed = False
        self._thread.start()

    def submit(self, prompt_ids: Sequence[int], call: Call, sample: int, max_tokens: int) -> _Ticket:
        """A job in the queue, or ValueError where the engine cannot run it."""
        text = StopText(self._decode, call.stop)
        job = Job(
            name=None, prompt_ids=prompt_ids, max_new_tokens=max_tokens, temperature=call.temperature, top_k=call.top_k,
            top_p=call.top_p, seed=call.seed_of(sample),
        )  # fmt: skip
        ticket = _Ticket(job, text, concurrent.futures.Future())
        ticket.job = dataclasses.replace(job, name=ticket, until=ticket.until)
        self._inbox.put(ticket)
        if self.failed:  # looked at after the put: what is put before it fails is answered by the thread
            raise Refused(503, "the engine has stopped; see the server's log")
        return ticket

    @property
    def counts(self) -> dict[str, int]:
        return {"slots": self._engine.slots, "running": len(self._running), "queued": self._inbox.qsize()}

    def close(self) -> None:
        """Finish what is in the queue and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            for output in self._engine.generate(self._jobs()):
                self._running.discard(output.name)
                output.name.future.set_result(output)
        finally:
            # Whatever stopped the engine (its traceback is printed by the thread): nobody may wait for an answer for ever.
            self.failed = True
            left = list(self._running)
            self._running.clear()
            with contextlib.suppress(queue.Empty):
                while True:
                    if (ticket := self._inbox.get_nowait()) and ticket.future.set_running_or_notify_cancel():
                        left.append(ticket)
            for ticket in left:
                ticket.future.set_exception(Refused(503, "the engine has stopped; see the server's log"))

    def _jobs(self) -> Iterator[Job | None]:
        while True:
            try:
                ticket = self._inbox.get(block=not self._running)
            except queue.Empty:
                yield None  # none just now: what runs goes on
                continue
            if ticket is None:
                return
            # False for one whose client left before it began. From now on the future cannot be cancelled, only given up.
            if ticket.future.set_running_or_notify_cancel():
                self._running.add(ticket)
                yield ticket.job


class Service:
    """Answers checked calls. `vocab_size` is the embedding's."""

    def __init__(self, name: str, engine: Engine, tokenizer: Any, *, limits: Limits):
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.engine, self.sampler = engine, Sampler(engine, tokenizer.decode)
        self.speller = protocol.Speller(tokenizer)
        self._echo = Echo(engine.params, engine.config, engine.compute)
        # One thread each: long texts are encoded and scored beside the event loop, and not all at once.
        self._text = concurrent.futures.ThreadPoolExecutor(1, "text")
        self._scores = concurrent.futures.ThreadPoolExecutor(1, "scores")
        self.under_way = self.answered = 0

    def health(self) -> dict[str, Any]:
        state = {"status": "failed" if self.sampler.failed else "ok", "under_way": self.under_way, "answered": self.answered}
        return state | self.sampler.counts

    def close(self) -> None:
        self._text.shutdown(cancel_futures=True)
        self._scores.shutdown(cancel_futures=True)
        self.sampler.close()

    async def completion(self, body: bytes) -> dict[str, Any]:
        """The answer to a body of /v1/completions."""
        limits = {"vocab_size": self.engine.config.vocab_size, "choices": self.limits.choices}
        call = await self._parsed(body, protocol.completion, limits)
        choices, generated = [], 0
        for number, (output, text, told) in enumerate(await self._outputs(call)):
            which = number // call.n
            prompt_ids = call.prompts[which]
            ids, first = [*prompt_ids, *output.tokens], 0 if call.shown else len(prompt_ids)
            logprobs = None
            if told is not None:
                logprobs = await self._in(self._text, self.speller.completion, ids, told, first=first, k=call.top)
            shown = call.shown[which] if call.shown else ""
            choices.append({"index": number, "text": shown + text, "finish_reason": output.finish_reason, "logprobs": logprobs})
            generated += len(output.tokens)
        return self._answer("text_completion", "cmpl", call, choices, generated)

    async def chat(self, body: bytes) -> dict[str, Any]:
        """The answer to a body of /v1/chat/completions."""
        call = await self._parsed(body, protocol.chat, {"choices": self.limits.choices})
        choices, generated = [], 0
        for number, (output, text, told) in enumerate(await self._outputs(call)):
            (prompt_ids,) = call.prompts
            logprobs = None
            if told is not None:
                ids = [*prompt_ids, *output.tokens]
                logprobs = await self._in(self._text, self.speller.chat, ids, told, first=len(prompt_ids), k=call.top)
            message = {"role": "assistant", "content": text}
            choices.append({"index": number, "message": message, "finish_reason": output.finish_reason, "logprobs": logprobs})
            generated += len(output.tokens)
        return self._answer("chat.completion", "chatcmpl", call, choices, generated)

    async def _parsed(self, body: bytes, read: Callable[..., Call], limits: dict[str, int]) -> Call:
        def parsed() -> Call:
            given = protocol.parse(body)
            if isinstance(given, dict) and isinstance(given.get("model"), str) and given["model"] != self.name:
                raise Refused(404, f"the model {given['model']!r} is not here; this server has {self.name!r}", "model")
            return read(given, tokenizer=self.tokenizer, **limits)

        return await self._in(self._text, parsed)

    async def _outputs(self, call: Call) -> list[tuple[Output, str, Told | None]]:
        """An output, its text and its scores for each prompt and sample, in order. Cancelled, it gives its slots back."""
        tickets: list[_Ticket] = []
        jobs = []
        for ids in call.prompts:  # all are checked before one is begun
            room = self.engine.max_length - len(ids)
            limit = max(room, 1) if call.max_tokens is None else call.max_tokens
            probe = Job(
                name="the request", prompt_ids=ids, max_new_tokens=max(limit, 1), temperature=call.temperature,
                top_k=call.top_k, top_p=call.top_p, seed=call.seed,
            )  # fmt: skip
            try:
                self.engine.check(probe)
            except ValueError as error:
                raise Refused(400, str(error)) from None
            jobs += [(ids, sample, limit) for sample in range(call.n)]
        # A harness that scores a text asks for no token, or for one greedy token; the scores of the text tell that one.
        told_alone = (
            call.top is not None and call.shown and (call.max_tokens == 0 or (call.max_tokens == 1 and not call.temperature))
        )
        try:
            if not told_alone:
                tickets = [self.sampler.submit(ids, call, sample, limit) for ids, sample, limit in jobs if limit]
            waiting = iter(tickets)
            found = []
            for ids, _, limit in jobs:
                told = None
                if told_alone:
                    told = await self._told(ids, call.top)
                    tokens, walk = [int(told.top_ids[-1, 0])] * limit, StopText(self.tokenizer.decode, call.stop)
                    stopped = walk.push(tokens) is not None or any(i in self.tokenizer.eos_ids for i in tokens)
                    reason, text = "stop" if stopped else "length", walk.text
                    output = Output(name=None, tokens=tokens, logprobs=[], finish_reason=reason)
                    last = told.top_logprobs[-1, :limit]
                    told = dataclasses.replace(told, logprobs=np.concatenate([told.logprobs, last]))
                elif limit == 0:
                    output, text = Output(name=None, tokens=[], logprobs=[], finish_reason="length"), ""
                else:
                    ticket = next(waiting)
                    output = await asyncio.wrap_future(ticket.future)
                    text = ticket.text.text
                    if call.top is not None:
                        told = await self._told([*ids, *output.tokens], call.top)
                found.append((output, text, told))
            return found
        finally:
            for ticket in tickets:
                ticket.given_up = True  # of those already finished nothing is left to give up

    async def _told(self, ids: Sequence[int], top: int) -> Told:
        return await self._in(self._scores, self._echo, ids, top=1 if top <= 1 else protocol.TOP)

    async def _in(self, pool: concurrent.futures.Executor, work: Callable, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.wrap_future(pool.submit(work, *args, **kwargs))

    def _answer(self, kind: str, prefix: str, call: Call, choices: list[dict], generated: int) -> dict[str, Any]:
        asked = sum(map(len, call.prompts))
        usage = {"prompt_tokens": asked, "completion_tokens": generated, "total_tokens": asked + generated}
        named = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}
        return named | {"choices": choices, "usage": usage}


def app(service: Service, *, api_key: str | None, on_failure: Callable[[], None] = lambda: None) -> Any:
    """The ASGI application. Clients must send `api_key` as a bearer token; `on_failure` is called when the engine has died."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limits = service.limits

    def refusal(refused: Refused) -> Response:
        return JSONResponse(refused.body(), refused.status, headers=dict(refused.headers or {}))

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if api_key is not None and not hmac.compare_digest(given, b"Bearer " + api_key.encode()):
            raise Refused(401, "the header Authorization: Bearer KEY is missing or wrong", headers={"WWW-Authenticate": "Bearer"})

    async def read(request: Request, *, most: int) -> bytes:
        data = bytearray()
        async for part in request.stream():
            if len(data) + len(part) > most:
                raise Refused(413, f"the body is larger than {limits.body_bytes} bytes")
            data += part
        return bytes(data)

    async def discard(request: Request) -> None:
        """Read on what a refused client is still sending."""
        size = 0
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(limits.body_s):
                while size < _DISCARDED:
                    message = await request.receive()
                    size += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return

    def door(answer: Callable[[bytes], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
        """A POST endpoint: key, room, body, answer, in this order; what fails is told."""

        async def endpoint(request: Request) -> Response:
            reading = True
            try:
                authorise(request)
                if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                    raise Refused(415, "the header Content-Type: application/json is wanted")
                if service.under_way >= limits.requests:
                    raise Refused(
                        429, f"{limits.requests} requests are under way; come again in a second", headers={"Retry-After": "1"}
                    )
                service.under_way += 1
                try:
                    try:
                        async with asyncio.timeout(limits.body_s):
                            body = await read(request, most=limits.body_bytes)
                    except TimeoutError:
                        raise Refused(408, f"the body did not come within {limits.body_s:g} s") from None
                    reading = False
                    found = await attended(request, answer(body))
                finally:
                    service.under_way -= 1
                service.answered += 1
                return Response(status_code=499) if found is None else JSONResponse(found)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Refused as refused:
                if reading and refused.status != 408:
                    await discard(request)
                if service.sampler.failed:
                    on_failure()
                return refusal(refused)

        return endpoint

    async def attended(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
        """The answer, or None when the client has hung up meanwhile."""

        async def hung_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(hung_up())
        try:
            done, _ = await asyncio.wait({work, gone}, timeout=limits.answer_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                return work.result()
            if gone in done:
                return None
            raise Refused(503, f"no answer within {limits.answer_s:g} s; ask for fewer tokens, or later")
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def models(request: Request) -> Response:
        try:
            authorise(request)
        except Refused as refused:
            return refusal(refused)
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "swallow_jax"}
        return JSONResponse({"object": "list", "data": [entry | {"max_model_len": service.engine.max_length}]})

    async def health(request: Request) -> Response:
        state = service.health()
        if service.sampler.failed:
            on_failure()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def description(request: Request) -> Response:
        return JSONResponse(protocol.openapi(service.name, swallow_jax.__version__))

    async def elsewhere(request: Request, error: HTTPException) -> Response:
        known = "/v1/models, /v1/completions, /v1/chat/completions, /health"
        await discard(request)
        refused = Refused(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}; known: {known}", headers=error.headers
        )
        return refusal(refused)

    routes = [
        Route("/v1/completions", door(service.completion), methods=["POST"]),
        Route("/v1/chat/completions", door(service.chat), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/openapi.json", description),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: elsewhere})
