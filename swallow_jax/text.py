"""Tokenizers, chat rendering and the loss weights of a dialogue.

Three kinds of vocabulary stand behind one `Tokenizer`: Hugging Face's `tokenizer.json`, SentencePiece models, and the
tiktoken ranks file of Llama 3. The content of a file decides its kind, not its name.

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

import base64
import binascii
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's own template writes when it is given no date

# Llama 3's format (model card; `ChatFormat` in llama-models): no system text unless a message gives one.
LLAMA3_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Of a vocabulary trained here, in the order of their ids.
# fmt: off
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>",
)
# fmt: on

# Llama 3's pre-tokenisation and its 256 special tokens: llama_models/llama3/tokenizer.py.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# fmt: off
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
# fmt: on
_LLAMA3_RANKS = 128_000

# One alternative a script, so that no merge crosses from kanji into kana: in Japanese a change of script is mostly a
# border of morphemes. The long-vowel mark belongs to the kana before it.
_KATAKANA = r"\p{Katakana}ーｰﾞﾟ"
_SCRIPT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[\p{Han}〆]+"
    r"|\p{Hiragana}[\p{Hiragana}ー]*"
    rf"|[{_KATAKANA}]+"
    rf"| ?[\p{{L}}\p{{M}}&&[^\p{{Han}}〆\p{{Hiragana}}{_KATAKANA}]]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Everything beside the weights that says how text becomes tokens and where generation ends.
# fmt: off
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)
# fmt: on


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
        settings, backend = _open(path, given_template)
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
        pieces, run = [], []
        for i in ids:
            if i in self._spelling:
                pieces += [self._backend.decode(run), self._spelling[i]]
                run = []
            else:
                run.append(i)
        return "".join([*pieces, self._backend.decode(run)])

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
                    f"message {turn} is {_short(message)}: it needs a 'role' and a 'content' that is text, and nothing else"
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


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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


# The three kinds of vocabulary. Each has `size`, `controls` (spelling -> id), `unknown_id`, `tokens` (what bos_token
# etc. are where no file says so), `eos`, `encode -> (ids, ends)` and `decode` of ordinary ids. `ends`, made where
# `spans` are asked for, are the characters begun when a token ends: the bytes of one character share their end.
# Where it `reads_controls`, a rendered text without markers goes through it whole, as transformers does it: then also
# what an added token does to its neighbours (lstrip, rstrip, the prefix space of the first word) is the library's.


class _HuggingFace:
    reads_controls = True
    eos = ()

    def __init__(self, path: Path, settings: "_Settings"):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from None
        self.tokens: dict[str, str] = {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.post_processor = tokenizers.processors.Sequence([])  # no BOS; whole offsets
        named = settings.special | set(settings.tokens.values())
        named = sorted(token for token in named if self._tokenizer.token_to_id(token) is not None)
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self._tokenizer.add_special_tokens([token for token in named if token not in special])
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls = {token.content: i for i, token in added.items() if token.special}
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.unknown_id = self.controls.get(settings.tokens.get("unk_token"))
        self._lock = threading.Lock()

    def encode(self, text: str, *, controls: bool, spans: bool) -> tuple[list[int], list[int]]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not controls  # True: read them as ordinary text
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets] if spans else []

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """Each stretch between control tokens is encoded as its own text, with the model's dummy prefix."""

    reads_controls = False
    eos = ()

    def __init__(self, path: Path, settings: "_Settings"):
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        kind = sentencepiece_model_pb2.ModelProto.SentencePiece
        try:
            proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            if not proto.pieces:
                raise DecodeError("no pieces")
        except DecodeError as error:
            raise ValueError(
                f"{path} is neither a SentencePiece model nor a tiktoken ranks file ({error}): is it complete?"
            ) from None
        # A user-defined symbol is read from any text. One that marks turns is a control token: make it one.
        named = settings.special | set(settings.tokens.values())
        template = settings.chat_template or ""
        for piece in proto.pieces:
            marks_turns = piece.piece in template and re.fullmatch(r"[<\[]\S+[>\]]", piece.piece)
            if piece.type == kind.USER_DEFINED and (piece.piece in named or marks_turns):
                piece.type = kind.CONTROL
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.size = len(proto.pieces)
        self.controls = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in (kind.CONTROL, kind.UNKNOWN)}
        self.unknown_id = self._model.unk_id()
        named_ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        named_ids |= {"pad_token": self._model.pad_id(), "unk_token": self.unknown_id}
        self.tokens = {name: proto.pieces[i].piece for name, i in named_ids.items() if i >= 0}

    def encode(self, text: str, *, controls: bool, spans: bool) -> tuple[list[int], list[int]]:
        if not spans:
            return self._model.encode(text), []
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        pieces = SentencePieceText.FromString(self._model.encode(text, out_type="serialized_proto")).pieces
        begun = [0, *itertools.accumulate(byte & 0xC0 != 0x80 for byte in text.encode())]  # characters, by byte
        ends = [begun[piece.end] for piece in pieces]
        for i in reversed(range(len(ends) - 1)):  # of the bytes of a character only the last has an extent
            if pieces[i].begin == pieces[i].end:
                ends[i] = ends[i + 1]
        return [piece.id for piece in pieces], ends

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Tiktoken:
    """Llama 3's ranks file; the special tokens, which it does not list, follow the ranks."""

    reads_controls = False
    eos = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    unknown_id = None

    def __init__(self, path: Path, settings: "_Settings"):
        import tiktoken

        self.tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        self.tokens["pad_token"] = "<|finetune_right_pad_id|>"
        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"{path}:{number}: not 'base64 rank': {_short(line)}") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > _LLAMA3_RANKS:
            raise ValueError(
                f"{path} has {len(ranks)} ranks, which are not 0, 1, ... or more than Llama 3's {_LLAMA3_RANKS}: "
                "use the checkpoint's tokenizer.json instead"
            )
        self.controls = {token: len(ranks) + i for i, token in enumerate(_LLAMA3_SPECIAL)}
        self.size = len(ranks) + len(self.controls)
        self._encoding = tiktoken.Encoding(path.name, pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.controls)

    def encode(self, text: str, *, controls: bool, spans: bool) -> tuple[list[int], list[int]]:
        ids = [i for part in _tiktoken_parts(text) for i in self._encoding.encode_ordinary(part)]
        if not spans:
            return ids, []
        tokens = self._encoding.decode_tokens_bytes(ids)
        return ids, list(itertools.accumulate(sum(byte & 0xC0 != 0x80 for byte in token) for token in tokens))

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


