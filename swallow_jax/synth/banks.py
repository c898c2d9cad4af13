"""Conversations assembled from banks of utterances: the recorded teacher and the demo's test set.

A task folder may hold `banks/<category_id>.jsonl`, items of a violating utterance with its compliant twin, and
`banks/neutral.jsonl`, exchanges that carry no label:

    {"id", "product", "customer", "violating", "compliant", "quote", "missing_items", "reply"}
    {"id", "stage", "product", "turns": [{"speaker", "text"}, ...]}

An item's exchange (customer, seller, customer) is set among neutral exchanges and, in both twins alike, compliant exchanges
of other categories, so that neither a topic nor a careful phrase gives the label away. Items are split between test, dev and
training before anything is assembled, and a training item that resembles a test or dev item is dropped.
"""

import dataclasses
import functools
import json
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax import run
from swallow_jax.data import dedup
from swallow_jax.synth import checks, pipeline, plan
from swallow_jax.task import Task

STAGES = ("opening", "smalltalk", "needs", "product", "procedure", "closing")
SPLIT_FILE = "bank_split.json"  # in the task folder, committed beside the test sets made with it
_REQUIRED = ("opening", "needs", "product", "closing")  # every conversation has one of each
_OPTIONAL = ("smalltalk", "needs", "product", "procedure")
_TEXTS = ("customer", "violating", "compliant", "reply")
_ATTEMPTS = 500  # draws before a shape counts as impossible; typical conversations need fewer than ten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Banks:
    items: dict[str, dict[str, dict[str, Any]]]  # category id -> item id -> item
    neutral: dict[str, dict[str, Any]]  # exchange id -> exchange
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Bounds of an assembled conversation, in turns and in characters of turn texts."""

    min_turns: int
    max_turns: int
    min_chars: int
    max_chars: int
    max_distractors: int  # compliant exchanges of other categories
    excerpt_share: float  # of the conversations: only the carrying exchange and at most one beside it, as in a short call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one split may use: item ids by category, and neutral exchange ids."""

    items: dict[str, list[str]]
    neutral: list[str]


def load_banks(task: Task) -> Banks:
    """Read and check the banks of a task; ValueError names file:line, the field and the remedy."""
    folder = task.folder / "banks"
    items = {
        category.id: _read(folder / f"{category.id}.jsonl", lambda row, c=category: _item_problem(row, c, task))
        for category in task.categories
    }
    neutral = _read(folder / "neutral.jsonl", lambda row: _neutral_problem(row, task))
    for stage in _REQUIRED:
        if not any(row["stage"] == stage for row in neutral.values()):
            raise ValueError(f"{folder / 'neutral.jsonl'}: no exchange of stage {stage!r}; write some")
    return Banks(items=items, neutral=neutral, sha256=run.sha256_json([items, neutral]))


