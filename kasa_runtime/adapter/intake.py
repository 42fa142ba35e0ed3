"""What was noticed in the adapters directory and has still to be looked at, name by name."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Of a name. `record`: what it stands for on the disk may be another version. `signature`: the
    new state of its directory, "" if that did not change."""

    record: bool = False
    signature: str = ""

    def __or__(self, later: Change) -> Change:
        return Change(self.record or later.record, later.signature or self.signature)


class Intake:
    """Looks at one name after another, beside all else, and at those first that somebody waits for.
    Event loop only."""

    def __init__(
        self, look: Callable[[str, Change], Awaitable[None]], caught_up: Callable[[], None]
    ) -> None:
        self._look = look
        self._caught_up = caught_up
        self._pending: OrderedDict[str, Change] = OrderedDict()
        self._looking_at = "", Change()
        self._done: dict[str, asyncio.Event] = {}  # of both
        self._task: asyncio.Task[None] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def has(self, name: str, signature: str) -> bool:
        """Whether this state of a directory is looked at, or going to be."""
        changes = [self._pending.get(name), dict([self._looking_at]).get(name)]
        return any(change is not None and change.signature == signature for change in changes)

    @property
    def num_pending(self) -> int:
        """Without the one that is looked at."""
        return len(self._pending)

    def add(self, name: str, change: Change) -> None:
        self._pending[name] = self._pending.get(name, Change()) | change
        self._done.setdefault(name, asyncio.Event())
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="adapter-intake")

    def drop(self, name: str) -> None:
        """Its directory need not be looked at any more."""
        change = self._pending.get(name)
        if change is not None and change.record:
            self._pending[name] = Change(record=True)
        elif change is not None:
            del self._pending[name]
            self._end(name)

    async def wait_for(self, name: str) -> None:
        """Return when a name has been looked at, which it is next; at once if it has not to be."""
        done = self._done.get(name)
        if done is not None:
            if name in self._pending:
                self._pending.move_to_end(name, last=False)
            await done.wait()

    async def wait_for_all(self) -> None:
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        self._pending.clear()
        for done in self._done.values():
            done.set()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        try:
            while self._pending:
                name, change = self._looking_at = self._pending.popitem(last=False)
                try:
                    await self._look(name, change)
                except OSError as error:
                    logger.warning("cannot look at %s: %s", name, error)
                except Exception:  # the edge of a task: it has to outlive what nobody foresaw
                    logger.exception("cannot take in %s", name)
                finally:
                    self._looking_at = "", Change()
                    self._end(name)
        finally:
            self._task = None
        self._caught_up()

    def _end(self, name: str) -> None:
        if name not in self._pending:
            self._done.pop(name).set()
