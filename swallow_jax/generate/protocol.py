"""OpenAI's protocol as far as the server speaks it: bodies in, sentences about what is wrong with them, answers out.

One table of fields serves the check of a body and the description at /openapi.json. A field that is not in it is refused, as is
a value that would be ignored: a setting that silently does nothing makes a wrong result.
"""

import dataclasses
import functools
import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax import text
from swallow_jax.generate.backends import StopText
from swallow_jax.generate.echo import Told

_STOPS = 16  # stop strings of one request
TOP = 20  # likeliest tokens told at one place, at most


class Refused(Exception):  # noqa: N818  (an answer, not a failure of ours)
    """A request that gets no answer: HTTP status, a sentence that says why, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None, *, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        # Half a surrogate pair, which JSON can spell, cannot be sent back.
        message, field = (said and said.encode("utf-8", "replace").decode() for said in (self.message[:500], self.field))
        return {"error": {"message": message, "type": kind, "param": field, "code": self.status}}


# Fields: JSON schema. None for a field that may be left out stands for its default.

_INT32 = 2**31 - 1
_COMMON = {
    "model": {"type": "string"},
    # Below 0.001 the scaled scores leave float32; above 2 OpenAI refuses.
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0, "description": "0 (greedy), or 0.001 to 2"},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1.0},
    "top_k": {"type": "integer", "minimum": 0, "maximum": _INT32, "default": 0, "description": "0 keeps all"},
    "n": {"type": "integer", "minimum": 1, "maximum": 128, "default": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": None},
    "stop": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": _STOPS}], "default": None,
    },
    "user": {"type": "string", "default": None},
    # What this server does not do may be sent with its neutral value.
    "stream": {"enum": [False], "default": None},
    "presence_penalty": {"enum": [0, 0.0], "default": None},
    "frequency_penalty": {"enum": [0, 0.0], "default": None},
    "logit_bias": {"enum": [{}], "default": None},
}  # fmt: skip
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
FIELDS = {
    "completions": _COMMON | {
        "prompt": {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]},
        "max_tokens": {"type": "integer", "minimum": 0, "maximum": _INT32, "default": 16},
        "echo": {"type": "boolean", "default": False},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": TOP, "default": None},
        "best_of": {"enum": [1], "default": None},
        "suffix": {"enum": [""], "default": None},
    },
    "chat": _COMMON | {
        "messages": {
            "type": "array", "minItems": 1,
            "items": {
                "type": "object", "required": ["role", "content"], "additionalProperties": False,
                "properties": {"role": {"enum": list(text.ROLES)}, "content": {"type": "string"}},
            },
        },
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": _INT32, "default": None},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": _INT32, "default": None},
        "logprobs": {"type": "boolean", "default": False},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": TOP, "default": 0},
        "response_format": {"enum": [{"type": "text"}], "default": None},
    },
}  # fmt: skip
_OWN = ("prompt", "messages", "stop")  # checked where they are read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request: what to sample for each of `prompts` (token ids), and what to tell about it."""

    prompts: list[list[int]]
    shown: list[str] | None  # the prompts as they are given back in front of the answer, where that is wanted
    max_tokens: int | None  # None: as many as fit
    n: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    top: int | None  # likeliest tokens told at each place; None: no log-probabilities

    def seed_of(self, sample: int) -> int:
        """The first sample has the request's own seed; the others' are scattered, so that seeds 1 and 2 share no sample."""
        return self.seed if sample == 0 else int(hashlib.sha256(f"{self.seed} {sample}".encode()).hexdigest()[:8], 16)


def parse(data: bytes) -> Any:
    """JSON of a body."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise Refused(400, f"the body holds an unreadable number: {error}") from None


def completion(body: Any, *, tokenizer: Any, vocab_size: int, choices: int) -> Call:
    """A body of /v1/completions. `choices`: prompts times n, at most. A text is encoded as the model's input, behind BOS."""
    fields = _fields(body, "completions")
    given = fields["prompt"]
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Refused(400, "prompt: a text, token ids, or a list of one of them is wanted", "prompt")
    _limit_choices(len(given), fields["n"], choices)
    prompts = [_prompt(one, tokenizer, vocab_size) for one in given]
    if fields["max_tokens"] == 0 and not fields["echo"]:
        raise Refused(400, "max_tokens=0 asks for nothing; send echo=true with it, or at least 1", "max_tokens")
    shown = [one if isinstance(one, str) else tokenizer.decode(one) for one in given] if fields["echo"] else None
    return _call(fields, prompts=prompts, shown=shown, max_tokens=fields["max_tokens"], top=fields["logprobs"])


