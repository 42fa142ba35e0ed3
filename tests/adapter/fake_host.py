"""An engine, as far as the manager knows one, that only keeps the books."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.types import AdapterInfo, Observer


class FakeHost:
    """Records every call as "verb key". Fails, as a real engine would, when the manager breaks a
    rule: more adapters than slots, merging what is not loaded, unloading what is merged.

    A verb in `held` does not return before its event is set; a verb in `failing` raises."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.calls: list[str] = []
        self.loaded: dict[str, AdapterWeights] = {}
        self.merged: str | None = None
        self.held: dict[str, asyncio.Event] = {}
        self.failing: dict[str, Exception] = {}

    def hold(self, verb: str) -> asyncio.Event:
        """Make the next calls of a verb wait for the event."""
        return self.held.setdefault(verb, asyncio.Event())

    async def load_adapter(self, adapter: AdapterWeights, instead_of: str | None = None) -> None:
        assert adapter.key not in self.loaded
        assert len(self.loaded.keys() - {instead_of}) < self.max_slots
        if instead_of is not None:
            assert instead_of in self.loaded
            assert instead_of != self.merged
            await self._act("unload", instead_of)
        await self._act("load", adapter.key)
        self.loaded.pop(instead_of or "", None)
        self.loaded[adapter.key] = adapter

    async def unload_adapter(self, key: str) -> None:
        assert key in self.loaded
        assert key != self.merged
        await self._act("unload", key)
        del self.loaded[key]

    async def merge_adapter(self, key: str) -> None:
        assert key in self.loaded
        await self._act("merge", key)
        self.merged = key

    async def unmerge_adapter(self) -> None:
        await self._act("unmerge", self.merged or "")
        self.merged = None

    async def _act(self, verb: str, key: str) -> None:
        self.calls.append(f"{verb} {key}")
        await asyncio.sleep(0)
        if verb in self.held:
            await self.held[verb].wait()
        if verb in self.failing:
            raise self.failing[verb]


class Recorder(Observer):
    """What the manager tells an observer."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.load_failures: list[tuple[str, type[BaseException]]] = []
        self.merges: list[str] = []
        self.rejected: list[str] = []
        self.lists: list[Sequence[AdapterInfo]] = []

    def adapter_loaded(self, adapter: str, *, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(f"{adapter} {stage}")

    def adapter_load_failed(self, adapter: str, error: BaseException) -> None:
        self.load_failures.append((adapter, type(error)))

    def merged(self, adapter: str, *, seconds: float) -> None:
        assert seconds >= 0
        self.merges.append(adapter)

    def upload_rejected(self, reason: str) -> None:
        self.rejected.append(reason)

    def adapters_changed(self, adapters: Sequence[AdapterInfo]) -> None:
        self.lists.append(adapters)