def _tiktoken_parts(text: str) -> Iterable[str]:
    """Cuts what tiktoken's regex cannot stand, where Llama 3's reference does: ids depend on the cuts."""
    for begin in range(0, len(text), 400_000):
        part = text[begin : begin + 400_000]
        start = 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > 25_000 else ():
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[start:cut]
                start = cut
        yield part[start:]


# Folders.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    tokens: dict[str, str]  # bos_token, eos_token, ... -> spelling
    special: frozenset[str]  # more spellings that the checkpoint calls special
    eos_ids: tuple[int, ...]
    pad_id: int | None
    chat_template: str | None


def load_tokenizer(
    path: str | os.PathLike,
    *,
    chat_template: str | None = None,
    date: datetime.datetime = TEMPLATE_DATE,
) -> Tokenizer:
    """Opens a checkpoint folder, a tokenizer.json, or a SentencePiece or tiktoken file (`tokenizer.model`).

    chat_template: Jinja source in place of the checkpoint's. Without either, a tiktoken file gets Llama 3's format and
      any other tokenizer cannot render chats. date: what a template that asks for today's date is given.
    Raises FileNotFoundError where there is no tokenizer, ValueError where a file cannot be read.
    """
    return Tokenizer(_vocabulary_file(Path(path)), chat_template, date)


def _vocabulary_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no tokenizer at {path}: give a checkpoint folder or a file")
    found = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else sorted(path.glob("*.model"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(
            f"{path} needs a tokenizer.json or one *.model file ({names} found): copy the base model's, or name the file"
        )
    return found[0]


def _open(path: Path, given_template: str | None):
    with open(path, "rb") as file:
        head = file.read(4096).lstrip()
    if head[:4] == b"GGUF":
        raise ValueError(
            f"{path} holds its tokenizer inside: save it as a folder first, with transformers' "
            "AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)"
        )
    is_ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", head)
    backend_class = _HuggingFace if head[:1] == b"{" else _Tiktoken if is_ranks else _SentencePiece
    config, named, generation, model = (
        _read_json(path.parent / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    )
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in {**named, **config}.items()
        if name.endswith("_token") and isinstance(token, (str, dict))
    }
    extra = config.get("added_tokens_decoder", {}).values()
    eos = next((c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None), [])
    settings = _Settings(
        tokens=tokens,
        special=frozenset(token["content"] for token in extra if token.get("special")),
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=next((c["pad_token_id"] for c in (generation, model) if c.get("pad_token_id") is not None), None),
        chat_template=given_template or _read_template(path.parent, config),
    )
    if backend_class is _Tiktoken and settings.chat_template is None:
        settings = dataclasses.replace(settings, chat_template=LLAMA3_CHAT_TEMPLATE)
    backend = backend_class(path, settings)
    eos_ids = settings.eos_ids or tuple(backend.controls[token] for token in backend.eos)
    return dataclasses.replace(settings, tokens={**backend.tokens, **tokens}, eos_ids=eos_ids), backend


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not {_short(content)}")
    return content


def _read_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Copies the tokenizer, chat template and generation files of a folder (or beside a file); returns their names."""
    vocabulary = _vocabulary_file(Path(source))
    folder = vocabulary.parent
    models = {vocabulary.name, *(file.name for file in folder.glob("*.model"))} - set(_COMPANIONS)
    names = [name for name in (*_COMPANIONS, *sorted(models)) if (folder / name).is_file()]
    if folder.resolve() != Path(target).resolve():
        for name in names:
            _write(Path(target) / name, (folder / name).read_bytes())
    return names


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    folder: str | os.PathLike,
    chat_template: str,
    special_tokens: Sequence[str],
) -> Tokenizer:
    """Trains a byte-level BPE vocabulary that respects scripts, and writes it as a Hugging Face folder.

    The special tokens (`SPECIAL_TOKENS` has the names that get a role) take the first ids; then the 256 bytes, so that
    any text can be written; then merges. The same texts give the same files. A small corpus may give fewer tokens
    than vocab_size. transformers' AutoTokenizer reads the folder, and puts BOS before a text as Llama 3's does.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Trained

    special_tokens = list(special_tokens)
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise ValueError(f"special_tokens must be distinct and not empty: {special_tokens}")
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size is {vocab_size}: it must hold 256 bytes and {len(special_tokens)} special tokens")
    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SCRIPT_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    roles = {name: token for name, token in roles.items() if token in special_tokens}
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos := roles.get("bos_token"):
        bos_ids = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=bos_ids))
    tokenizer.post_processor = processors.Sequence(steps)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(folder)
    _write(folder / "special_tokens_map.json", _json_bytes(roles))
    _write(folder / "tokenizer_config.json", _json_bytes(config))
    _write(folder / "chat_template.jinja", chat_template.encode())
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())  # last: it makes the folder a tokenizer
    return load_tokenizer(folder)


def _json_bytes(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
