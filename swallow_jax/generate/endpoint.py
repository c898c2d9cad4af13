"""A backend behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, tools.serve, hosted APIs.

The only room that opens a connection and the only one that reads an API key, from the environment variable the config
names; the key stands in no file, no message and no log. Concurrency, retries and the cache of answers are ours.
"""

import asyncio
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from swallow_jax import run
from swallow_jax.generate.backends import (
    KeyedLines,
    Request,
    Result,
    ScoreRequest,
    ScoreResult,
    context_ids,
    continuation_ids,
)

_RETRIED = frozenset({408, 409, 429})  # and all of 5xx


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Section of kind "endpoint". The key's *environment variable* is named here; the key itself never is."""

    kind: str
    base_url: str
    model: str
    api_key_env: str | None  # None for a server that asks for no key
    concurrency: int
    attempts: int  # of one request, the first included
    backoff_s: float  # wait before the second attempt; doubled each time, with jitter
    timeout_s: float
    cache: str | None  # JSON-lines file of successful answers, keyed by payload
    tokenizer: str | None = None  # to score behind messages, which no chat endpoint does, and to cut at exact tokens
    extra: dict | None = None  # further fields of the payload (min_p, response_format with a schema, ...)
    prices: dict | None = None  # dollars a million tokens, {"prompt": 2.5, "completion": 10.0}: `describe` then tells the cost
    name: str | None = None
    revision: str | None = None
    licence: str | None = None


class EndpointError(ValueError):
    """An endpoint refused a request or did not answer; says which, and what to do."""


