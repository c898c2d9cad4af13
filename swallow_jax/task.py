"""A task is data: labels, definitions, legal basis, prompts and test sets, read from a folder and checked at the door.

A task folder holds `task.yaml`, the prompt files it names and its test sets. Everything a program knows about a task it
knows through `Task`; nothing about insurance, or about Japanese, is written in code. See
`configs/tasks/insurance_sales_compliance/` for the form.

A conversation is a plain dict (design.md): `{"conversation_id", "turns": [{"speaker", "text"}], "labels": [...],
"evidence": [{"category", "turn", "quote"}], "missing_items": [...], "pair_id"?, "meta"?}`. The first label is the primary
one; an empty list means compliant, and the compliant label's id is None everywhere.
"""

import dataclasses
import datetime
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from swallow_jax import run

INVALID = "invalid"  # what parse_label returns for an answer that names no label, or two
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_SECTION = re.compile(r"^## (system|user|text)\s*$", re.MULTILINE)
_ID = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegalBasis:
    """A rule a category rests on. Verdicts quote it from here, never from a model."""

    text: str
    source: str
    effective_from: str  # ISO date
    effective_to: str | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    id: str
    label: str  # the closed answer text
    name_ja: str
    name_en: str
    kind: str  # 'utterance': a guilty line exists; 'omission': something was left unsaid
    definition: str
    includes: tuple[str, ...]
    excludes: tuple[str, ...]
    legal_basis: tuple[LegalBasis, ...]
    required_items: tuple[str, ...]
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every program knows of a task. `labels[i]` is the answer text of `label_ids[i]`; the compliant one (None) is last."""

    id: str
    version: str
    folder: pathlib.Path
    language: str
    speakers: tuple[str, ...]  # the first one's conduct is checked
    turn_format: str  # how a turn is written in a prompt, with {speaker} and {text}
    label_policy: str
    categories: tuple[Category, ...]
    labels: tuple[str, ...]
    label_ids: tuple[str | None, ...]
    compliant_definition: str
    default_prompt: str
    keywords: dict[str, tuple[str, ...]]
    attributes: dict[str, dict[str, float]]
    metric: dict[str, Any]
    test_sets: dict[str, pathlib.Path]
    dev_sets: dict[str, pathlib.Path]
    meta_talk: tuple[str, ...]  # phrases of a generator talking about its text, never of a speaker
    same_matter: tuple[tuple[str, ...], ...]  # words that speak of one thing, so that saying one says the other
    notes: tuple[str, ...]
    _prompts: dict[str, dict[str, str]]
    _answers: dict[str, str | None]  # normalised text -> label id

    def category(self, label_id: str) -> Category:
        """The category of this id; ValueError names the ids that exist."""
        for category in self.categories:
            if category.id == label_id:
                return category
        known = ", ".join(c.id for c in self.categories)
        raise ValueError(f"{label_id!r} is no category of task {self.id}; it has: {known}")

    @property
    def label_words(self) -> tuple[str, ...]:
        """What must not occur in a conversation, lest it tell its own label."""
        return (*self.labels, *(category.name_ja for category in self.categories))

    def label_text(self, label_id: str | None) -> str:
        """The closed answer text of a label id (None: compliant)."""
        if label_id not in self.label_ids:
            self.category(label_id)
        return self.labels[self.label_ids.index(label_id)]

    def parse_label(self, text: str) -> str | None:
        """The label id an answer names, None for compliant, 'invalid' when it names none or more than one.

        The first line decides when it is exactly a label or an alias; otherwise the whole answer must contain one label only.
        """
        lines = text.strip().splitlines() or [""]
        first = _normalise(lines[0])
        if first in self._answers:
            return self._answers[first]
        whole = _normalise(text)
        found = {label_id for spelling, label_id in self._answers.items() if spelling in whole}
        return found.pop() if len(found) == 1 else INVALID

    def primary(self, conversation: Mapping[str, Any]) -> str | None:
        """The gold label id of a conversation under the task's label policy."""
        return conversation["labels"][0] if conversation["labels"] else None

    def prompts(self, name: str) -> dict[str, str]:
        """The template of this name: {'system', 'user'} for chat, {'text'} for a plain continuation."""
        if name not in self._prompts:
            raise ValueError(f"task {self.id} has no prompt {name!r}; task.yaml names: {', '.join(self._prompts)}")
        return self._prompts[name]

    def render(self, name: str, values: Mapping[str, Any]) -> tuple[dict[str, str], ...] | str:
        """Fill a template's {{placeholders}}: chat messages, or a string for a `## text` template."""
        template = self.prompts(name)
        filled = {part: _fill(text, values, f"prompt {name!r} of task {self.id}") for part, text in template.items()}
        if "text" in filled:
            return filled["text"]
        return tuple({"role": role, "content": filled[role]} for role in ("system", "user") if role in filled)

    def transcript(self, turns: Iterable[Mapping[str, str]]) -> str:
        """Turns as prompts show them, one a line; line breaks inside a turn become spaces."""
        return "\n".join(self.turn_format.format(speaker=t["speaker"], text=" ".join(t["text"].split("\n"))) for t in turns)

    def prompt(self, conversation: Mapping[str, Any], name: str | None = None) -> tuple[dict[str, str], ...]:
        """The messages that ask for a conversation's label; `name` chooses the template, else task.yaml's default."""
        definitions = [*(c.definition for c in self.categories), self.compliant_definition]
        pairs = zip(self.labels, definitions, strict=True)
        messages = self.render(
            name or self.default_prompt,
            {
                "conversation": self.transcript(conversation["turns"]),
                "definitions": "\n".join(f"- {label}: {definition}" for label, definition in pairs),
                "labels": "、".join(self.labels),
            },
        )
        if isinstance(messages, str):
            raise ValueError(
                f"prompt {name or self.default_prompt!r} of task {self.id} is a '## text' template; "
                "classification needs '## system' and '## user'"
            )
        return messages


