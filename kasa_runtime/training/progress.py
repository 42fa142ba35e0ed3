"""How a run shows itself: a bar on a terminal, one line per log elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """Shows the terms of the loss and the speed while the Trainer runs; keeps the last log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.console.is_terminal:
            self._bar = _bar(self.console, "{task.fields[terms]}")
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, terms=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.last = logs
            terms = _terms(logs)
            if self._bar:
                self._bar.update(self._task, terms=terms)
            else:
                self.console.print(f"step {state.global_step}/{state.max_steps}  {terms}")
        elif "eval_loss" in logs:
            text = f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}"
            self.console.print(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the terminal; idempotent."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def _terms(logs: dict[str, float]) -> str:
    names = ("loss", "L1", "L2", "L3")
    terms = [f"{name} {logs[name]:.4f}" for name in names if name in logs]
    return "  ".join([*terms, f"{logs.get('tokens_per_s', 0):.0f} tokens/s"])


@contextmanager
def counting(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work of a known number of rows; on a terminal it vanishes when done."""
    if not console.is_terminal:
        console.print(description)
        yield lambda done, total: None
        return
    with _bar(console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(console: Console, *columns: str, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        transient=transient,
    )
