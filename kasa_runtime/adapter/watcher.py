"""Looks at the adapters directory, again and again, and tells what changed in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from kasa_runtime.adapter.intake import Change, Intake
from kasa_runtime.adapter.notifications import Notifications, is_remote
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.background import in_background

logger = logging.getLogger(__name__)

LOOK_ANYWAY_S = 30.0
"""Between looks at a directory whose file system tells of changes: not of all, as where an adapter
is a link to somewhere else."""


class DirectoryWatcher:
    """Event loop only.

    `take_in` gets name and signature of a directory that is new or changed, and returns whether to
    leave it alone until it changes again; `forget` gets the name of one that is gone; `follow` gets
    a name whose record was changed, by this process or another. They are called beside all else,
    one name after another; `caught_up` when none is left."""

    def __init__(
        self,
        store: AdapterStore,
        take_in: Callable[[str, str], Awaitable[bool]],
        forget: Callable[[str], Awaitable[None]],
        follow: Callable[[str], Awaitable[None]],
        caught_up: Callable[[], None] = lambda: None,
        *,
        poll_interval_s: float,
        force_polling: bool,
    ) -> None:
        self._store = store
        self._take_in = take_in
        self._forget = forget
        self._follow = follow
        self._poll_interval_s = poll_interval_s
        self._records: dict[str, str] = {}  # of names already followed
        self._signatures: dict[str, str] = {}  # of directories already looked at
        self._settling: dict[str, str] = {}  # seen once, maybe still being written
        self._has_looked = False  # to the end
        self._intake = Intake(self._look_at, caught_up)
        self._is_remote = is_remote(store.root.resolve())
        self._notifications = Notifications(store.root)
        self._force_polling = force_polling

    async def first_look(self) -> None:
        """Notice what is there, at once; but on a network mount, where nobody can tell whether
        another machine is still writing, only what a second look finds unchanged."""
        await self._look(settled=not self._is_remote)
        if not self._is_settled and self._is_remote:
            await asyncio.sleep(self._poll_interval_s)
            await self._look()

    def start(self) -> None:
        if not self._force_polling and not self._is_remote:
            self._notifications.start()
        self._task = asyncio.create_task(self._watch(), name="adapter-watcher")

    async def close(self) -> None:
        await self._notifications.close()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._intake.close()

    @property
    def num_pending(self) -> int:
        """Names that were noticed and not looked at yet."""
        return self._intake.num_pending

    async def arrival(self, name: str) -> None:
        """If something was noticed of a name, look at it next, and return when that is done."""
        await self._intake.wait_for(name)

    async def all_arrived(self) -> None:
        """Return when all has been looked at that was noticed."""
        await self._intake.wait_for_all()

    def check(self, name: str) -> None:
        """What is recorded of a name has to be looked at."""
        self._intake.add(name, Change(record=True))

    def expect(self, name: str, signature: str) -> None:
        """Its directory was there once, in the state of `signature` ("" if that is not known): it
        is looked at if it is in another, and missed if it is gone by now."""
        self._signatures[name] = signature

    def expect_record(self, name: str) -> None:
        """It is recorded by now: it is missed if it is not at the next look."""
        self._records.setdefault(name, "")

    def drop(self, name: str) -> None:
        """What is in its directory, if anything, is new."""
        self._signatures.pop(name, None)
        self._intake.drop(name)

    async def recorded_names(self) -> list[str]:
        """All names that are recorded. From now on it is told which of them changed."""
        self._records = await in_background(self._store.records)
        return sorted(self._records)

    async def rescan(self, *, settled: bool = False) -> None:
        """Look at the directory once, and at all that it shows. A change counts when two scans in
        a row see it, or at once if `settled`."""
        await self._look(settled=settled)
        await self.all_arrived()

    async def _look(self, *, settled: bool = False) -> None:
        self._has_looked = False
        await self._notice_records()
        found = await in_background(self._store.scan)
        for name, signature in found.items():
            if self._signatures.get(name) == signature or self._intake.has(name, signature):
                continue
            if settled or self._settling.get(name) == signature:
                self._intake.add(name, Change(signature=signature))
        gone = self._signatures.keys() - found.keys()
        for name in gone:
            if settled or self._settling.get(name) == "gone":
                self._signatures.pop(name, None)
                await self._forget(name)
        self._settling = found | dict.fromkeys(gone, "gone")
        self._has_looked = True

    @property
    def _is_settled(self) -> bool:
        """Whether nothing has to be looked at a second time."""
        return self._has_looked and self._signatures == self._settling

    async def _notice_records(self) -> None:
        before, self._records = self._records, await in_background(self._store.records)
        names = before.keys() | self._records.keys()
        for name in sorted(n for n in names if before.get(n) != self._records.get(n)):
            self._intake.add(name, Change(record=True))

    async def _look_at(self, name: str, change: Change) -> None:
        if change.record:
            await self._follow(name)
        if signature := change.signature:
            # Not looked at again until it changes, unless it changed while it was read.
            self._signatures[name] = signature if await self._take_in(name, signature) else ""

    async def _watch(self) -> None:
        while True:
            await self._next_look()
            try:
                await self._look()
            except OSError as error:
                logger.warning("cannot look at %s: %s", self._store.root, error)
            except Exception:  # the edge of a task: it has to outlive what nobody foresaw
                logger.exception("cannot take in what is in %s", self._store.root)

    async def _next_look(self) -> None:
        """Wait until a look may find something, and never less than the interval: two looks in a
        row are what tells that a copy is complete."""
        await asyncio.sleep(self._poll_interval_s)
        notifications = self._notifications
        if self._is_settled and notifications.working:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_ANYWAY_S):
                    await notifications.changed.wait()
        notifications.changed.clear()
