"""A task is data: labels, definitions, legal basis, prompts and test sets, read from a folder and checked at the door.

A task folder holds `task.yaml`, the prompt files it names and its test sets. Everything a program knows about a task it
knows through `Task`; nothing about insurance, or about Japanese, is written in code. `configs/tasks/_template/` shows every
field; `configs/tasks/insurance_sales_compliance/` is a whole task.

What is checked may be a dialogue, or a document: a conversation of one turn by the task's only speaker.

A conversation is a plain dict (design.md): `{"conversation_id", "turns": [{"speaker", "text"}], "labels": [...],
"evidence": [{"category", "turn", "quote"}], "missing_items": [...], "pair_id"?, "meta"?}`. The first label is the primary
one; an empty list means compliant, and the compliant label's id is None everywhere.
"""

import dataclasses
import datetime
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from swallow_jax import run

VIOLATIONS = "violations"  # the attribute whose values count the violations of one conversation
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
    near_miss: tuple[str, ...]  # what comes close and does not count: a twin that stays compliant may do it
    legal_basis: tuple[LegalBasis, ...]
    required_items: tuple[str, ...]
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """Where all attributes of `when` have one of the values listed, those of `never` have none of theirs."""

    when: dict[str, tuple[str, ...]]
    never: dict[str, tuple[str, ...]]

    def broken(self, attributes: Mapping[str, str]) -> str | None:
        """The first attribute of `never` whose value is not allowed here, or None."""
        if any(attributes[name] not in values for name, values in self.when.items()):
            return None
        return next((name for name, values in self.never.items() if attributes[name] in values), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Personas:
    """Who speaks: short descriptions in the task, or a column of a Parquet file (Nemotron-Personas-Japan and its kind)."""

    texts: tuple[str, ...] = ()
    path: pathlib.Path | None = None
    column: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every program knows of a task. `labels[i]` is the answer text of `label_ids[i]`; the compliant one (None) is last."""

    id: str
    version: str
    folder: pathlib.Path
    language: str
    form: str  # 'dialogue', or 'document': one turn by the only speaker
    speakers: tuple[str, ...]  # the first one's conduct is checked
    turn_format: str  # how a turn is written in a prompt, with {speaker} and {text}
    label_policy: str  # 'binary' (one category), 'single_primary' (the first label is the answer), 'multi' (all of them are)
    output: str  # what a model is trained to write: 'label', or 'verdict' (design.md's JSON)
    categories: tuple[Category, ...]
    labels: tuple[str, ...]
    label_ids: tuple[str | None, ...]
    compliant_definition: str
    default_prompt: str
    keywords: dict[str, tuple[str, ...]]
    attributes: dict[str, dict[str, float]]
    constraints: tuple[Constraint, ...]
    personas: Personas
    metric: dict[str, Any]
    test_sets: dict[str, pathlib.Path]
    dev_sets: dict[str, pathlib.Path]
    labels_may_occur: bool  # whether a text may spell out a label: a complaint about billing says "billing"
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
    def spec_sha256(self) -> str:
        """Hash of what labels mean and what models are told: task.yaml and the prompts it names, wherever they lie."""
        return run.sha256_json([run.sha256_file(self.folder / "task.yaml"), self._prompts])

    @property
    def label_words(self) -> tuple[str, ...]:
        """What must not occur in a conversation, lest it tell its own label."""
        if self.labels_may_occur:
            return ()
        return (*self.labels, *(category.name_ja for category in self.categories))

    def label_text(self, label_id: str | None) -> str:
        """The closed answer text of a label id (None: compliant)."""
        if label_id not in self.label_ids:
            self.category(label_id)
        return self.labels[self.label_ids.index(label_id)]

    def parse_label(self, text: str) -> str | None:
        """The label id an answer names, None for compliant, 'invalid' when it names none or more than one.

        The first line decides when it is exactly a label or an alias; otherwise the whole answer must contain one label only.
        Under the policy 'multi' it is the first label that `parse_labels` finds.
        """
        if self.label_policy == "multi":
            found = self.parse_labels(text)
            return found if found == INVALID else (found[0] if found else None)
        lines = text.strip().splitlines() or [""]
        first = _normalise(lines[0])
        if first in self._answers:
            return self._answers[first]
        whole = _normalise(text)
        found = {label_id for spelling, label_id in self._answers.items() if spelling in whole}
        return found.pop() if len(found) == 1 else INVALID

    def parse_labels(self, text: str) -> tuple[str, ...] | str:
        """The label ids an answer of several labels names, in its order; () for compliant; 'invalid' for none, or a mixture.

        The first line counts when all of its parts, between commas or signs of enumeration, are labels; else the whole answer.
        """
        lines = text.strip().splitlines() or [""]
        parts = [_normalise(part) for part in re.split(r"[、,，;；/]", lines[0])]
        if all(part in self._answers for part in parts):
            found = [self._answers[part] for part in parts]
        else:
            whole = _normalise(text)
            at = {spelling: whole.find(spelling) for spelling in self._answers if spelling in whole}
            found = [self._answers[spelling] for spelling in sorted(at, key=lambda s: (at[s], -len(s)))]
        found = list(dict.fromkeys(found))
        if not found or (None in found and len(found) > 1):
            return INVALID
        return tuple(label for label in found if label is not None)

    def answer(self, labels: Iterable[str]) -> str:
        """The closed answer for these label ids under the label policy; categories in the task's order when there are several."""
        labels = list(labels)
        if self.label_policy != "multi" or len(labels) < 2:
            return self.label_text(labels[0] if labels else None)
        return self.list_mark.join(self.label_text(c.id) for c in self.categories if c.id in labels)

    @property
    def list_mark(self) -> str:
        return "、" if self.language == "ja" else ", "

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
                "labels": self.list_mark.join(self.labels),
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
      ValueError: a field is missing, unknown, mistyped or contradictory; the sentence names file, line, field and remedy.
    """
    folder = pathlib.Path(folder)
    path = folder / "task.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a task is a folder with a task.yaml (copy configs/tasks/_template)")
    raw, lines = _read_yaml(path)
    door = _Door(path, raw, "", lines)
    categories = tuple(_category(door.child(item, f"categories[{i}]")) for i, item in enumerate(door.take("categories", list)))
    if not categories:
        door.fail("categories", "is empty", "list at least one category")
    compliant = door.child(door.take("compliant", dict), "compliant")
    compliant_label = compliant.take("label", str)
    names = _names(compliant)
    aliases = compliant.strings("aliases", [])
    definition = compliant.take("definition", str)
    compliant.close()
    answers = _answers(door, categories, [compliant_label, *names, *aliases])
    policy = door.choice("label_policy", ("binary", "single_primary", "multi"))
    if policy == "binary" and len(categories) > 1:
        door.fail("label_policy", f"is 'binary' with {len(categories)} categories", "leave one, or write 'single_primary'")
    form = door.choice("form", ("dialogue", "document"), "dialogue")
    speakers = door.strings("speakers")
    if form == "dialogue" and len(speakers) < 2:
        door.fail("speakers", f"has {len(speakers)} entries", "name the checked party first, then the others")
    if form == "document" and len(speakers) != 1:
        door.fail("speakers", f"has {len(speakers)} entries", "a document has one: name what it is, such as [Complaint]")
    if len(set(speakers)) < len(speakers):
        door.fail("speakers", "names one party twice", "give each its own name")
    turn_format = door.take("turn_format", str)
    holes = re.findall(r"\{(\w*)\}", turn_format)
    if not set(holes) <= {"speaker", "text"} or "text" not in holes or (form == "dialogue" and "speaker" not in holes):
        door.fail("turn_format", f"is {turn_format!r}", "write it with {speaker} and {text}")
    if turn_format.count("{") != len(holes) or turn_format.count("}") != len(holes):
        door.fail("turn_format", f"is {turn_format!r}", "write no braces but those of {speaker} and {text}")
    keywords = door.mapping("keywords", list, {})
    for label_id, phrases in keywords.items():
        if label_id not in {c.id for c in categories}:
            door.fail(f"keywords.{label_id}", "names no category", "use the id of a category")
        for i, phrase in enumerate(phrases):
            if not isinstance(phrase, str) or not phrase:
                door.fail(f"keywords.{label_id}[{i}]", f"is {phrase!r}", "put it in quotes: it must be text")
    attributes = _attributes(door, len(categories))
    prompts = {
        name: _template(door, f"prompts.{name}", file, {*_PLACEHOLDERS, *attributes})
        for name, file in door.files("prompts").items()
    }
    default_prompt = door.choice("default_prompt", tuple(prompts))
    if "user" not in prompts[default_prompt]:
        door.fail("default_prompt", f"is {default_prompt!r}, a '## text' template", "choose one with '## user'")
    metric = door.take("metric", dict)
    if not isinstance(metric.get("primary"), str):
        door.fail("metric.primary", f"is {metric.get('primary')!r}", "name the metric that decides, such as accuracy")
    task = Task(
        id=door.name("id"),
        version=door.take("version", str),
        folder=folder,
        language=door.take("language", str),
        form=form,
        speakers=speakers,
        turn_format=turn_format,
        label_policy=policy,
        output=door.choice("output", ("label", "verdict"), "label"),
        categories=categories,
        compliant_definition=definition,
        labels=(*(c.label for c in categories), compliant_label),
        label_ids=(*(c.id for c in categories), None),
        default_prompt=default_prompt,
        keywords={k: tuple(v) for k, v in keywords.items()},
        attributes=attributes,
        constraints=_constraints(door, attributes),
        personas=_personas(door, folder),
        metric=metric,
        test_sets=door.files("test_sets"),
        dev_sets=door.files("dev_sets", {}),
        labels_may_occur=door.flag("labels_may_occur", False),
        meta_talk=door.strings("meta_talk", []),
        same_matter=tuple(tuple(group.split()) for group in door.strings("same_matter", [])),
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


def _read_yaml(path: pathlib.Path) -> tuple[Any, dict[str, int]]:
    """The value of a YAML file, and the line of every field by its name ("categories[0].label": 14)."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    lines: dict[str, int] = {"": 1}
    walked: set[int] = set()

    def walk(node: Any, name: str) -> None:
        if id(node) in walked:  # an alias; it may even lead back to itself
            return
        walked.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line, field = key.start_mark.line + 1, f"{name}.{key.value}".lstrip(".")
                if str(key.value) in seen:  # YAML itself would silently keep the last
                    raise ValueError(f"{path}:{line}: field '{field}' stands twice, first in line {seen[key.value]}; remove one")
                seen[str(key.value)] = lines[field] = line
                walk(value, field)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[f"{name}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{name}[{i}]")

    try:
        node = yaml.compose(text, Loader=loader)
        walk(node, "")
        return yaml.load(text, Loader=loader), lines
    except RecursionError:
        raise ValueError(f"{path}:1: nests too deeply, or refers to itself; write it flat, without anchors") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", error)).split())
        line = mark.line + 1 if mark else text[: getattr(error, "position", 0)].count("\n") + 1
        line = max(1, min(line, len(text.splitlines())))  # an end that comes too early lies behind the last line
        raise ValueError(f"{path}:{line}: not valid YAML ({what}); look for a missing quote, bracket or indent there") from error
    except ValueError as error:
        if str(error).startswith(f"{path}:"):
            raise
        # A date such as 2020-13-40, which YAML takes for one before we see it.
        raise ValueError(f"{path}:1: holds a value that YAML cannot read ({error}); put dates and numbers in quotes") from error


class _Door:
    """One mapping of task.yaml: takes typed fields by name, and complains about those nobody took."""

    def __init__(self, path: pathlib.Path, raw: Any, prefix: str, lines: Mapping[str, int]):
        self.path, self.prefix, self.lines, self.taken = path, prefix, lines, set()
        self.raw = raw if isinstance(raw, dict) else {}
        if not isinstance(raw, dict):
            name = prefix.rstrip(".")
            what = f"field '{name}'" if name else "the file"
            kind = "empty" if raw is None else type(raw).__name__
            raise ValueError(
                f"{path}:{self.line(name)}: {what} must be a mapping of fields, not {kind}; write 'field: value' lines"
            )

    def line(self, name: str) -> int:
        """Where a field stands; of a missing one, where what should hold it begins."""
        while name and name not in self.lines:
            name = name[: max(name.rfind("."), name.rfind("["), 0)]
        return self.lines[name]

    def fail(self, field: str, what: str, remedy: str) -> NoReturn:
        name = self.prefix + field
        raise ValueError(f"{self.path}:{self.line(name)}: field '{name}' {what}; {remedy}")

    def take(self, field: str, kind: type, default: Any = None) -> Any:
        self.taken.add(field)
        if field not in self.raw:
            if default is None:
                self.fail(field, "is missing", f"add it ({_KIND[kind]})")
            return default
        value = self.raw[field]
        if not isinstance(value, kind) or (kind is str and not value.strip()):
            self.fail(field, f"is {value!r}", f"it must be {_KIND[kind]}")
        return value

    def files(self, field: str, default: Any = None) -> dict[str, pathlib.Path]:
        """Files by name. They lie in the task's folder: a stranger's task must not make a program read or write elsewhere."""
        found = {}
        for name, file in self.mapping(field, str, default).items():
            parts = pathlib.PurePath(os.path.normpath(file)).parts
            if pathlib.PurePath(file).is_absolute() or parts[:1] == ("..",):
                self.fail(f"{field}.{name}", f"is {file!r}", "name a file inside the task's folder")
            found[name] = self.path.parent / file
        return found

    def flag(self, field: str, default: bool) -> bool:
        self.taken.add(field)
        value = self.raw.get(field, default)
        if not isinstance(value, bool):
            self.fail(field, f"is {value!r}", "write true or false")
        return value

    def choice(self, field: str, known: tuple[str, ...], default: str | None = None) -> str:
        value = self.take(field, str, default)
        if value not in known:
            self.fail(field, f"is {value!r}", f"choose one of: {', '.join(known)}")
        return value

    def name(self, field: str) -> str:
        value = self.take(field, str)
        if not _ID.fullmatch(value):
            self.fail(field, f"is {value!r}", "use lower-case letters, digits and underscores")
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
            if not isinstance(key, str) or not isinstance(value, kind) or (kind is str and not value.strip()):
                self.fail(f"{field}.{key}", f"is {value!r}", f"its name must be text (in quotes), its value {_KIND[kind]}")
        return values

    def child(self, raw: Any, name: str) -> "_Door":
        return _Door(self.path, raw, f"{self.prefix}{name}.", self.lines)

    def close(self) -> None:
        unknown = [str(key) for key in self.raw if key not in self.taken]
        if unknown:
            self.fail(unknown[0], "is unknown", f"known fields: {', '.join(sorted(self.taken))}")


_KIND = {str: "text", list: "a list", dict: "a mapping"}
# What prompts may ask for, beside the task's attributes. `experiments.synthesize` and `.evaluate` give the values.
_PLACEHOLDERS = (
    "conversation", "definitions", "labels", "category", "name", "definition", "includes", "excludes", "near_miss",
    "required_items", "label_json", "severity", "guideline", "prefix", "twin", "quote", "missing_items", "persona", "seed",
    "min_turns", "max_turns", "min_chars", "max_chars",
)  # fmt: skip


def _names(door: _Door) -> tuple[str, str]:
    """name_ja and name_en; one of them may be left out and is then the other."""
    given = [door.take(field, str, "") for field in ("name_ja", "name_en")]
    if not any(given):
        door.fail("name_en", "is missing", "add it, or name_ja (text)")
    return given[0] or given[1], given[1] or given[0]


def _category(door: _Door) -> Category:
    bases = []
    for i, item in enumerate(door.take("legal_basis", list, [])):
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
        if basis.effective_to and basis.effective_to < basis.effective_from:
            child.fail("effective_to", f"is {basis.effective_to!r}", "a rule cannot end before it begins; correct one date")
        child.close()
        bases.append(basis)
    name_ja, name_en = _names(door)
    category = Category(
        id=door.name("id"),
        label=door.take("label", str),
        name_ja=name_ja,
        name_en=name_en,
        kind=door.choice("kind", ("utterance", "omission")),
        definition=door.take("definition", str),
        includes=door.strings("includes"),
        excludes=door.strings("excludes"),
        near_miss=door.strings("near_miss", []),
        legal_basis=tuple(bases),
        required_items=door.strings("required_items", []),
        aliases=door.strings("aliases", []),
    )
    if category.id in (INVALID, "compliant"):
        door.fail("id", f"is {category.id!r}", "this word is reserved; choose another")
    if category.kind == "omission" and not category.required_items:
        door.fail("required_items", "is empty", "an omission category lists what must be said")
    door.close()
    return category


def _attributes(door: _Door, categories: int) -> dict[str, dict[str, float]]:
    attributes = door.mapping("attributes", dict, {})
    for name, values in attributes.items():
        if name in _PLACEHOLDERS and name != "severity":
            door.fail(f"attributes.{name}", "has the name of something else that prompts ask for", "rename the attribute")
        if not values:
            door.fail(f"attributes.{name}", "is empty", "give it values with weights, or remove it")
        for value, weight in values.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                door.fail(f"attributes.{name}.{value}", f"has weight {weight!r}", "give a number above zero")
            if name == VIOLATIONS and not (str(value).isdecimal() and 1 <= int(value) <= categories):
                door.fail(f"attributes.{name}.{value}", "is no number of violations", f"write 1 to {categories}")
    return {name: {str(value): float(weight) for value, weight in values.items()} for name, values in attributes.items()}


def _constraints(door: _Door, attributes: Mapping[str, Mapping[str, float]]) -> tuple[Constraint, ...]:
    found = []
    for i, item in enumerate(door.take("constraints", list, [])):
        child = door.child(item, f"constraints[{i}]")
        sides = {}
        for side in ("when", "never"):
            sides[side] = {name: tuple(map(str, values)) for name, values in child.mapping(side, list).items()}
            for name, values in sides[side].items():
                if name not in attributes:
                    child.fail(f"{side}.{name}", "is no attribute", f"choose one of: {', '.join(attributes)}")
                for j, value in enumerate(values):
                    if value not in attributes[name]:
                        known = ", ".join(attributes[name])
                        child.fail(f"{side}.{name}[{j}]", f"is {value!r}", f"values of {name}: {known}")
        child.close()
        for name, values in sides["never"].items():
            if set(values) >= set(attributes[name]):
                child.fail(f"never.{name}", "leaves no value", "take one out, or write the constraint the other way round")
        found.append(Constraint(**sides))
    return tuple(found)


def _personas(door: _Door, folder: pathlib.Path) -> Personas:
    """A list of texts, or {path, column} of a Parquet file beside the task (an absolute path may lead anywhere)."""
    if not isinstance(door.raw.get("personas"), dict):
        return Personas(texts=door.strings("personas", []))
    child = door.child(door.take("personas", dict), "personas")
    personas = Personas(path=folder / child.take("path", str), column=child.take("column", str))
    child.close()
    return personas


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


def _template(door: _Door, field: str, path: pathlib.Path, known: Collection[str]) -> dict[str, str]:
    if not path.is_file():
        line = door.line(door.prefix + field)
        raise FileNotFoundError(f"{door.path}:{line}: field '{field}' names {path}, which does not exist; write the file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{error.object[: error.start].count(bytes([10])) + 1}: not UTF-8; save the file as UTF-8"
        ) from error
    parts = _SECTION.split(text)
    sections = {name: body.strip("\n") for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    if parts[0].strip() or set(sections) not in ({"user"}, {"system", "user"}, {"text"}):
        door.fail(
            field,
            f"({path}) has the sections {sorted(sections)}",
            "a prompt is '## user' with an optional '## system' before it, or one '## text'",
        )
    for match in _PLACEHOLDER.finditer(text):
        if match[1] not in known:
            line = text[: match.start()].count("\n") + 1
            raise ValueError(f"{path}:{line}: nothing gives {match[0]}; known: {', '.join(sorted(known))}")
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
