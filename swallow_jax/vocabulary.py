"""Vocabulary files: Hugging Face's `tokenizer.json`, SentencePiece models, the tiktoken ranks of Llama 3; and training one.

The content of a file decides its kind, not its name; the files beside it say what its control tokens are for. `text` is
the door to what is opened here: a kind of vocabulary knows nothing of chats.
"""

import base64
import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

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
# fmt: off
# Of a vocabulary trained here, in the order of their ids.
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>",
)

# Llama 3's pre-tokenisation and its 256 special tokens: llama_models/llama3/tokenizer.py.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
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
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Everything beside the weights that says how text becomes tokens and where generation ends.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    tokens: dict[str, str]  # bos_token, eos_token, ... -> spelling
    special: frozenset[str]  # more spellings that the checkpoint calls special
    eos_ids: tuple[int, ...]
    pad_id: int | None
    chat_template: str | None


# The three kinds of vocabulary. Each has `size`, `controls` (spelling -> id), `unknown_id`, `tokens` (what bos_token
# etc. are where no file says so), `eos`, `lengths` (bytes of each id), `encode -> (ids, ends)` and `decode` of ordinary
# ids. `ends`, made where `spans` are asked for, are the characters begun when a token ends: the bytes of one character
# share their end.
# Where it `reads_controls`, a rendered text without markers goes through it whole, as transformers does it: then also
# what an added token does to its neighbours (lstrip, rstrip, the prefix space of the first word) is the library's.


class _HuggingFace:
    reads_controls = True
    eos = ()

    def __init__(self, path: Path, settings: _Settings):
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
        named -= {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self._tokenizer.add_special_tokens(sorted(token for token in named if self._tokenizer.token_to_id(token) is not None))
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls = {token.content: i for i, token in added.items() if token.special}
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.unknown_id = self.controls.get(settings.tokens.get("unk_token"))
        self._lock = threading.Lock()

    def encode(self, text: str, *, controls: bool, spans: bool) -> tuple[list[int], list[int]]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not controls  # True: read them as ordinary text
            if not spans:  # a third faster: no offsets
                return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, []
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def lengths(self) -> list[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        by_bytes = "ByteLevel" in {part["type"] for part in (decoder, *decoder.get("decoders", ()))}  # a character a byte
        found = [0] * self.size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            found[i] = len(added[i].content.encode()) if i in added else len(token) if by_bytes else _piece_bytes(token)
        return found


class _SentencePiece:
    """Each stretch between control tokens is encoded as its own text, with the model's dummy prefix."""

    reads_controls = False
    eos = ()

    def __init__(self, path: Path, settings: _Settings):
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

    def lengths(self) -> list[int]:
        return [_piece_bytes(self._model.id_to_piece(i)) for i in range(self.size)]


class _Tiktoken:
    """Llama 3's ranks file; the special tokens, which it does not list, follow the ranks."""

    reads_controls = False
    eos = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    unknown_id = None

    def __init__(self, path: Path, settings: _Settings):
        import tiktoken

        self.tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}:{number}: not 'base64 rank': {line!r:.80}") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > _LLAMA3_RANKS:
            raise ValueError(
                f"{path} has {len(ranks)} ranks, which are not 0, 1, ... or more than Llama 3's {_LLAMA3_RANKS}: "
                "use the checkpoint's tokenizer.json instead"
            )
        self.controls = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}
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

    def lengths(self) -> list[int]:
        return [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.size)]


def _piece_bytes(piece: str) -> int:
    """Bytes of a SentencePiece piece: U+2581 is a space, <0x0A> a byte."""
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


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


def find_file(path: Path) -> Path:
    """The vocabulary file of a folder, or the file itself."""
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


def open_file(path: Path, given_template: str | None):
    """Settings of the folder around a vocabulary file, and the vocabulary (one of the three kinds)."""
    with open(path, "rb") as file:
        head = file.read(4096).lstrip()
    if head[:4] == b"GGUF":
        raise ValueError(
            f"{path} holds its tokenizer inside: save it as a folder first, with transformers' "
            "AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)"
        )
    is_ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", head)
    kind = _HuggingFace if head[:1] == b"{" else _Tiktoken if is_ranks else _SentencePiece
    config, named, generation, model = (
        _read_json(path.parent / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    )
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in {**named, **config}.items()
        if name.endswith("_token") and isinstance(token, (str, dict))
    }
    template = given_template or _read_template(path.parent, config)
    extra = config.get("added_tokens_decoder", {}).values()
    eos = next((c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None), [])
    settings = _Settings(
        tokens=tokens,
        special=frozenset(token["content"] for token in extra if token.get("special")),
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=next((c["pad_token_id"] for c in (generation, model) if c.get("pad_token_id") is not None), None),
        chat_template=LLAMA3_CHAT_TEMPLATE if template is None and kind is _Tiktoken else template,
    )
    vocabulary = kind(path, settings)
    eos_ids = settings.eos_ids or tuple(vocabulary.controls[token] for token in vocabulary.eos)
    return dataclasses.replace(settings, tokens={**vocabulary.tokens, **tokens}, eos_ids=eos_ids), vocabulary


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not {content!r:.80}")
    return content


def _read_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def train_bpe(texts: Iterable[str], *, vocab_size: int, chat_template: str, special_tokens: Sequence[str]) -> dict[str, bytes]:
    """Trains a byte-level BPE vocabulary that respects scripts; returns the files of a Hugging Face folder, by name.

    The special tokens (`SPECIAL_TOKENS` has the names that get a role) take the first ids; then the 256 bytes, so that
    any text can be written; then merges. The same texts give the same files. A small corpus may give fewer tokens
    than vocab_size. transformers' AutoTokenizer reads the folder, and puts BOS before a text as Llama 3's does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special_tokens = list(special_tokens)
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise ValueError(f"special_tokens must be distinct and not empty: {special_tokens}")
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size is {vocab_size}: it must hold 256 bytes and {len(special_tokens)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    scripts = pre_tokenizers.Split(Regex(_SCRIPT_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([scripts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = to_bytes.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    roles = {name: token for name, token in roles.items() if token in special_tokens}
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos := roles.get("bos_token"):
        bos_ids = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=bos_ids))
    tokenizer.post_processor = processors.Sequence(steps)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "chat_template": chat_template}
    config["clean_up_tokenization_spaces"] = False
    return {
        "special_tokens_map.json": (json.dumps(roles, ensure_ascii=False, indent=2) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
        "chat_template.jinja": chat_template.encode(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),  # last: it makes the folder a tokenizer
    }