def chat(body: Any, *, tokenizer: Any, choices: int) -> Call:
    """A body of /v1/chat/completions, rendered in the checkpoint's chat format."""
    fields = _fields(body, "chat")
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, 'messages: a list of {"role", "content"} is wanted', "messages")
    if None not in (fields["max_tokens"], fields["max_completion_tokens"]):
        raise Refused(400, "max_tokens and max_completion_tokens are two names of one number; send one", "max_tokens")
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise Refused(400, "top_logprobs needs logprobs=true", "top_logprobs")
    _limit_choices(1, fields["n"], choices)
    if unknown := [m.get("role") for m in messages if m.get("role") not in text.ROLES]:
        raise Refused(400, f"messages: the role {unknown[0]!r} is unknown; known: {', '.join(text.ROLES)}", "messages")
    try:
        ids = tokenizer.render_chat([m | {"content": _content(m)} for m in messages], add_generation_prompt=True)
    except ValueError as error:
        raise Refused(400, f"messages: {error}", "messages") from None
    limit = fields["max_tokens"] or fields["max_completion_tokens"]
    return _call(fields, prompts=[ids], shown=None, max_tokens=limit, top=fields["top_logprobs"] if fields["logprobs"] else None)


def _call(fields: dict[str, Any], **rest: Any) -> Call:
    if 0 < fields["temperature"] < 1e-3:
        raise Refused(400, f"temperature={fields['temperature']}: 0 is greedy, otherwise at least 0.001", "temperature")
    stop = fields["stop"]
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _STOPS or not all(isinstance(s, str) for s in stop):
        raise Refused(400, f"stop: a text or a list of at most {_STOPS} texts is wanted", "stop")
    seed = secrets.randbits(32) if fields["seed"] is None else fields["seed"]
    sampling = {name: fields[name] for name in ("n", "temperature", "top_k", "top_p")}
    return Call(**sampling, **rest, seed=seed, stop=tuple(s for s in stop if s))