class EndpointBackend:
    """vLLM, SGLang, llama.cpp, hosted APIs. Successful answers are kept in `options.cache`, keyed by the payload.

    `counts` tells requests sent, retries, answers from the cache, and the tokens the server reported.
    """

    def __init__(self, options: EndpointOptions, *, tokenizer: Any = None):
        self.options, self.tokenizer = options, tokenizer
        self.name = options.name or options.model
        self.counts = dict.fromkeys(("sent", "retried", "cached", "prompt_tokens", "completion_tokens"), 0)
        if options.concurrency < 1 or options.attempts < 1:
            raise ValueError(f"concurrency={options.concurrency}, attempts={options.attempts}: at least 1 each is wanted")
        if options.prices is not None and set(options.prices) != {"prompt", "completion"}:
            raise ValueError(
                f'prices={dict(options.prices)}: dollars a million tokens as {{"prompt": x, "completion": y}} are wanted'
            )
        self._api_key = "none"
        if options.api_key_env:
            self._api_key = os.environ.get(options.api_key_env, "")
            if not self._api_key:
                raise ValueError(f"set the environment variable {options.api_key_env} to the key of {options.base_url}")
        self._cache = KeyedLines(options.cache) if options.cache else None

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        yield from self._stream(requests, self._generate)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        yield from self._stream(requests, self._score)

    def describe(self) -> dict[str, Any]:
        o = self.options
        facts = {"base_url": o.base_url, "revision": o.revision, "licence": o.licence, "sha256": None}
        cost = {"cost_dollars": round(self.cost, 6)} if o.prices else {}
        return {"kind": "endpoint", "model": o.model, **facts, "counts": dict(self.counts), **cost}

    @property
    def cost(self) -> float:
        """Dollars that this process has spent, by the server's token counts; what the cache answered cost nothing again."""
        return sum(self.counts[f"{kind}_tokens"] * price for kind, price in (self.options.prices or {}).items()) / 1e6

    def activity(self, pace: float) -> str:
        """For a progress bar."""
        spent = f", ${self.cost:.2f}" if self.options.prices else ""
        return f"{self.counts['retried']} retries{spent}"

    def _stream(self, requests: Iterable, answer: Callable[[Any, Any], Awaitable]) -> Iterator:
        """`answer(client, request)` for each request, `concurrency` at once, on an event loop in a thread of its own."""
        import openai

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        o = self.options
        # Retries are ours: the client's would neither be counted nor follow our waits.
        client = openai.AsyncOpenAI(base_url=o.base_url, api_key=self._api_key, timeout=o.timeout_s, max_retries=0)
        running: set[concurrent.futures.Future] = set()
        source = iter(requests)
        try:
            while True:
                for request in itertools.islice(source, o.concurrency - len(running)):
                    running.add(asyncio.run_coroutine_threadsafe(answer(client, request), loop))
                if not running:
                    return
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            asyncio.run_coroutine_threadsafe(_close(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _generate(self, client: Any, request: Request) -> Result:
        payload = {
            "model": self.options.model, "max_tokens": request.max_new_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "seed": request.seed,
        }  # fmt: skip
        if request.stop:
            payload["stop"] = list(request.stop)
        if request.top_k:
            payload["extra_body"] = {"top_k": request.top_k}  # no field of OpenAI's, known to all open servers
        if request.messages is None:
            kind, payload["prompt"] = "completions", request.prompt
        else:
            kind, payload["messages"] = "chat", [dict(m) for m in request.messages]

        def extract(response: Any) -> dict:
            choice = response.choices[0]
            text = choice.text if request.messages is None else choice.message.content
            usage = response.usage
            return {
                "text": text or "", "finish_reason": choice.finish_reason or "stop",
                "prompt_tokens": usage.prompt_tokens if usage else 0,
                "completion_tokens": usage.completion_tokens if usage else 0,
            }  # fmt: skip

        return Result(request.key, **await self._ask(client, kind, payload, extract), logprob=None)

    async def _score(self, client: Any, request: ScoreRequest) -> ScoreResult:
        """One echoed completion a continuation: the server reports the log-probability of each prompt token."""
        if request.messages is not None and self.tokenizer is None:
            raise EndpointError(
                f"{self.name}: a chat endpoint cannot score; name the model's `tokenizer` in the config, so that messages are "
                "rendered here and sent to /completions as token ids"
            )
        context = None if self.tokenizer is None else context_ids(self.tokenizer, request)
        scores = []
        for continuation in request.continuations:
            if context is None:
                prompt = request.prompt + continuation
            else:
                prompt = [*context, *continuation_ids(self.tokenizer, request, context, continuation)]
            payload = {
                "model": self.options.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True,
            }  # fmt: skip
            extract = functools.partial(self._echoed, request=request, context=context, prompt=prompt)
            scores.append(await self._ask(client, "completions", payload, extract))
        return ScoreResult(request.key, *(tuple(s[name] for s in scores) for name in ("logprob", "greedy", "tokens")))

    def _echoed(self, response: Any, *, request: ScoreRequest, context: list[int] | None, prompt: Any) -> dict:
        """Sum over the continuation's tokens in an echoed answer; the token generated behind them is left out."""
        given = response.choices[0].logprobs
        logprobs = given.token_logprobs if given else None
        if not logprobs or len(logprobs) < 2 or (context is not None and len(logprobs) < len(prompt)):
            raise EndpointError(
                f"{self.options.base_url} gives no log-probabilities of the prompt (echo with logprobs); evaluate by generated "
                "answers instead, or serve the model with vLLM or tools.serve"
            )
        if context is not None:
            span = range(len(context), len(prompt))
        else:
            starts = given.text_offset
            span = [i for i, at in enumerate(starts) if len(request.prompt) <= at < len(prompt)]
            if not span or starts[span[0]] != len(request.prompt):
                raise EndpointError(
                    f"{self.name}: one token spans the end of the prompt {request.prompt[-20:]!r} and its continuation; name the "
                    "model's `tokenizer` in the config, so that tokens are sent"
                )
        best = [max(given.top_logprobs[i].values()) for i in span]
        return {
            "logprob": sum(logprobs[i] for i in span),
            "greedy": all(logprobs[i] >= top for i, top in zip(span, best, strict=True)),
            "tokens": len(span),
        }

    async def _ask(self, client: Any, kind: str, payload: dict, extract: Callable[[Any], dict]) -> dict:
        """The extracted answer, from the cache or after as many attempts as are allowed."""
        import openai

        o = self.options
        payload["extra_body"] = {**payload.pop("extra_body", {}), **(o.extra or {})}
        key = run.sha256_json({"kind": kind, **payload})
        if self._cache is not None and key in self._cache.rows:
            self.counts["cached"] += 1
            return self._cache.rows[key]["answer"]
        create = (client.chat.completions if kind == "chat" else client.completions).create
        asked, reason = 0.0, ""
        for attempt in range(o.attempts):
            if attempt:
                self.counts["retried"] += 1
                await asyncio.sleep(max(asked, o.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)))
            self.counts["sent"] += 1
            try:
                response = await create(**payload)
            except openai.APIStatusError as error:
                status, reason = error.status_code, error.message.replace(self._api_key, "***")
                if status not in _RETRIED and status < 500:
                    raise EndpointError(f"{o.base_url} refuses the request ({status}): {reason}") from None
                after = error.response.headers.get("retry-after", "")
                asked = min(float(after), 60.0) if after.replace(".", "", 1).isdigit() else 0.0
                reason = f"status {status}: {reason}"
            except openai.APIConnectionError as error:  # no connection, or a timeout
                asked, reason = 0.0, f"{type(error).__name__}: {error}"
            except json.JSONDecodeError as error:
                asked, reason = 0.0, f"an answer that is no JSON: {error}"
            else:
                if getattr(response, "choices", None):
                    break
                asked, reason = 0.0, f"an answer without choices: {str(response)[:80]!r}"  # a proxy's page, an overloaded server
        else:
            raise EndpointError(
                f"{o.base_url} gave no answer in {o.attempts} attempts ({reason}); check the server, or lower `concurrency`"
            )
        if response.usage:
            self.counts["prompt_tokens"] += response.usage.prompt_tokens or 0
            self.counts["completion_tokens"] += response.usage.completion_tokens or 0
        answer = extract(response)
        if self._cache is not None:
            self._cache.append({"key": key, "answer": answer})
        return answer


async def _close(client: Any) -> None:
    """Cancel what still runs (the caller stopped reading, or one request failed) and close the connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
