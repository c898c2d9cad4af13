"""What a model must beat: a constant answer, keyword rules, and character n-grams with logistic regression.

Each baseline is a `Baseline` whose `predict` gives category ids (none: compliant; one, unless the task's policy is 'multi') and,
where it has them, probabilities. What is learnt or chosen is learnt on the training conversations, never on the test set.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swallow_jax.evaluate import metrics, runner
from swallow_jax.evaluate.windows import Answer

Conversation = Mapping[str, Any]
Verdict = tuple[tuple[str, ...], dict[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    predict: Callable[[Sequence[Conversation]], list[Verdict]]
    about: dict[str, Any]  # for the manifest: kind, how it was chosen, licence


def constant(task: Any, training: Sequence[Conversation], *, metric: str) -> Baseline:
    """The one answer that does best on the training conversations under `metric`; ties go to the task's label order."""
    _need(training, "constant")
    of = metrics.metric(metric)
    if of.needs not in (None, "golds"):
        raise ValueError(f"the constant baseline gives labels alone; choose it by another metric than {metric!r}")
    rows = [{"gold": runner.gold_label(c), "golds": c["labels"]} for c in training]
    rows = [row for row in rows if of.applies(row)]
    candidates = [() if label is None else (label,) for label in task.label_ids]
    if task.label_policy == "multi":
        candidates += dict.fromkeys(tuple(c["labels"]) for c in training if len(c["labels"]) > 1)

    def value(answer: tuple[str, ...]) -> int:
        pred = {"pred": answer[0] if answer else metrics.COMPLIANT, "preds": answer}
        return sum(of.right(row | pred) for row in rows)

    answer = max(candidates, key=value)
    about = {"kind": "constant", "answer": list(answer), "chosen_for": metric, "training_conversations": len(training),
             "training_value": value(answer) / max(1, len(rows)),
             "note": "chosen on the training conversations, then fixed"}  # fmt: skip
    return Baseline(predict=lambda conversations: [(answer, None)] * len(conversations), about=about)


def keywords(task: Any) -> Baseline:
    """The category whose phrases occur most often in what the first speaker says; ties by category order; none: compliant.

    Where all labels count: every category with a phrase, the most frequent first.
    """
    if not task.keywords:
        raise ValueError(f"task {task.id} has no keywords; add them to its task.yaml or leave this baseline out")
    checked = task.speakers[0]

    def verdict(conversation: Conversation) -> Verdict:
        said = "\n".join(turn["text"] for turn in conversation["turns"] if turn["speaker"] == checked)
        hits = {label: sum(said.count(phrase) for phrase in phrases) for label, phrases in task.keywords.items()}
        found = sorted((label for label in hits if hits[label]), key=lambda label: -hits[label])
        return tuple(found if task.label_policy == "multi" else found[:1]), None

    about = {"kind": "keywords", "phrases": sum(map(len, task.keywords.values()))}
    return Baseline(predict=lambda conversations: [verdict(c) for c in conversations], about=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramSettings:
    shortest: int  # characters
    longest: int
    min_documents: int  # an n-gram must occur in so many training conversations
    inverse_regularisation: float  # scikit-learn's C
    max_iterations: int


def ngrams(task: Any, training: Sequence[Conversation], *, settings: NgramSettings, seed: int) -> Baseline:
    """tf-idf of character n-grams and logistic regression (scikit-learn, extra [baselines]): multinomial over the primary
    labels, or, where all labels count, one regression a category that answers yes or no."""
    _need(training, "ngrams")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ValueError("the n-gram arm needs scikit-learn: pip install 'swallow_jax[baselines]', or leave it out") from error

    golds = [runner.gold_label(c) for c in training]
    if len(set(golds)) < 2:
        raise ValueError(f"the n-gram baseline needs two labels to learn from, the training data has only {golds[0]!r}")
    vectoriser = TfidfVectorizer(analyzer="char", ngram_range=(settings.shortest, settings.longest),
                                 min_df=settings.min_documents, sublinear_tf=True)  # fmt: skip
    ids = runner.label_ids(task)
    seen = vectoriser.fit_transform(task.transcript(c["turns"]) for c in training)

    def fitted(targets: Sequence) -> LogisticRegression:
        model = LogisticRegression(C=settings.inverse_regularisation, max_iter=settings.max_iterations, random_state=seed)
        return model.fit(seen, targets)

    if task.label_policy == "multi":
        constant = {c for c in ids[:-1] if len({c in row["labels"] for row in training}) < 2}
        by_category = {c: fitted([c in row["labels"] for row in training]) for c in ids[:-1] if c not in constant}
    else:
        model = fitted(golds)

    def predict_sets(conversations: Sequence[Conversation]) -> list[Verdict]:
        features = vectoriser.transform(task.transcript(c["turns"]) for c in conversations)
        yes = {c: m.predict_proba(features)[:, 1].tolist() for c, m in by_category.items()}
        verdicts = []
        for number in range(len(conversations)):
            probs = {c: yes[c][number] if c in yes else 0.0 for c in ids[:-1]}
            found = sorted((c for c in probs if probs[c] >= 0.5), key=lambda c: -probs[c])
            verdicts.append((tuple(found), probs | {metrics.COMPLIANT: math.prod(1 - p for p in probs.values())}))
        return verdicts

    def predict(conversations: Sequence[Conversation]) -> list[Verdict]:
        probs_IC = model.predict_proba(vectoriser.transform(task.transcript(c["turns"]) for c in conversations))
        verdicts = []
        for probs_C in probs_IC:
            probs = dict.fromkeys(ids, 0.0) | dict(zip(model.classes_.tolist(), probs_C.tolist(), strict=True))
            best = max(probs, key=probs.get)
            verdicts.append((() if best == metrics.COMPLIANT else (best,), probs))
        return verdicts

    about = {"kind": "ngrams", **dataclasses.asdict(settings), "features": len(vectoriser.vocabulary_),
             "training_conversations": len(training),
             "training_labels": dict(collections.Counter(golds))}  # fmt: skip
    return Baseline(predict=predict_sets if task.label_policy == "multi" else predict, about=about)


def evaluate(
    baseline: Baseline, conversations: Sequence[Conversation], *, model: str, test_set: str, seed: int, out: runner.PredictionLog,
    several: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Append the rows this baseline has not given yet, in the same form as a model's; returns what runner.evaluate does."""
    started = time.perf_counter()
    left = out.missing(conversations, model=model, test_set=test_set, seed=seed)
    names = {"model": model, "test_set": test_set, "seed": seed, "several": several}
    answers = [
        Answer(preds=preds, raw=", ".join(preds) or metrics.COMPLIANT, probs=probs)
        for preds, probs in (baseline.predict(left) if left else ())
    ]
    out.append(*(runner.prediction(c, answer, **names) for c, answer in zip(left, answers, strict=True)))
    seconds = time.perf_counter() - started
    tokens = {"prompt_tokens": 0, "completion_tokens": 0}
    return {"asked": len(left), "kept": len(conversations) - len(left), "seconds": seconds, **tokens}


def _need(training: Sequence[Conversation], kind: str) -> None:
    if not training:
        raise ValueError(f"the {kind} baseline is chosen on training conversations; name them in the config's 'training'")
