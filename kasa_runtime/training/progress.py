"""How a run shows itself: a bar on a terminal, one line per log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_LOSSES = ("loss", "L1", "L2", "L3")
_DEFECTS = {"defect_A": "defect A", "defect_B": "defect B"}


class ProgressCallback(TrainerCallback):
    """Shows the terms of the loss, how far A and B are from orthonormal, the speed and the time
    that is left, while the Trainer runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._first_step, self._started = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._first_step, self._started = state.global_step, time.perf_counter()
        if self.console.is_terminal:
            terms = TextColumn("{task.fields[terms]}", table_column=Column(ratio=1))  # may wrap
            self._bar = _bar(self.console, terms)
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
            terms = describe(logs)
            if self._bar:
                self._bar.update(self._task, terms=terms)
            else:
                left = duration(self._seconds_left(state))
                self.console.print(
                    f"step {state.global_step}/{state.max_steps}  {terms}  {left} left"
                )
        elif measured := {k[5:]: v for k, v in logs.items() if k.startswith("eval_")}:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
            self.console.print(f"step {state.global_step}: held-out {shown}")

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        elapsed = time.perf_counter() - self._started
        return elapsed / max(1, done) * (state.max_steps - state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the terminal; idempotent."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def describe(logs: Mapping[str, float]) -> str:
    """One log in a line."""
    terms = [f"{name} {logs[name]:.4f}" for name in _LOSSES if name in logs]
    terms += [f"{shown} {logs[name]:.3f}" for name, shown in _DEFECTS.items() if name in logs]
    return "  ".join([*terms, f"{logs.get('tokens_per_s', 0):.0f} tokens/s"])


def duration(seconds: float) -> str:
    """Such as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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


def _bar(console: Console, *columns: ProgressColumn, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        transient=transient,
        expand=bool(columns),
    )
