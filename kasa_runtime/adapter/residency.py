"""Which versions are in the engine, who holds them, and which one is merged.

A request holds a lease on one version from admission to its last token; replacing, rolling back,
deleting and evicting never touch a version with leases.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import finish, in_background, return_memory
from kasa_runtime.errors import CapacityExceeded, EngineDead
from kasa_runtime.types import AdapterInfo, AdapterState, Observer

T = TypeVar("T")


class AdapterHost(Protocol):
    """The engine, as far as the manager knows it (see `engine/base.py`)."""

    async def load_adapter(self, adapter: AdapterWeights) -> None: ...
    async def unload_adapter(self, key: str) -> None: ...
    async def merge_adapter(self, key: str) -> None: ...
    async def unmerge_adapter(self) -> None: ...


@dataclass(frozen=True)
class Lease:
    """The right to use one version. `key` names it in the engine."""

    key: str
    name: str
    version: str


@dataclass
class Resident:
    """A version that is in the engine, or on its way there."""

    loading: asyncio.Task[None]
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    retired: bool = False  # replaced or deleted: leaves with its last lease
    ready: bool = False  # loaded, or failed to
    failed: bool = False

    @property
    def idle(self) -> bool:
        return self.ready and not self.leases


class Residency:
    """The engine's slots. Event loop only.

    `is_current` tells of a key whether it is what its name stands for now."""

    def __init__(
        self,
        host: AdapterHost,
        loader: AdapterLoader,
        *,
        max_slots: int,
        observer: Observer,
        is_current: Callable[[str], bool],
    ) -> None:
        self.merged: str | None = None  # key
        self._host = host
        self._loader = loader
        self._max_slots = max_slots
        self._observer = observer
        self._is_current = is_current
        self._resident: dict[str, Resident] = {}
        self._slot_freed = asyncio.Condition()
        self._merging = asyncio.Lock()

    @asynccontextmanager
    async def lease(self, info: AdapterInfo) -> AsyncIterator[Lease]:
        """Hold a version, in the engine. Waits for a slot if all are held.

        Raises AdapterInvalid, CapacityExceeded."""
        key = key_of(info)
        with ExitStack() as until_loaded:
            until_loaded.enter_context(self._loader.pin(info))
            resident = await self._hold(key, info)
            try:
                await asyncio.shield(resident.loading)
                until_loaded.close()
                yield Lease(key, info.name, info.version)
            finally:
                await self._release(key, resident)

    async def merge(self, wanted: AbstractAsyncContextManager[Lease]) -> Lease:
        """Write the version that `wanted` leases into the weights; the one merged before is
        unmerged by the same switch."""
        async with self._merging, wanted as lease:
            before = self.merged
            await finish(self._switch(lease))
        await self.retire_if_replaced(before)
        return lease

    async def unmerge(self) -> None:
        async with self._merging:
            if self.merged is None:
                return
            before = self.merged
            await finish(self._switch(None))
        await self.retire_if_replaced(before)

    async def retire(self, key: str) -> None:
        """Unload as soon as nobody holds it."""
        resident = self._resident.get(key)
        if resident is not None and key != self.merged:
            resident.retired = True
            await finish(self._settle(key, resident))

    async def retire_if_replaced(self, key: str | None) -> None:
        if key is not None and not self._is_current(key):
            await self.retire(key)

    async def retire_replaced_of(self, name: str) -> None:
        """`retire_if_replaced` for all versions of a name."""
        for key in [k for k in self._resident if name_of(k) == name]:
            await self.retire_if_replaced(key)

    def names(self) -> dict[str, str]:
        """Name -> tier, of what is in the engine."""
        return {name_of(key): "slot" for key, r in self._resident.items() if r.ready}

    def live(self, info: AdapterInfo) -> AdapterInfo:
        """`info` with its present state and number of requests."""
        if info.state is AdapterState.QUARANTINED:
            return info
        key = key_of(info)
        resident = self._resident.get(key)
        if key == self.merged:
            state = AdapterState.MERGED
        elif resident is None:
            state = AdapterState.READY
        else:
            state = AdapterState.RESIDENT if resident.ready else AdapterState.LOADING
        if resident is None and state is info.state:
            return info
        return replace(info, state=state, in_flight=resident.leases if resident else 0)

    # --- inside -----------------------------------------------------------------------------------

    async def _hold(self, key: str, info: AdapterInfo) -> Resident:
        """Count a lease on a resident version, starting to load it if nobody has. Waits while no
        slot can be freed. Raises CapacityExceeded if none can ever be."""
        async with self._slot_freed:
            while key not in self._resident:
                if len(self._resident) < self._max_slots or await self._evict_one():
                    loading = asyncio.create_task(self._load(key, info), name=f"load {key}")
                    self._resident[key] = Resident(loading)
                    break
                if self._max_slots == 1 and self.merged is not None:
                    raise CapacityExceeded(
                        f"{self.merged} is merged and has the only slot; unmerge it or raise "
                        "max_slots"
                    )
                await self._slot_freed.wait()
            resident = self._resident[key]
            resident.leases += 1
            resident.last_used = time.monotonic()
            return resident

    async def _release(self, key: str, resident: Resident) -> None:
        resident.leases -= 1
        await finish(self._settle(key, resident))

    async def _settle(self, key: str, resident: Resident) -> None:
        """Forget it if it could not be loaded, unload it if it is retired and idle, and let those
        look who wait for a slot."""
        async with self._slot_freed:
            if self._resident.get(key) is resident:
                if resident.failed:
                    del self._resident[key]
                elif resident.retired and resident.idle and key != self.merged:
                    await self._unload(key)
                    await in_background(return_memory)  # not after evictions: another one comes
            self._slot_freed.notify_all()

    async def _evict_one(self) -> bool:
        """Unload the version that was not used for longest; False if all are held or merged."""
        idle = [k for k, r in self._resident.items() if r.idle and k != self.merged]
        if not idle:
            return False
        await finish(self._unload(min(idle, key=lambda k: self._resident[k].last_used)))
        return True

    async def _unload(self, key: str) -> None:
        with suppress(EngineDead):  # then nothing is in it any more
            await self._host.unload_adapter(key)
        del self._resident[key]
        self._slot_freed.notify_all()

    async def _load(self, key: str, info: AdapterInfo) -> None:
        resident = self._resident[key]
        try:
            weights = await self._timed(
                info.name, "read", in_background(self._loader.read, key, info)
            )
            await self._timed(info.name, "tail", in_background(self._loader.warm_tails, weights))
            await self._timed(info.name, "slot", self._host.load_adapter(weights))
        except BaseException:
            resident.failed = True
            raise
        finally:
            resident.ready = True
            await self._settle(key, resident)

    async def _switch(self, lease: Lease | None) -> None:
        """Merge what the lease holds, or unmerge."""
        start = time.perf_counter()
        if lease is None:
            await self._host.unmerge_adapter()
        else:
            await self._host.merge_adapter(lease.key)
        self.merged = lease.key if lease else None
        self._observer.merged(lease.name if lease else "", seconds=time.perf_counter() - start)

    async def _timed(self, name: str, stage: str, work: Awaitable[T]) -> T:
        start = time.perf_counter()
        result = await work
        self._observer.adapter_loaded(name, stage=stage, seconds=time.perf_counter() - start)
        return result


def key_of(info: AdapterInfo) -> str:
    """What names the version in the engine."""
    return f"{info.name}@{info.version}"


def name_of(key: str) -> str:
    return key.partition("@")[0]