def split(
    task: Task,
    banks: Banks,
    *,
    test_pairs: int,
    dev_pairs: int,
    test_neutral_share: float,
    ngram: int,
    near: float,
    seed: int,
) -> dict[str, Any]:
    """Item ids for test, dev and training such that no training text resembles a test or dev text.

    Two texts resemble each other when they share a character n-gram or their 5-gram Jaccard reaches `near`. Items that resemble
    few others are taken for the test first, since each of their neighbours is lost to training. Test pairs are spread evenly
    over the categories, earlier ones taking the remainder.
    Returns `{"test", "dev", "train": {category: ids}, "neutral": {"test", "train"}, "dropped": {"items", "neutral"}, ...}`.
    """
    texts = [
        (item_id, item[field])
        for items in banks.items.values()
        for item_id, item in items.items()
        for field in ("customer", "violating", "compliant")
    ]
    texts += [(name, turn["text"]) for name, row in banks.neutral.items() for turn in row["turns"]]
    near_to = _neighbours(texts, ngram=ngram, near=near)
    picked: dict[str, dict[str, list[str]]] = {"test": {}, "dev": {}}
    taken: set[str] = set()
    for number, category in enumerate(task.categories):
        ids = sorted(banks.items[category.id])
        order = plan.shuffled(ids, f"{seed}/bank/{category.id}")
        order.sort(key=lambda i: len(near_to[i]))  # stable: chance decides among equals
        for part, pairs in (("test", test_pairs), ("dev", dev_pairs)):
            quota = pairs // len(task.categories) + (number < pairs % len(task.categories))
            free = [i for i in order if i not in taken and (part == "test" or not near_to[i] & taken)]
            if len(free) < quota:
                raise ValueError(
                    f"banks/{category.id}.jsonl: {len(free)} items are free for the {part} split, {quota} are "
                    "wanted; write more items or ask for fewer"
                )
            picked[part][category.id] = sorted(free[:quota])
            taken |= set(free[:quota])
    neutral_test: list[str] = []
    for stage in STAGES:
        ids = sorted(i for i, row in banks.neutral.items() if row["stage"] == stage)
        order = sorted(plan.shuffled(ids, f"{seed}/neutral/{stage}"), key=lambda i: len(near_to[i]))
        neutral_test += order[: round(test_neutral_share * len(ids))]
    protected = taken | set(neutral_test)
    train = {c: [i for i in sorted(items) if i not in taken and not near_to[i] & protected] for c, items in banks.items.items()}
    neutral_train = [i for i in sorted(banks.neutral) if i not in protected and not near_to[i] & protected]
    used = protected | set(neutral_train) | {i for ids in train.values() for i in ids}
    return {
        "seed": seed,
        "ngram": ngram,
        "near": near,
        "banks_sha256": banks.sha256,
        **picked,
        "train": train,
        "neutral": {"test": sorted(neutral_test), "train": neutral_train},
        "dropped": {
            "items": sorted(i for items in banks.items.values() for i in items if i not in used),
            "neutral": sorted(i for i in banks.neutral if i not in used),
        },
    }


def load_split(task: Task, banks: Banks) -> dict[str, Any]:
    """The committed split of a task's banks; ValueError when the banks have changed since."""
    path = task.folder / SPLIT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with the config that records the teacher")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["banks_sha256"] != banks.sha256:
        raise ValueError(f"{path} was made from other banks (banks_sha256 differs); record the teacher and the test sets again")
    return found


def part(found: Mapping[str, Any], name: str) -> Part:
    """The part of a split called 'train', 'dev' or 'test'; dev shares the neutral exchanges of training."""
    return Part(items=found[name], neutral=found["neutral"]["test" if name == "test" else "train"])


def scenarios(banks: Banks, items: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, str]]]:
    """Bank items as the plan wants them: category id -> [{"id", "product"}]."""
    return {c: [{"id": i, "product": banks.items[c][i]["product"]} for i in ids] for c, ids in items.items()}


def ids(found: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, list[str]]:
    """Scenarios back to item ids by category."""
    return {c: [scenario["id"] for scenario in of] for c, of in found.items()}


def assemble(
    task: Task,
    banks: Banks,
    part: Part,
    *,
    category: str,
    item: str,
    product: str,
    position: float | None,
    seed: int,
    shape: Shape,
) -> dict[str, dict[str, Any]]:
    """Both twins of an item: `{"violation": answer, "compliant": answer}`, equal but for one turn.

    An answer is `{"turns", "labels", "evidence", "missing_items", "meta"}`; `meta` holds the number of the carrying turn and the
    bank ids used. `position` in [0, 1] says where the carrying exchange goes (None: anywhere).
    """
    rng = random.Random(seed)
    entry = banks.items[category][item]
    unsaid = _unsaid(entry, product, task)
    for _ in range(_ATTEMPTS):
        exchanges, used = _draw_exchanges(rng, banks, part, category, product, position, shape, unsaid)
        twins = {}
        for variant, field in (("violation", "violating"), ("compliant", "compliant")):
            turns, carrier = _lay(task, exchanges, entry, field)
            violates = variant == "violation"
            quote = [{"category": category, "turn": carrier, "quote": entry["quote"]}] if entry["quote"] else []
            twins[variant] = {
                "turns": turns,
                "labels": [category] if violates else [],
                "evidence": quote if violates else [],
                "missing_items": list(entry["missing_items"]) if violates else [],
                "meta": {"item": item, "product": product, "topic": category, "carrier_turn": carrier, "exchanges": used},
            }
        sizes = [sum(len(turn["text"]) for turn in twin["turns"]) for twin in twins.values()]
        if (
            shape.min_turns <= len(twins["violation"]["turns"]) <= shape.max_turns
            and shape.min_chars <= min(sizes)
            and max(sizes) <= shape.max_chars
        ):
            return twins
    raise ValueError(f"no conversation around {item} fits {shape}; widen the bounds or write shorter exchanges")


