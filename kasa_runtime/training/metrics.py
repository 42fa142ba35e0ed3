"""Metrics by the names that `[eval] metrics` uses: of generated texts, of predicted labels, of
predicted numbers. All are percentages but `mse`.

Texts are compared without surrounding white space. `bleu` needs sacrebleu, `rouge_l` rouge-score
and the metrics of labels scikit-learn: the extra `train`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import scipy.stats

from kasa_runtime.errors import ConfigError

References = Sequence[Sequence[str]]
"""Per prediction one or more acceptable texts."""


def exact_match(predictions: Sequence[str], references: References) -> float:
    """How many predictions equal one of their references."""
    hits = sum(
        prediction in {text.strip() for text in texts}
        for prediction, texts in zip(_stripped(predictions), references, strict=True)
    )
    return 100 * hits / len(predictions)


def intent_accuracy(predictions: Sequence[str], references: References) -> float:
    """How many predictions `Intent(...)` name the intent of their first reference."""
    hits = sum(
        parse_structure(prediction)[0] == parse_structure(texts[0])[0]
        for prediction, texts in zip(predictions, references, strict=True)
    )
    return 100 * hits / len(predictions)


def slot_f1(predictions: Sequence[str], references: References) -> float:
    """Micro-averaged F1 of (slot, value) pairs, against the first reference. Repeated pairs
    count."""
    num_correct = num_predicted = num_wanted = 0
    for prediction, texts in zip(predictions, references, strict=True):
        found, wanted = parse_structure(prediction)[1], parse_structure(texts[0])[1]
        num_correct += (found & wanted).total()
        num_predicted += found.total()
        num_wanted += wanted.total()
    return 100 * 2 * num_correct / max(1, num_predicted + num_wanted)


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU-4 over all references of each row: sacrebleu's 13a tokenisation,
    case-sensitive."""
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    score = _extra("sacrebleu").corpus_bleu(_stripped(predictions), streams).score
    return float(score)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean over rows of the best ROUGE-L F-measure among the row's references, with stemming."""
    scorer = _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    best: list[float] = [
        max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


TEXT_METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "intent_accuracy": intent_accuracy,
    "slot_f1": slot_f1,
    "bleu": bleu,
    "rouge_l": rouge_l,
}

LABEL_METRICS = ("accuracy", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman", "mse")
LOWER_IS_BETTER = ("loss", "perplexity", "mse")

_PACKAGES = {
    "bleu": "sacrebleu",
    "rouge_l": "rouge_score.rouge_scorer",
    **dict.fromkeys(LABEL_METRICS, "sklearn.metrics"),
}

_STRUCTURE = re.compile(r"(?P<intent>\w+)\((?P<slots>.*)\)", re.DOTALL)


def parse_structure(text: str) -> tuple[str, Counter[tuple[str, str]]]:
    """`Intent(slot=value; slot=value)` or `slot=value | slot=value` -> intent ("" without one) and
    pairs.

    Total: of a text that is neither, what looks like pairs is taken."""
    match = _STRUCTURE.fullmatch(text.strip())
    intent, body = (match["intent"], match["slots"]) if match else ("", text)
    pairs: Counter[tuple[str, str]] = Counter()
    for part in re.split(r"[;|]", body):
        slot, equals, value = part.partition("=")
        if equals:
            pairs[slot.strip(), value.strip()] += 1
    return intent, pairs


def check_packages(names: Sequence[str]) -> None:
    """Fail before training, not after it. Raises ConfigError for a metric whose package is
    missing."""
    for name in names:
        if name in _PACKAGES:
            _extra(_PACKAGES[name])


def score(
    names: Sequence[str], predictions: Sequence[str], references: References
) -> dict[str, float]:
    """The named metrics, in percent, rounded to two places."""
    return {name: round(TEXT_METRICS[name](predictions, references), 2) for name in names}


def label_score(
    names: Sequence[str], predicted: Sequence[int], wanted: Sequence[int], num_labels: int
) -> dict[str, float]:
    """The named metrics of class indices, in percent. F1 is that of the last of two labels, and the
    mean over labels where there are more. Matthews correlation is 0 where one side is constant."""
    metrics = _extra("sklearn.metrics")
    one = len({*wanted, *predicted}) == 1
    f1 = {"average": "binary"} if num_labels == 2 else {"average": "macro"}
    scores: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: metrics.accuracy_score(wanted, predicted),
        "f1": lambda: metrics.f1_score(wanted, predicted, zero_division=0, **f1),
        "matthews": lambda: 0.0 if one else metrics.matthews_corrcoef(wanted, predicted),
    }
    return {name: round(100 * float(scores[name]()), 2) for name in names}


def number_score(
    names: Sequence[str], predicted: Sequence[float], wanted: Sequence[float]
) -> dict[str, float]:
    """The named metrics of numbers: correlations in percent (0 where one side is constant), and the
    mean squared error as it is."""
    x, y = np.asarray(predicted, float), np.asarray(wanted, float)
    constant = bool(np.ptp(x) == 0 or np.ptp(y) == 0)
    scores: dict[str, Callable[[], Any]] = {
        "pearson": lambda: 0.0 if constant else 100 * scipy.stats.pearsonr(x, y).statistic,
        "spearman": lambda: 0.0 if constant else 100 * scipy.stats.spearmanr(x, y).statistic,
        "mse": lambda: np.mean((x - y) ** 2),
    }
    return {name: round(float(scores[name]()), 4) for name in names}


def _extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"[eval] metrics: {error.name} is not installed; pip install 'kasa-runtime[train]'"
        ) from error


def _stripped(texts: Sequence[str]) -> list[str]:
    return [text.strip() for text in texts]