def load_task(folder: str | pathlib.Path) -> Task:
    """Read and check a task folder.

    Raises:
      FileNotFoundError: the folder, its task.yaml or a prompt it names is missing.
      ValueError: a field is missing, unknown, mistyped or contradictory; the sentence names file, field and remedy.
    """
    import yaml

    folder = pathlib.Path(folder)
    path = folder / "task.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a task is a folder with a task.yaml (copy one from configs/tasks/)")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    door = _Door(path, raw, "")
    categories = tuple(_category(door.child(item, f"categories[{i}]")) for i, item in enumerate(door.take("categories", list)))
    if not categories:
        door.fail("categories", "is empty", "list at least one category")
    compliant = door.child(door.take("compliant", dict), "compliant")
    compliant_label = compliant.take("label", str)
    aliases = compliant.strings("aliases", [])
    names = [compliant.take("name_ja", str), compliant.take("name_en", str)]
    definition = compliant.take("definition", str)
    compliant.close()
    answers = _answers(door, categories, [compliant_label, *names, *aliases])
    policy = door.take("label_policy", str)
    if policy != "single_primary":
        door.fail("label_policy", f"is {policy!r}", "only 'single_primary' exists")
    speakers = door.strings("speakers")
    if len(speakers) < 2:
        door.fail("speakers", f"has {len(speakers)} entries", "name the checked party first, then the others")
    turn_format = door.take("turn_format", str)
    if set(re.findall(r"\{(\w*)\}", turn_format)) != {"speaker", "text"}:
        door.fail("turn_format", f"is {turn_format!r}", "write it with {speaker} and {text}")
    prompts = {name: _template(door, f"prompts.{name}", folder / file) for name, file in door.mapping("prompts", str).items()}
    default_prompt = door.take("default_prompt", str)
    if default_prompt not in prompts:
        door.fail("default_prompt", f"is {default_prompt!r}", f"choose one of: {', '.join(prompts)}")
    keywords = door.mapping("keywords", list, {})
    for label_id, phrases in keywords.items():
        if label_id not in {c.id for c in categories}:
            door.fail(f"keywords.{label_id}", "names no category", "use the id of a category")
        if not all(isinstance(phrase, str) and phrase for phrase in phrases):
            door.fail(f"keywords.{label_id}", "has an entry that is no text", "put it in quotes")
    attributes = door.mapping("attributes", dict, {})
    for name, values in attributes.items():
        for value, weight in values.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or weight <= 0:
                door.fail(f"attributes.{name}.{value}", f"has weight {weight!r}", "give a number above zero")
    same_matter = tuple(tuple(group.split()) for group in door.strings("same_matter", []))
    task = Task(
        id=door.take("id", str),
        version=door.take("version", str),
        folder=folder,
        language=door.take("language", str),
        speakers=speakers,
        turn_format=turn_format,
        label_policy=policy,
        categories=categories,
        compliant_definition=definition,
        labels=(*(c.label for c in categories), compliant_label),
        label_ids=(*(c.id for c in categories), None),
        default_prompt=default_prompt,
        keywords={k: tuple(v) for k, v in keywords.items()},
        attributes={k: {str(name): float(w) for name, w in v.items()} for k, v in attributes.items()},
        metric=door.take("metric", dict),
        test_sets={k: folder / v for k, v in door.mapping("test_sets", str).items()},
        dev_sets={k: folder / v for k, v in door.mapping("dev_sets", str, {}).items()},
        meta_talk=door.strings("meta_talk", []),
        same_matter=same_matter,
        notes=door.strings("notes", []),
        _prompts=prompts,
        _answers=answers,
    )
    door.close()
    return task


