"""What a model must beat: a constant answer, keyword rules, and character n-grams with logistic regression.

Each baseline is a `Baseline` whose `predict` gives a label id and, where it has them, probabilities. What is learnt or
chosen is learnt on the training conversations, never on the test set.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swallow_jax.evaluate import metrics, runner

Conversation = Mapping[str, Any]
Verdict = tuple[str, dict[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    predict: Callable[[Sequence[Conversation]], list[Verdict]]
    about: dict[str, Any]  # for the manifest: kind, how it was chosen, licence


def constant(task: Any, training: Sequence[Conversation], *, metric: str) -> Baseline:
    """The one answer that does best on the training conversations under `metric`; ties go to the task's label order."""
    _need(training, "constant")
    of = metrics.metric(metric)
    golds = [gold for gold in map(runner.gold_label, training) if of.applies(gold)]
    right = {label: sum(of.right(gold, label) for gold in golds) for label in runner.label_ids(task)}
    answer = max(right, key=right.get)
    about = {"kind": "constant", "answer": answer, "chosen_for": metric, "training_conversations": len(training),
             "training_value": right[answer] / max(1, len(golds)),
             "note": "chosen on the training conversations, then fixed"}  # fmt: skip
    return Baseline(predict=lambda conversations: [(answer, None)] * len(conversations), about=about)


def keywords(task: Any) -> Baseline:
    """The category whose phrases occur most often in what the first speaker says; ties by category order; none: compliant."""
    if not task.keywords:
        raise ValueError(f"task {task.id} has no keywords; add them to its task.yaml or leave this baseline out")
    checked = task.speakers[0]

    def verdict(conversation: Conversation) -> Verdict:
        said = "\n".join(turn["text"] for turn in conversation["turns"] if turn["speaker"] == checked)
        hits = {label: sum(said.count(phrase) for phrase in phrases) for label, phrases in task.keywords.items()}
        best = max(hits, key=hits.get)
        return (best if hits[best] else metrics.COMPLIANT), None

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
    """tf-idf of character n-grams and multinomial logistic regression (scikit-learn, extra [demo])."""
    _need(training, "ngrams")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ValueError("the n-gram baseline needs scikit-learn: pip install 'swallow_jax[demo]', or leave it out") from error

    golds = [runner.gold_label(c) for c in training]
    if len(set(golds)) < 2:
        raise ValueError(f"the n-gram baseline needs two labels to learn from, the training data has only {golds[0]!r}")
    vectoriser = TfidfVectorizer(analyzer="char", ngram_range=(settings.shortest, settings.longest),
                                 min_df=settings.min_documents, sublinear_tf=True)  # fmt: skip
    model = LogisticRegression(C=settings.inverse_regularisation, max_iter=settings.max_iterations, random_state=seed)
    model.fit(vectoriser.fit_transform(task.transcript(c["turns"]) for c in training), golds)
    ids = runner.label_ids(task)

    def predict(conversations: Sequence[Conversation]) -> list[Verdict]:
        probs_IC = model.predict_proba(vectoriser.transform(task.transcript(c["turns"]) for c in conversations))
        verdicts = []
        for probs_C in probs_IC:
            probs = dict.fromkeys(ids, 0.0) | dict(zip(model.classes_.tolist(), probs_C.tolist(), strict=True))
            verdicts.append((max(probs, key=probs.get), probs))
        return verdicts

    about = {"kind": "ngrams", **dataclasses.asdict(settings), "features": len(vectoriser.vocabulary_),
             "training_conversations": len(training),
             "training_labels": dict(collections.Counter(golds))}  # fmt: skip
    return Baseline(predict=predict, about=about)


def evaluate(
    baseline: Baseline, conversations: Sequence[Conversation], *, model: str, test_set: str, seed: int, out: runner.PredictionLog
) -> dict[str, Any]:
    """Append the rows this baseline has not given yet, in the same form as a model's; returns what runner.evaluate does."""
    started = time.perf_counter()
    left = out.missing(conversations, model=model, test_set=test_set, seed=seed)
    for conversation, (pred, probs) in zip(left, baseline.predict(left) if left else (), strict=True):
        out.append(runner.prediction(conversation, pred, pred, model=model, test_set=test_set, seed=seed, probs=probs))
    seconds = time.perf_counter() - started
    return {"asked": len(left), "kept": len(conversations) - len(left), "seconds": seconds}


def _need(training: Sequence[Conversation], kind: str) -> None:
    if not training:
        raise ValueError(f"the {kind} baseline is chosen on training conversations; name them in the config's 'training'")
