"""Tokenizers, chat rendering and the loss weights of a dialogue.

One `Tokenizer` stands before the three kinds of vocabulary that `vocabulary` opens.

Content is data, never control. `encode` reads every text, and `render_chat` every message, so that the spelling of a
control token (`<|eot_id|>`) comes out as ordinary text; only the chat template of the checkpoint writes control
tokens. The exact method:

1. Choose a private-use character that occurs in no message and not in the template: the *marker*.
2. In the content, put the marker behind the first character of each control-token spelling, and of an unfinished one at
   the end of a message (so that two messages written side by side cannot complete it). Ordinary content is untouched.
3. Render the template in Jinja2's sandbox. What still spells a control token was written by the template (also where it
   computes one, as by lower-casing content: that is the template's doing).
4. Cut there, take the markers out, encode the cuts with control tokens off.

A stretch of template and content between two control tokens is thus encoded in one go, as `apply_chat_template` of
transformers does it: for ordinary content the ids are equal. This room reads no clock: `strftime_now` of a template gives
the date handed to `load_tokenizer`, so that shards made tomorrow equal those made today.
"""

import datetime
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swallow_jax import vocabulary

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's own template writes when it is given no date
LLAMA3_CHAT_TEMPLATE = vocabulary.LLAMA3_CHAT_TEMPLATE
SPECIAL_TOKENS = vocabulary.SPECIAL_TOKENS