def read_conversations(path: str | pathlib.Path, task: Task | None = None) -> list[dict[str, Any]]:
    """Conversations of a JSONL file in file order, checked; with a task also its labels and speakers.

    Raises ValueError naming file:line for a malformed line, a quote that isn't in its turn, or an id used twice.
    """
    path = pathlib.Path(path)
    rows = run.read_jsonl(path)
    with open(path, encoding="utf-8") as f:  # read_jsonl skips blank lines; an error must name the line of the file
        numbers = [number for number, line in enumerate(f, start=1) if line.strip()]
    seen: dict[str, int] = {}
    for number, row in zip(numbers, rows, strict=True):
        where = f"{path}:{number}"
        problem = conversation_problem(row, task)
        if problem:
            raise ValueError(f"{where}: {problem}")
        name = row["conversation_id"]
        if name in seen:
            raise ValueError(f"{where}: conversation_id {name!r} was already used in line {seen[name]}; ids must be unique")
        seen[name] = number
    return rows


def conversation_problem(row: Any, task: Task | None = None) -> str | None:
    """The first thing wrong with a conversation dict, as a sentence with its remedy, or None."""
    if not isinstance(row, dict):
        return f"a conversation is a JSON object, not {type(row).__name__}"
    if not isinstance(row.get("conversation_id"), str) or not row["conversation_id"]:
        return "'conversation_id' is missing or no text; give each conversation its own"
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        return "'turns' is missing or empty; it is a list of {speaker, text}"
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("text"), str) or not turn["text"].strip():
            return f"turns[{i}] needs a non-empty text in 'text'"
        if not isinstance(turn.get("speaker"), str) or (task and turn["speaker"] not in task.speakers):
            known = f"; this task's speakers: {', '.join(task.speakers)}" if task else ""
            return f"turns[{i}].speaker is {turn.get('speaker')!r}{known}"
    for field in ("labels", "evidence", "missing_items"):
        if not isinstance(row.get(field), list):
            return f"'{field}' is missing or no list; an empty list is allowed"
    known_ids = {c.id for c in task.categories} if task else None
    for label in row["labels"]:
        if not isinstance(label, str) or (known_ids is not None and label not in known_ids):
            return f"label {label!r} is no category; an empty list means compliant"
    if not all(isinstance(item, str) and item for item in row["missing_items"]):
        return "'missing_items' holds something that is no text"
    for i, item in enumerate(row["evidence"]):
        if not isinstance(item, dict) or item.get("category") not in row["labels"]:
            return f"evidence[{i}].category must be one of the labels {row['labels']}"
        turn, quote = item.get("turn"), item.get("quote")
        if not isinstance(turn, int) or isinstance(turn, bool) or not 0 <= turn < len(turns):
            return f"evidence[{i}].turn is {turn!r}; turns are numbered 0 to {len(turns) - 1}"
        if not isinstance(quote, str) or not quote or quote not in turns[turn]["text"]:
            return f"evidence[{i}].quote {quote!r} is no exact part of turn {turn}"
    return None


class _Door:
    """One mapping of task.yaml: takes typed fields by name, and complains about those nobody took."""

    def __init__(self, path: pathlib.Path, raw: Any, prefix: str):
        self.path, self.prefix, self.taken = path, prefix, set()
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: {prefix or 'the file'} must be a mapping of fields, not {type(raw).__name__}")
        self.raw = raw

    def fail(self, field: str, what: str, remedy: str) -> None:
        raise ValueError(f"{self.path}: field '{self.prefix}{field}' {what}; {remedy}")

    def take(self, field: str, kind: type, default: Any = None) -> Any:
        self.taken.add(field)
        if field not in self.raw:
            if default is None:
                self.fail(field, "is missing", f"add it ({_KIND[kind]})")
            return default
        value = self.raw[field]
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not value.strip()):
            self.fail(field, f"is {value!r}", f"it must be {_KIND[kind]}")
        return value

    def strings(self, field: str, default: Any = None) -> tuple[str, ...]:
        values = self.take(field, list, default)
        for i, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                self.fail(f"{field}[{i}]", f"is {value!r}", "put it in quotes: it must be text")
        return tuple(values)

    def mapping(self, field: str, kind: type, default: Any = None) -> dict[str, Any]:
        values = self.take(field, dict, default)
        for key, value in values.items():
            if not isinstance(key, str) or not isinstance(value, kind):
                self.fail(f"{field}.{key}", f"is {value!r}", f"it must be {_KIND[kind]}")
        return values

    def child(self, raw: Any, name: str) -> "_Door":
        return _Door(self.path, raw, f"{self.prefix}{name}.")

    def close(self) -> None:
        unknown = [str(key) for key in self.raw if key not in self.taken]
        if unknown:
            self.fail(unknown[0], "is unknown", f"known fields: {', '.join(sorted(self.taken))}")