def _prompt(given: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(given, str):
        try:
            return tokenizer.encode(given, add_bos=True)
        except ValueError as error:
            raise Refused(400, f"prompt: {error}", "prompt") from None
    if not isinstance(given, list) or not all(type(i) is int for i in given):
        raise Refused(400, "prompt: a text, token ids, or a list of one of them is wanted", "prompt")
    if outside := next((i for i in given if not 0 <= i < vocab_size), None):
        raise Refused(400, f"prompt: token id {str(outside)[:30]} is outside the vocabulary of {vocab_size}", "prompt")
    return given


def _content(message: dict) -> Any:
    """OpenAI's list of text parts is one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise Refused(400, "messages: content has a part that is no text; this model reads text alone", "messages")
    return "".join(parts)


def _limit_choices(prompts: int, n: int, choices: int) -> None:
    if prompts * n > choices:
        raise Refused(400, f"{prompts} prompts times n={n}: this server gives {choices} answers to one request at most", "n")


def _fields(body: Any, kind: str) -> dict[str, Any]:
    """All fields of a body, defaults put in; those in _OWN as they came."""
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {type(body).__name__}, an object is wanted")
    rules = FIELDS[kind]
    if unknown := next((name for name in body if name not in rules), None):
        raise Refused(400, f"unknown field {unknown!r}; this server knows {', '.join(rules)}", unknown[:64])
    found = {}
    for name, rule in rules.items():
        value = body.get(name)
        if value is None:
            if "default" not in rule:
                raise Refused(400, f"{name} is missing", name)
            found[name] = rule["default"]
        else:
            found[name] = value if name in _OWN else _value(name, value, rule)
    return found


def _value(name: str, value: Any, rule: dict[str, Any]) -> Any:
    if "enum" in rule:
        if not any(type(value) is type(known) and value == known for known in rule["enum"]):
            raise Refused(400, f"{name}: this server knows {json.dumps(rule['enum'][0])} alone; leave it out", name)
        return value
    kinds = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if rule["type"] == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # 4.0 is an integer of JSON schema
    if not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) and rule["type"] != "boolean"):
        raise Refused(400, f"{name}: a value of type {rule['type']} is wanted, this is {type(value).__name__}", name)
    low, above, high = rule.get("minimum", -math.inf), rule.get("exclusiveMinimum", -math.inf), rule.get("maximum", math.inf)
    if rule["type"] in ("integer", "number") and not (low <= value <= high and value > above):
        bounds = f"above {above}" if math.isfinite(above) else f"at least {low}"
        raise Refused(400, f"{name}={str(value)[:30]}: {bounds} and at most {high} is wanted", name)
    return value


def _no_constant(name: str) -> None:
    raise Refused(400, f"the body is not JSON: {name} is no number of JSON")


# Answers.


class Speller:
    """Tokens as texts, for lists of log-probabilities."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.spell = functools.lru_cache(maxsize=1 << 16)(self._spell)

    def _spell(self, token: int) -> str:
        """A token's text; "token_id:7" where it is no whole character."""
        said = self._tokenizer.decode([token], skip_special=False)
        return said if said and "\ufffd" not in said else f"token_id:{token}"

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where in the text of `ids` each token begins."""
        walk, starts = StopText(self._tokenizer.decode, ()), []
        for token in ids:
            starts.append(len(walk.text))
            walk.push([token])
        return starts

    def top(self, ids: Sequence[int], logprobs: Sequence[float], k: int, chosen: tuple[int, float] | None) -> dict[int, float]:
        """Token -> log-probability: the k likeliest, and the one that stands there, as OpenAI gives it."""
        found = dict(zip(map(int, ids[:k]), map(float, logprobs[:k]), strict=True))
        return found if chosen is None or chosen[0] in found else found | {chosen[0]: chosen[1]}

    def completion(self, ids: Sequence[int], told: Told, *, first: int, k: int) -> dict[str, list]:
        """`logprobs` of a completion: of the tokens from place `first` on; the very first has no log-probability."""
        starts = self.offsets(ids[first:])
        logprobs: list[float | None] = [None, *map(float, told.logprobs)]
        top: list[dict[str, float] | None] = []
        for place in range(first, len(ids)):
            if place == 0:
                top.append(None)
                continue
            found = self.top(told.top_ids[place - 1], told.top_logprobs[place - 1], k, (ids[place], logprobs[place]))
            spelled: dict[str, float] = {}
            for token, logprob in found.items():
                name = self.spell(token)
                spelled[name if name not in spelled else f"token_id:{token}"] = logprob
            top.append(spelled)
        tokens = [self.spell(i) for i in ids[first:]]
        return {"tokens": tokens, "token_logprobs": logprobs[first:], "top_logprobs": top, "text_offset": starts}

    def chat(self, ids: Sequence[int], told: Told, *, first: int, k: int) -> dict[str, list]:
        """`logprobs` of an assistant's message."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            said = self.spell(token)
            return {"token": said, "logprob": logprob, "bytes": None if said == f"token_id:{token}" else list(said.encode())}

        content = []
        for place in range(first, len(ids)):
            best = self.top(told.top_ids[place - 1], told.top_logprobs[place - 1], k, None)
            content.append(
                entry(ids[place], float(told.logprobs[place - 1])) | {"top_logprobs": [entry(*pair) for pair in best.items()]}
            )
        return {"content": content}


def openapi(model: str, version: str) -> dict[str, Any]:
    """The description served at /openapi.json."""
    names = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
    said = {"content": {"application/json": {"schema": {"type": "object"}}}}
    refusals = {
        str(status): {"description": "refused, with the reason", **said} for status in (400, 401, 404, 408, 413, 415, 429, 503)
    }
    paths: dict[str, Any] = {
        path: {"get": {"operationId": path, "responses": {"200": {"description": "OK", **said}, "401": refusals["401"]}}}
        for path in ("/v1/models", "/health")
    }
    for kind, path in names.items():
        properties = {name: _nullable(rule) for name, rule in FIELDS[kind].items()}
        properties["model"] = {"type": "string", "enum": [model]}
        schema = {
            "type": "object", "additionalProperties": False, "properties": properties,
            "required": [name for name, rule in FIELDS[kind].items() if "default" not in rule],
        }  # fmt: skip
        paths[path] = {
            "post": {
                "operationId": kind,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "OK", **said}, **refusals},
            }
        }
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    return {
        "openapi": "3.1.0", "info": {"title": "swallow_jax", "version": version}, "paths": paths, "components": security,
        "security": [{}, {"key": []}],
    }  # fmt: skip


def _nullable(rule: dict[str, Any]) -> dict[str, Any]:
    if "default" not in rule:
        return rule
    bare = {name: value for name, value in rule.items() if name != "default" or value is not None}
    return {"anyOf": [bare, {"type": "null"}]}
