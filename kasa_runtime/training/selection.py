"""Which step's weights a run keeps, and when it stops because they no longer get better."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.errors import ConfigError


class Selection(TrainerCallback):
    """Has a checkpoint saved wherever `best_metric` is better than ever, and ends the run after
    `patience` measurements in which it is not (0: never).

    Everything is counted anew from the Trainer's log, which a checkpoint holds, so a resumed run
    decides as an unbroken one. The step at which a run stops is not saved: going on from there
    would train past the stop."""

    def __init__(self, best_metric: str, patience: int) -> None:
        self.best_metric, self.patience = best_metric, patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        key = f"eval_{self.best_metric}"
        values = [logs[key] for logs in state.log_history if key in logs]
        waited = num_since_best(values, greater_is_better=bool(args.greater_is_better))
        if values and waited == 0:
            control.should_save = True
        elif self.patience and waited >= self.patience:
            control.should_training_stop = True
            control.should_save = False


def num_since_best(values: list[float], *, greater_is_better: bool) -> int:
    """How many values follow the first of the best ones. Values that are not numbers are never the
    best."""
    sign = 1 if greater_is_better else -1
    best, at = float("-inf"), -1
    for index, value in enumerate(values):
        if sign * value > best:
            best, at = sign * value, index
    return len(values) - 1 - at


def unknown_metric(name: str, known: list[str]) -> ConfigError:
    return ConfigError(
        f"[train] best_metric: {name!r} is not measured during training; known: {', '.join(known)}"
    )