class Tokenizer:
    """A vocabulary, its control tokens and its chat template. Made by `load_tokenizer`.

    vocab_size: the size an embedding needs, that is the largest id + 1.
    bos_id: None where the vocabulary has no such token. pad_id: an eos id where it has none (padding is never read).
    eos_ids: every id that ends generation: those of generation_config.json (or config.json), the tokenizer's own, and
      the token with which the chat template ends an assistant turn.
    special_ids: all control tokens. sha256: of the vocabulary file's bytes; the chat template is not part of it.
    chat_template: its source, or None.
    """

    def __init__(self, path: Path, given_template: str | None, date: datetime.datetime):
        settings, backend = vocabulary.open_file(path, given_template)
        self._path, self._given, self._date = path, given_template, date
        self._backend, self._tokens = backend, settings.tokens
        self.vocab_size: int = backend.size
        self.special_ids = frozenset(backend.controls.values())
        self.chat_template: str | None = settings.chat_template
        bos, eos, pad = (backend.controls.get(settings.tokens.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
        self.bos_id: int | None = bos
        ends = (*settings.eos_ids, eos, self._end_of_turn_id())
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        known = (i for i in (pad, settings.pad_id, *self.eos_ids, 0) if i is not None and i >= 0)
        self.pad_id: int = next(known)

    def __reduce__(self):  # worker processes read the file again: compiled templates do not travel
        return Tokenizer, (self._path, self._given, self._date)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()

    @functools.cached_property
    def byte_lengths(self) -> "numpy.ndarray":  # noqa: F821 (loaded when it is asked for)
        """Bytes of UTF-8 that each id adds to a text, int32 [vocab_size]; control tokens add none.

        Summed over the ids of a text they are its size, but for the space that SentencePiece sets before the first word.
        """
        import numpy as np

        lengths = np.array(self._backend.lengths(), np.int32)
        lengths[sorted(self.special_ids)] = 0
        return lengths

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Ids of `text`, in which nothing is a control token. `add_bos` puts bos_id first where there is one."""
        _check_text(text)
        ids, _ = self._encode_ordinary(text, False)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD, ids beyond the vocabulary (padded embeddings) nothing."""
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if skip_special:
            return self._backend.decode([i for i in ids if i not in self.special_ids])
        runs = itertools.groupby(ids, self._spelling.__contains__)
        spelled = ("".join(map(self._spelling.get, run)) if control else self._backend.decode([*run]) for control, run in runs)
        return "".join(spelled)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Ids of the dialogue [{"role", "content"}, ...] in the checkpoint's own format.

        Raises ValueError where there is no template, for unknown roles, and when the template refuses the dialogue.
        """
        if not messages:
            raise ValueError("a chat needs at least one message, got none")
        marked, marker = self._mark(messages)
        return self._encode_rendered(self._render(marked, add_generation_prompt, marker), marker)[0]

    def chat_sample(self, messages: Sequence[Mapping[str, str]], *, train_on: str) -> tuple[list[int], list[float]]:
        """Ids of a whole dialogue and weights[i] in {0., 1.}: whether token i counts as a target.

        What counts is the content of the assistant's turns and the token that ends each ('last': of the last turn
        only); headers, and what a template writes behind the end of turn, do not. A token that spans the border from
        header to content does not count either: the header is given at inference, so that it is never generated.

        A turn's span is found by rendering the messages before it, with the generation prompt, and the messages up to
        it. Both must be prefixes of the whole; a template that rewrites earlier turns is refused with ValueError.
        """
        if train_on not in ("last", "all"):
            raise ValueError(f"train_on is {train_on!r}: choose 'last' or 'all'")
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("a chat sample must end with a turn of the assistant; cut what follows it")
        marked, marker = self._mark(messages)
        whole = self._render(marked, False, marker)
        last = len(messages) - 1
        turns = range(last + 1) if train_on == "all" else [last]
        spans = []
        for turn in (t for t in turns if messages[t]["role"] == "assistant"):
            head = self._render(marked[:turn], True, marker)
            upto = whole if turn == last else self._render(marked[: turn + 1], False, marker)
            if not (upto.startswith(head) and whole.startswith(upto)):
                raise ValueError(
                    f"the chat template renders turn {turn} of {len(messages)} with another beginning than its prompt has, "
                    "which the model never sees: use a template whose generation prompt opens the turn as it stands"
                    if turn == last
                    else f"the chat template rewrites turn {turn} of {len(messages)} once others follow, so that it would "
                    "be trained as the model never sees it: train on the last turn only (train_on='last'), one sample a turn"
                )
            spans.append((len(head), len(head) + self._target_length(upto[len(head) :])))
        # Token ends count no markers, so neither may the spans.
        spans = [tuple(at - whole.count(marker, 0, at) for at in span) for span in spans]
        ids, ends = self._encode_rendered(whole, marker)
        weights, start, counts = [], 0, False
        for end in ends:
            if end > start:  # otherwise one more byte of the same character
                counts = any(first <= start < last for first, last in spans)
            weights.append(float(counts))
            start = end
        return ids, weights

    # How content stays content.

    @functools.cached_property
    def _spelling(self) -> dict[int, str]:
        return {i: token for token, i in self._backend.controls.items()}

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern:
        spellings = sorted(self._backend.controls, key=len, reverse=True)  # the longest wins, as in tokenizers
        return re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    @functools.cached_property
    def _unfinished(self) -> frozenset[str]:
        return frozenset(token[:n] for token in self._backend.controls for n in range(1, len(token)))

    def _break_controls(self, text: str, marker: str) -> str:
        # Every start of a spelling is broken, also one inside another spelling, so matches are searched with overlap.
        cuts, at = set(), 0
        while found := self._control_pattern.search(text, at):
            if len(found[0]) == 1:
                raise ValueError(f"the control token {found[0]!r} is one character and cannot stand in content: drop it")
            cuts.add(at := found.start() + 1)
        longest = max(map(len, self._backend.controls), default=0)
        tail = range(max(0, len(text) - longest), len(text))
        cuts.update(i + 1 for i in tail if text[i:] in self._unfinished and not text[i].isspace())
        bounds = [0, *sorted(cuts), len(text)]
        return marker.join(text[a:b] for a, b in itertools.pairwise(bounds))

    def _mark(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[dict], str]:
        for turn, message in enumerate(messages):
            if set(message) != {"role", "content"} or not isinstance(message["content"], str):
                raise ValueError(
                    f"message {turn} is {message!r:.80}: it needs a 'role' and a 'content' that is text, and nothing else"
                )
            if message["role"] not in ROLES:
                raise ValueError(f"message {turn} has the unknown role {message['role']!r}: use one of {', '.join(ROLES)}")
            _check_text(message["content"])
        taken = "".join(message["content"] for message in messages) + (self.chat_template or "")
        private = map(chr, range(0x10FFFD, 0xEFFFF, -1))
        marker = next((c for c in private if c not in taken), None)
        if marker is None:
            raise ValueError("the messages use every private-use character there is: drop this dialogue")
        return [{"role": m["role"], "content": self._break_controls(m["content"], marker)} for m in messages], marker

    def _encode_ordinary(self, text: str, spans: bool) -> tuple[list[int], list[int]]:
        ids, ends = self._backend.encode(text, controls=False, spans=spans)
        leaked = self.special_ids.intersection(ids) - {self._backend.unknown_id}
        if leaked:  # a vocabulary that lists control tokens among its ordinary pieces
            raise ValueError(
                f"the tokenizer {self._path.name} makes {self._spelling[min(leaked)]!r} from plain text, and content "
                "must not: remove that spelling from the text"
            )
        return ids, ends

    def _encode_rendered(self, text: str, marker: str) -> tuple[list[int], list[int]]:
        """Ids, and the character (markers not counted) at which each token ends."""
        if marker not in text and self._backend.reads_controls:
            return self._backend.encode(text, controls=True, spans=True)
        ids, ends, done, at = [], [], 0, 0
        for found in (*self._control_pattern.finditer(text), None):
            ordinary = text[at : found.start() if found else len(text)].replace(marker, "")
            if ordinary:
                piece_ids, piece_ends = self._encode_ordinary(ordinary, True)
                ids += piece_ids
                ends += [done + end for end in piece_ends]
                done += len(ordinary)
            if found:
                at = found.end()
                done += at - found.start()
                ids.append(self._backend.controls[found[0]])
                ends.append(done)
        return ids, ends

    # The template.

    @functools.cached_property
    def _template(self):
        if self.chat_template is None:
            raise ValueError(f"the tokenizer {self._path} has no chat template: put a chat_template.jinja beside it")
        return _compile_template(self.chat_template, self._date)

    def _render(self, messages: list[dict], add_generation_prompt: bool, marker: str) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            reason = str(error).replace(marker, "")
            raise ValueError(f"the chat template refuses the first {len(messages)} messages: {reason}") from error

    def _target_length(self, turn: str) -> int:
        """Characters of a rendered assistant turn up to its end-of-turn token (all, where there is no such token)."""
        *_, end = (0, *(found.end() for found in self._control_pattern.finditer(turn)))
        return end or len(turn)

    def _end_of_turn_id(self) -> int | None:
        if self.chat_template is None:
            return None
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            head = self._render(probe[:1], True, "")
            whole = self._render(probe, False, "")
        except ValueError:  # a template that wants another dialogue says so when it is used
            return None
        written = self._control_pattern.findall(whole[len(head) :]) if whole.startswith(head) else []
        return self._backend.controls[written[-1]] if written else None


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text to encode must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has half a surrogate pair at character {error.start}: repair or drop it") from None


def _compile_template(source: str, date: datetime.datetime):
    """The environment of transformers (`_cached_compile_jinja_template`), with a date instead of the clock."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # {% generation %} marks assistant text for HF; here it only groups
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML, which would change the text.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date.strftime}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken in line {error.lineno}: {error}") from error