def answer(task: Task, banks: Banks, part: Part, row: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """What the recorded teacher answers to a plan row."""
    attributes = row["attributes"]
    position = None
    if "position" in attributes:  # values are listed from early to late
        values = list(task.attributes["position"])
        position = values.index(attributes["position"]) / max(1, len(values) - 1)
    return assemble(
        task,
        banks,
        part,
        category=row["category"],
        item=row["scenario"],
        product=attributes["product"],
        position=position,
        seed=row["seed"],
        shape=shape,
    )[row["variant"]]


def opening(task: Task, banks: Banks, part: Part, row: Mapping[str, Any], shape: Shape, *, leave: int) -> dict[str, Any]:
    """A plan row's `given`: an assembled conversation without its last `leave` turns, for a teacher to write them.

    The carrying turn and the reply to it always stay, so the label holds whatever the teacher writes.
    """
    whole = answer(task, banks, part, row, shape)
    end = max(whole["meta"]["carrier_turn"] + 2, len(whole["turns"]) - leave)
    return {"turns": whole["turns"][:end], **{k: whole[k] for k in ("labels", "evidence", "missing_items")}}


def conversations(task: Task, banks: Banks, part: Part, *, name: str, shape: Shape, seed: int) -> list[dict[str, Any]]:
    """A labelled set: each item of the part carries exactly one pair of twins; order and ids tell nothing."""
    rows = []
    products = list(task.attributes["product"])
    entries = [(c, i) for c in sorted(part.items) for i in part.items[c]]
    for number, (category, item) in enumerate(plan.shuffled(entries, f"{seed}/{name}")):
        product = banks.items[category][item]["product"]
        if product == "any":
            product = products[plan.draw(f"{seed}/{name}/{item}") % len(products)]
        twins = assemble(
            task,
            banks,
            part,
            category=category,
            item=item,
            product=product,
            position=None,
            seed=plan.draw(f"{seed}/{name}/{item}/seed"),
            shape=shape,
        )
        rows += [{"pair_id": f"{name}-pair-{number:03d}", **twin} for twin in twins.values()]
    rows = plan.shuffled(rows, f"{seed}/{name}/order")
    return [{"conversation_id": f"{name}-{i:04d}", **row} for i, row in enumerate(rows)]


def record(
    task: Task,
    banks: Banks,
    parts: Mapping[str, Part],
    rows: Sequence[Mapping[str, Any]],
    *,
    shape: Shape,
    asking: pipeline.Asking,
    limits: checks.Limits,
    provenance: str,
) -> list[dict[str, str]]:
    """Lines of a recorded teacher, `{"key", "text", "model", "provenance"}`: its JSON answer to the request of each plan row."""
    lines = []
    for row in rows:
        said = answer(task, banks, parts[row["split"]], row, shape)
        text = {k: said[k] for k in ("turns", "labels", "evidence", "missing_items")}
        text = json.dumps(text, ensure_ascii=False, separators=(",", ":"))
        key = pipeline.request(task, row, asking, limits).key
        lines.append({"key": key, "text": text, "model": "utterance banks", "provenance": provenance})
    return lines


def _draw_exchanges(rng, banks: Banks, part: Part, category: str, product: str, position, shape: Shape, unsaid):
    """Exchanges in order, None standing for the carrying one, and the ids of all the others."""
    stages = [*_REQUIRED, *rng.sample(_OPTIONAL, rng.randint(0, 2))]
    neutral = {i: banks.neutral[i] for i in part.neutral if banks.neutral[i]["product"] in (product, "any")}
    neutral = {i: row for i, row in neutral.items() if not any(_says(turn["text"], unsaid) for turn in row["turns"])}
    chosen: list[str] = []
    for stage in sorted(stages, key=STAGES.index):
        fitting = [i for i, row in neutral.items() if row["stage"] == stage and i not in chosen]
        own = [i for i in fitting if neutral[i]["product"] == product]
        if stage == "product" and own and rng.random() < 0.8:  # mostly talk about this very product
            fitting = own
        if fitting:
            chosen.append(rng.choice(fitting))
    exchanges: list[Any] = [neutral[i]["turns"] for i in chosen]
    slots = max(1, len(exchanges) - 1)  # between the opening and the closing
    at = 1 + (rng.randrange(slots) if position is None else round(position * (slots - 1)))
    exchanges.insert(at, None)
    others = []
    for c in sorted(set(part.items) - {category}):
        items = {i: banks.items[c][i] for i in part.items[c] if banks.items[c][i]["product"] in (product, "any")}
        others += [i for i, item in items.items() if not _says(item["customer"] + item["compliant"], unsaid)]
    by_id = {i: item for items in banks.items.values() for i, item in items.items()}
    for i in rng.sample(others, min(len(others), rng.randint(0, shape.max_distractors))):
        exchanges.insert(rng.randrange(1, len(exchanges)), (by_id[i], "compliant"))
        chosen.append(i)
    if shape.excerpt_share and rng.random() < shape.excerpt_share:
        at = exchanges.index(None)
        first = at - rng.randint(0, 1)
        exchanges = exchanges[first : at + 1]
    return exchanges, chosen


def _unsaid(entry: Mapping[str, Any], product: str, task: Task) -> tuple[set[str], set[str]]:
    """(terms, words) of what an omission leaves out: no other exchange may say it, or the omission would be mended.

    Terms are those of the missing items, and those its compliant twin says and the violating one does not; words are the
    task's other ways to speak of the same matter.
    """
    if not entry["missing_items"]:
        return set(), set()
    named = " ".join([*entry["missing_items"], entry["compliant"]])
    terms = (_terms(named) - _terms(entry["violating"])) | _terms(" ".join(entry["missing_items"]))
    words = {word for group in task.same_matter if any(word in named for word in group) for word in group}
    return terms - _terms(product), words


def _says(text: str, unsaid: tuple[set[str], set[str]]) -> bool:
    return bool(_terms(text) & unsaid[0]) or any(word in text for word in unsaid[1])


@functools.cache
def _terms(text: str) -> frozenset[str]:
    """Pairs of neighbouring kanji, words in katakana, numbers and Latin words: what a Japanese sentence is about."""
    kanji = {found[i : i + 2] for found in re.findall(r"[一-龯々〇]{2,}", text) for i in range(len(found) - 1)}
    return frozenset(kanji | set(re.findall(r"[ァ-ヶー]{2,}|[A-Za-z]{4,}|[0-9０-９]{2,}", text)))


def _lay(task: Task, exchanges, entry: Mapping[str, Any], field: str) -> tuple[list[dict[str, str]], int]:
    """Exchanges as turns, and the number of the carrying turn; neighbours of one speaker become one turn."""
    seller, customer = task.speakers[:2]
    space = "" if task.language == "ja" else " "
    turns: list[dict[str, str]] = []
    carrier = -1
    for exchange in exchanges:
        if exchange is None or isinstance(exchange, tuple):
            item, said = (entry, field) if exchange is None else exchange
            spoken = [(customer, item["customer"]), (seller, item[said]), (customer, item["reply"])]
        else:
            spoken = [(turn["speaker"], turn["text"]) for turn in exchange]
        for speaker, text in spoken:
            if turns and turns[-1]["speaker"] == speaker:
                turns[-1]["text"] += space + text
            else:
                turns.append({"speaker": speaker, "text": text})
            if exchange is None and speaker == seller:
                carrier = len(turns) - 1
    return turns, carrier


def _neighbours(texts: Sequence[tuple[str, str]], *, ngram: int, near: float) -> dict[str, set[str]]:
    """Owner -> other owners with a resembling text; texts shorter than an n-gram resemble nothing."""
    texts = [(owner, text) for owner, text in texts if len(dedup.canonical(text)) >= ngram]
    only = [text for _, text in texts]
    found: dict[str, set[str]] = {}
    for hit in [*dedup.ngram_hits(only, only, n=ngram), *dedup.near_hits(only, only, threshold=near)]:
        a, b = texts[hit.train][0], texts[hit.protected][0]
        if a != b:
            found.setdefault(a, set()).add(b)
            found.setdefault(b, set()).add(a)
    return _Sets(found)


class _Sets(dict):
    def __missing__(self, key: str) -> set[str]:
        return set()


def _read(path: pathlib.Path, problem) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a task with banks has one file for each category and a neutral.jsonl")
    rows: dict[str, dict[str, Any]] = {}
    with open(path, encoding="utf-8") as f:
        numbers = [number for number, line in enumerate(f, start=1) if line.strip()]
    for number, row in zip(numbers, run.iter_jsonl(path), strict=True):
        found = problem(row)
        if not found and row["id"] in rows:
            found = f"id {row['id']!r} is used twice; give each its own"
        if found:
            raise ValueError(f"{path}:{number}: {found}")
        rows[row["id"]] = row
    return rows


def _item_problem(row: Mapping[str, Any], category, task: Task) -> str | None:
    fields = {"id", "product", "quote", "missing_items", *_TEXTS}
    if set(row) != fields:
        return f"fields are {sorted(row)}; wanted are {sorted(fields)}"
    if not isinstance(row["id"], str) or not row["id"].startswith(category.id + "_"):
        return f"id {row['id']!r} must start with '{category.id}_'"
    for field in _TEXTS:
        if not isinstance(row[field], str) or not row[field].strip() or "\n" in row[field]:
            return f"'{field}' must be one line of text"
    if word := checks.label_word(" ".join(row[field] for field in _TEXTS), task):
        return f"contains the label word {word!r}; say it in other words"
    if row["violating"] == row["compliant"]:
        return "'violating' and 'compliant' are equal; the twins must differ"
    if not isinstance(row["quote"], str) or row["quote"] not in row["violating"]:
        return f"'quote' {row['quote']!r} is no exact part of 'violating'"
    missing = row["missing_items"]
    if not isinstance(missing, list) or not all(isinstance(m, str) and m for m in missing):
        return "'missing_items' must be a list of texts"
    if category.kind == "omission" and not missing:
        return f"{category.id} is an omission: 'missing_items' must name what was not said"
    if category.kind == "utterance" and not row["quote"]:
        return f"{category.id} is said aloud: 'quote' must not be empty"
    return _product_problem(row, task)


def _neutral_problem(row: Mapping[str, Any], task: Task) -> str | None:
    if set(row) != {"id", "stage", "product", "turns"} or not isinstance(row["id"], str):
        return f"fields are {sorted(row)}; wanted are id, stage, product, turns"
    if row["stage"] not in STAGES:
        return f"stage {row['stage']!r} is unknown; use one of {', '.join(STAGES)}"
    if not isinstance(row["turns"], list) or not row["turns"]:
        return "'turns' must be a list of {speaker, text}"
    for i, turn in enumerate(row["turns"]):
        if not isinstance(turn, dict) or set(turn) != {"speaker", "text"} or turn["speaker"] not in task.speakers:
            return f"turns[{i}] needs a speaker of {', '.join(task.speakers)} and a text"
        if not isinstance(turn["text"], str) or not turn["text"].strip():
            return f"turns[{i}].text is empty"
    if word := checks.label_word(" ".join(turn["text"] for turn in row["turns"]), task):
        return f"contains the label word {word!r}; say it in other words"
    return _product_problem(row, task)


def _product_problem(row: Mapping[str, Any], task: Task) -> str | None:
    known = ["any", *task.attributes.get("product", ())]
    return None if row["product"] in known else f"product {row['product']!r} is unknown; use one of {', '.join(known)}"
