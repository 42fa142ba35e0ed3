"""What a run found out, and how its figures are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METRIC_NAMES = {
    "exact_match": "exact match",
    "intent_accuracy": "intent accuracy",
    "slot_f1": "slot F1",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mse": "mean squared error",
}
NOT_PERCENT = ("perplexity", "mse")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run found out. `metrics`: way to ask -> metric -> value; `example`: question, answer;
    `labels`: of a classification; `kept_step`: the one whose weights the adapter has."""

    num_train_rows: int
    num_train_sequences: int
    num_train_tokens: int
    num_too_long: int
    num_test_rows: int
    num_all_test_rows: int
    num_steps: int
    kept_step: int
    num_processes: int
    train_seconds: float
    num_parameters: int
    num_modules: int
    trained_whole: tuple[str, ...]
    labels: tuple[str, ...]
    final_losses: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]
    example: tuple[str, str] | None = None


def show(metric: str, value: float) -> str:
    """A value as tables show it: percentages with one digit."""
    return f"{value:.4g}" if metric in NOT_PERCENT else f"{value:.1f}"
