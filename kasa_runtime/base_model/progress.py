"""How long work on a base model shows itself: a bar on a terminal, two lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]


class Progress(Protocol):
    """What a long operation reports to."""

    def say(self, message: str) -> None:
        """One line for a person."""

    def track(
        self, description: str, *, total: int | None = None, done: int = 0, unit: str = ""
    ) -> AbstractContextManager[Advance]:
        """Report a stage of `total` units, of which `done` were done before (None: unknown).

        The context gives a function to call with the number of units just done. `unit` is "bytes"
        or the noun of what is counted.
        """


class ConsoleProgress:
    """A rich bar on stderr where that is a terminal; else a line at the start and at the end."""

    def __init__(self, say: Callable[[str], None] = logger.info) -> None:
        self.say = say

    @contextmanager
    def track(
        self, description: str, *, total: int | None = None, done: int = 0, unit: str = ""
    ) -> Iterator[Advance]:
        if sys.stderr.isatty():
            # this very stream: gguf.py puts another in its place to silence what runs under the bar
            console = Console(file=sys.stderr)
            with RichProgress(*_columns(unit), console=console) as bar:
                task = bar.add_task(description, total=total, completed=done)
                yield lambda amount: bar.advance(task, amount)
            return
        self.say(f"{description} ...")
        start_s = time.monotonic()
        yield lambda amount: None
        self.say(f"{description}: done in {time.monotonic() - start_s:.1f} s")


def _columns(unit: str) -> list[ProgressColumn]:
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if unit == "bytes":
        return [*columns, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    if unit:
        return [*columns, MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()]
    return [*columns, TimeElapsedColumn()]