_KIND = {str: "text", list: "a list", dict: "a mapping"}


def _category(door: _Door) -> Category:
    bases = []
    for i, item in enumerate(door.take("legal_basis", list)):
        child = door.child(item, f"legal_basis[{i}]")
        basis = LegalBasis(
            text=child.take("text", str),
            source=child.take("source", str),
            effective_from=child.take("effective_from", str),
            effective_to=child.take("effective_to", str) if "effective_to" in child.raw else None,
            note=child.take("note", str) if "note" in child.raw else "",
        )
        for field in ("effective_from", "effective_to"):
            date = getattr(basis, field)
            try:
                datetime.date.fromisoformat(date or "2000-01-01")
            except ValueError:
                child.fail(field, f"is {date!r}", 'write it as "YYYY-MM-DD"')
        child.close()
        bases.append(basis)
    category = Category(
        id=door.take("id", str),
        label=door.take("label", str),
        name_ja=door.take("name_ja", str),
        name_en=door.take("name_en", str),
        kind=door.take("kind", str),
        definition=door.take("definition", str),
        includes=door.strings("includes"),
        excludes=door.strings("excludes"),
        legal_basis=tuple(bases),
        required_items=door.strings("required_items"),
        aliases=door.strings("aliases", []),
    )
    if not _ID.fullmatch(category.id):
        door.fail("id", f"is {category.id!r}", "use lower-case letters, digits and underscores")
    if category.id in (INVALID, "compliant"):
        door.fail("id", f"is {category.id!r}", "this word is reserved; choose another")
    if category.kind not in ("utterance", "omission"):
        door.fail("kind", f"is {category.kind!r}", "write 'utterance' or 'omission'")
    if category.kind == "omission" and not category.required_items:
        door.fail("required_items", "is empty", "an omission category lists what must be said")
    door.close()
    return category


def _answers(door: _Door, categories: tuple[Category, ...], compliant: list[str]) -> dict[str, str | None]:
    """Every accepted spelling of an answer -> label id; two labels with one spelling are an error."""
    answers: dict[str, str | None] = {}
    spellings = [(c.id, f"categories[{i}]", [c.label, c.name_ja, c.name_en, *c.aliases]) for i, c in enumerate(categories)]
    for label_id, field, texts in [*spellings, (None, "compliant", compliant)]:
        for text in texts:
            key = _normalise(text)
            if answers.get(key, label_id) != label_id:
                door.fail(
                    field,
                    f"shares the spelling {text!r} with {answers[key] or 'compliant'!r}",
                    "labels, names and aliases must be distinct",
                )
            answers[key] = label_id
    ids = [c.id for c in categories]
    for label_id in ids:
        if ids.count(label_id) > 1:
            door.fail("categories", f"has the id {label_id!r} twice", "ids must be distinct")
    return answers


def _template(door: _Door, field: str, path: pathlib.Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{door.path}: field '{field}' names {path}, which does not exist; write the file")
    parts = _SECTION.split(path.read_text(encoding="utf-8"))
    sections = {name: body.strip("\n") for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    if parts[0].strip() or set(sections) not in ({"user"}, {"system", "user"}, {"text"}):
        door.fail(
            field,
            f"({path}) has the sections {sorted(sections)}",
            "a prompt is '## user' with an optional '## system' before it, or one '## text'",
        )
    return sections


def _fill(template: str, values: Mapping[str, Any], where: str) -> str:
    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise ValueError(f"{where} asks for {{{{{match[1]}}}}}; known here: {', '.join(values)}")
        return str(values[match[1]])

    return _PLACEHOLDER.sub(value, template)


def _normalise(text: str) -> str:
    """For comparing answers: NFKC, lower case, without spaces, brackets and final punctuation."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[\s「」『』【】()\"'。、.,:!]", "", text)