def load_tokenizer(
    path: str | os.PathLike, *, chat_template: str | None = None, date: datetime.datetime = TEMPLATE_DATE
) -> Tokenizer:
    """Opens a checkpoint folder, a tokenizer.json, or a SentencePiece or tiktoken file (`tokenizer.model`).

    chat_template: Jinja source in place of the checkpoint's. Without either, a tiktoken file gets Llama 3's format and
      any other tokenizer cannot render chats. date: what a template that asks for today's date is given.
    Raises FileNotFoundError where there is no tokenizer, ValueError where a file cannot be read.
    """
    return Tokenizer(vocabulary.find_file(Path(path)), chat_template, date)


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Copies the tokenizer, chat template and generation files of a folder (or beside a file); returns their names."""
    file = vocabulary.find_file(Path(source))
    folder = file.parent
    models = {file.name, *(model.name for model in folder.glob("*.model"))} - set(vocabulary.COMPANIONS)
    names = [name for name in (*vocabulary.COMPANIONS, *sorted(models)) if (folder / name).is_file()]
    if folder.resolve() != Path(target).resolve():
        for name in names:
            _write(Path(target) / name, (folder / name).read_bytes())
    return names


def train_bpe(texts: Iterable[str], *, folder: str | os.PathLike, **settings) -> Tokenizer:
    """Trains a vocabulary into `folder` and opens it; the settings are those of `vocabulary.train_bpe`."""
    for name, data in vocabulary.train_bpe(texts, **settings).items():
        _write(Path(folder) / name, data)
    return load_tokenizer(folder)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
