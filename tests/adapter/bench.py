"""An adapter manager over an engine that only keeps the books, and requests to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter.fake_host import FakeHost, Recorder
from kasa_runtime.adapter.manager import AdapterManager
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.types import (
    AdapterInfo,
    AdapterState,
    AdapterTier,
    ManifestFile,
    UploadManifest,
)


class Bench:
    """A manager with what is around it."""

    def __init__(self, root: Path, tails: TailCache, max_slots: int, **options: Any) -> None:
        self.start_wait_s: float | None = options.pop("start_wait_s", None)
        self.host = FakeHost(max_slots)
        self.seen = Recorder()
        self.store = AdapterStore(root, keep_versions=3)
        self.manager = AdapterManager(
            self.store,
            tails,
            self.host,
            max_slots=max_slots,
            observer=self.seen,
            **{"poll_interval_s": 3600} | options,
        )

    @property
    def loads(self) -> list[str]:
        """Names, in the order in which the engine got them."""
        verbs = [call.partition(" ") for call in self.host.calls]
        return [key.partition("@")[0] for verb, _, key in verbs if verb == "load"]

    def tiers(self) -> dict[str, AdapterTier]:
        return {info.name: info.tier for info in self.manager.list()}

    def states(self) -> dict[str, AdapterState]:
        return {f"{i.name}@{i.version}": i.state for i in self.manager.list()}

    async def upload(self, directory: Path, name: str, expected: str | None = None) -> AdapterInfo:
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        manifest = UploadManifest(
            name,
            tuple(
                ManifestFile(path, len(data), hashlib.sha256(data).hexdigest())
                for path, data in files.items()
            ),
            expected,
        )
        async with self.manager.upload(manifest) as upload:
            for path, data in files.items():
                await upload.write(path, 0, data)
            return await upload.commit()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.001)


async def blocked(task: asyncio.Task[object]) -> bool:
    """Whether a task does not end though everything else has had its turn."""
    await asyncio.sleep(0.05)
    return not task.done()


class Holder:
    """A request that holds a lease until it is told to let go."""

    def __init__(self, manager: AdapterManager, spec: str) -> None:
        self.key = ""
        self.let_go = asyncio.Event()
        self.task = asyncio.create_task(self._run(manager, spec))

    async def _run(self, manager: AdapterManager, spec: str) -> None:
        async with manager.lease(spec) as lease:
            self.key = lease.key
            await self.let_go.wait()

    async def holding(self) -> Holder:
        await until(lambda: bool(self.key) or self.task.done())
        if self.task.done():
            await self.task
        return self

    async def end(self) -> None:
        self.let_go.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task
