"""Which versions are in memory and in the engine, who holds them, which one is merged.

A request holds a lease on one version from admission to its last token; replacing, rolling back,
deleting and evicting never touch a version with leases. A version that is evicted from its slot
goes to the host tier (`host_tier.py`), one that is replaced, deleted or unloaded leaves at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from kasa_runtime.adapter.catalog import Catalog
from kasa_runtime.adapter.host_tier import HostTier, timed
from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.adapter.names import key_of, name_of
from kasa_runtime.adapter.permanent import Permanent
from kasa_runtime.background import finish, in_background, return_memory
from kasa_runtime.errors import EngineDead, KasaError
from kasa_runtime.types import AdapterInfo, AdapterState, AdapterTier, Observer

logger = logging.getLogger(__name__)


class AdapterHost(Protocol):
    """The engine, as far as the manager knows it (see `engine/base.py`)."""

    async def load_adapter(
        self, adapter: AdapterWeights, instead_of: str | None = None
    ) -> None: ...
    async def unload_adapter(self, key: str) -> None: ...
    async def merge_adapter(self, key: str) -> None: ...
    async def unmerge_adapter(self) -> None: ...


@dataclass(frozen=True)
class Lease:
    """The right to use one version. `key` names it in the engine. `load_began_s`: since when, on
    the clock of `time.monotonic`, its load was waited for; None if it was there."""

    key: str
    name: str
    version: str
    load_began_s: float | None = None


@dataclass
class Resident:
    """A version that is in the engine, or on its way there."""

    loading: asyncio.Task[None]
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    retired: bool = False  # replaced or deleted: leaves with its last lease
    ready: bool = False  # loaded, or failed to
    failed: bool = False
    weights: AdapterWeights | None = None  # the object that the engine uses

    @property
    def idle(self) -> bool:
        return self.ready and not self.leases


class Residency:
    """The engine's slots, and the host tier beside them. Event loop only.

    `max_host_bytes`: of the host tier."""

    def __init__(
        self,
        host: AdapterHost,
        loader: AdapterLoader,
        catalog: Catalog,
        permanent: Permanent,
        *,
        max_slots: int,
        max_host_bytes: int,
        observer: Observer,
    ) -> None:
        self.host_tier = HostTier(max_host_bytes, loader, observer)
        self._host = host
        self._loader = loader
        self._catalog = catalog
        self._permanent = permanent
        self._max_slots = max_slots
        self._observer = observer
        self._resident: dict[str, Resident] = {}
        self._slot_freed = asyncio.Condition()
        self._waiting: deque[object] = deque()  # who waits for a slot, in order
        self._leaving: dict[str, tuple[Resident, asyncio.Task[None]]] = {}  # and what evicts them
        self._merging = asyncio.Lock()
        self._keeping: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in tuple(self._keeping):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def lease(self, info: AdapterInfo) -> AsyncIterator[Lease]:
        """Hold a version, in the engine. Waits for a slot if all are held.

        Raises AdapterNotFound, AdapterInvalid, CapacityExceeded."""
        key = key_of(info)
        async with AsyncExitStack() as until_loaded:
            await until_loaded.enter_async_context(self._loader.hold(info))
            resident = await self._hold(key, info)
            load_began_s = None if resident.ready else time.monotonic()
            try:
                await asyncio.shield(resident.loading)
                await until_loaded.aclose()
                yield Lease(key, info.name, info.version, load_began_s)
            finally:
                await self._release(key, resident)

    async def prefetch(self, info: AdapterInfo) -> None:
        """Bring a version into a free or idle slot, else into the host tier: no slot is waited for,
        and none is taken from requests that wait for one. Raises as `lease`."""
        key = key_of(info)
        async with self._slot_freed:
            if key not in self._resident and not self._waiting:
                self._try_load(info)
        resident = self._resident.get(key)
        if resident is None:
            await self.fetch(info)
            return
        resident.retired = resident.retired and not self._catalog.is_current(key)
        resident.last_used = time.monotonic()
        await asyncio.shield(resident.loading)

    async def fetch(self, info: AdapterInfo) -> None:
        """Bring a version into the host tier, if it is in no slot. Raises as `lease`."""
        key = key_of(info)
        if self._belongs_beside(key):
            await self.host_tier.fetch(info, lambda: self._belongs_beside(key))

    # --- pins -------------------------------------------------------------------------------------

    async def pin(self, info: AdapterInfo) -> None:
        """Bring what the name stands for into a slot and never evict it, nor what comes after it
        under this name. Raises as `lease`, and CapacityExceeded if no slot would be left."""
        is_new = self._permanent.pin(info.name)
        try:
            await self._keep(info)
        except BaseException:
            if is_new:
                await finish(self.unpin(info.name))
            raise

    async def unpin(self, name: str) -> None:
        self._permanent.unpin(name)
        await self._look_for_slots()

    def follow_pin(self, info: AdapterInfo) -> None:
        """`info` is what its name stands for from now on. If that is pinned, load it, beside all
        that goes on."""
        if info.name in self._permanent.pinned:
            self._permanent.changed()
            task = asyncio.create_task(self._keep_or_warn(info), name=f"pin {key_of(info)}")
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    # --- merging ----------------------------------------------------------------------------------

    async def merge(self, name: str, wanted: AbstractAsyncContextManager[Lease]) -> Lease:
        """Write the version of `name` that `wanted` leases into the weights; the one merged before
        is unmerged by the same switch. Raises CapacityExceeded if, beside those that are pinned, no
        slot would be left."""
        async with self._merging:
            with self._permanent.about_to_merge(name):
                async with wanted as lease:
                    before = self._permanent.merged
                    await finish(self._switch(lease))
        await self._no_longer_merged(before)
        return lease

    async def unmerge(self) -> None:
        async with self._merging:
            before = self._permanent.merged
            if before is None:
                return
            await finish(self._switch(None))
        await self._no_longer_merged(before)

    async def _no_longer_merged(self, key: str | None) -> None:
        """It leaves if it was replaced; its successor has room now, which it needs if pinned."""
        if key is not None:
            await self.retire_if_replaced(key)
            if (info := self._catalog.current(name_of(key))) is not None:
                self.follow_pin(info)

    # --- leaving ----------------------------------------------------------------------------------

    async def retire(self, key: str) -> None:
        """Forget the weights, and unload them as soon as nobody holds them."""
        self.host_tier.forget(key)
        resident = self._resident.get(key)
        if resident is not None and key != self._permanent.merged:
            resident.retired = True
            await finish(self._settle(key, resident))

    async def retire_if_replaced(self, key: str) -> None:
        if not self._catalog.is_current(key):
            await self.retire(key)

    async def retire_replaced_of(self, name: str) -> None:
        """`retire_if_replaced` for all versions of a name."""
        keys = {*self._resident, *self.host_tier}
        for key in [k for k in keys if name_of(k) == name]:
            await self.retire_if_replaced(key)

    # --- looking ----------------------------------------------------------------------------------

    def names(self) -> dict[str, AdapterTier]:
        """Name -> tier, of what is in memory."""
        found = dict.fromkeys(self.host_tier.names(), AdapterTier.HOST)
        slots = {name_of(key): AdapterTier.SLOT for key, r in self._resident.items() if r.ready}
        return found | slots

    def live(self, info: AdapterInfo) -> AdapterInfo:
        """`info` with its present state, tier, pin and number of requests."""
        if info.state is AdapterState.QUARANTINED:
            return info
        key = key_of(info)
        resident = self._resident.get(key)
        pinned = self._permanent.is_pinned(key)
        if resident is None:
            tier = AdapterTier.HOST if key in self.host_tier else AdapterTier.DISK
            is_so = tier is info.tier and pinned is info.pinned
            return info if is_so else replace(info, tier=tier, pinned=pinned)
        state = AdapterState.RESIDENT if resident.ready else AdapterState.LOADING
        return replace(
            info,
            state=AdapterState.MERGED if key == self._permanent.merged else state,
            tier=AdapterTier.SLOT if resident.ready else AdapterTier.DISK,
            pinned=pinned,
            in_flight=resident.leases,
        )

    # --- inside: slots ----------------------------------------------------------------------------

    async def _hold(self, key: str, info: AdapterInfo) -> Resident:
        """Count a lease on a resident version, starting to load it if nobody has. Waits while no
        slot can be freed, in the order in which they came. Raises CapacityExceeded if none can ever
        be."""
        place = object()
        async with self._slot_freed:
            try:
                while key not in self._resident:
                    is_first = not self._waiting or self._waiting[0] is place
                    if is_first and self._try_load(info):
                        break
                    self._permanent.require_others(self._resident)
                    if place not in self._waiting:
                        self._waiting.append(place)
                    await self._slot_freed.wait()
            finally:
                if place in self._waiting:
                    self._waiting.remove(place)
                    self._slot_freed.notify_all()
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
                elif resident.retired and resident.idle and key != self._permanent.merged:
                    await self._unload(key)
                    await in_background(return_memory)  # not after evictions: another one comes
            self._slot_freed.notify_all()

    async def _look_for_slots(self) -> None:
        """Let those look who wait for a slot: one may be evicted now that could not be before."""
        async with self._slot_freed:
            self._slot_freed.notify_all()

    def _try_load(self, info: AdapterInfo) -> bool:
        """Begin to load a version into a free slot, or into that of the one that was not used for
        longest; False if all are held, merged or pinned."""
        key = key_of(info)
        idle = [k for k, r in self._resident.items() if r.idle and k not in self._permanent]
        is_full = len(self._resident) >= self._max_slots
        if is_full and not idle:
            return False
        oldest = min(idle, key=lambda k: self._resident[k].last_used) if is_full else None
        loading = asyncio.create_task(self._load(info, oldest), name=f"load {key}")
        if oldest is not None:
            self._leaving[oldest] = self._resident.pop(oldest), loading
        is_deleted = info.name not in self._catalog  # since the request was admitted
        self._resident[key] = Resident(loading, retired=is_deleted)
        return True

    async def _unload(self, key: str) -> None:
        with suppress(EngineDead):  # then nothing is in it any more
            await self._host.unload_adapter(key)
        self._resident.pop(key)
        self._slot_freed.notify_all()

    def _belongs_beside(self, key: str) -> bool:
        """Whether the host tier is the place for a version."""
        in_engine = key in self._resident or key in self._leaving
        return not in_engine and self._catalog.is_current(key)

    # --- inside: loading --------------------------------------------------------------------------

    async def _load(self, info: AdapterInfo, evicted: str | None) -> None:
        """The one that is evicted leaves when this one enters, by the same change."""
        key = key_of(info)
        resident = self._resident[key]
        try:
            if key in self._leaving:
                await asyncio.wait([self._leaving[key][1]])
            weights = self.host_tier.pop(key) or await self.host_tier.read(info)
            resident.weights = weights
            tails = in_background(self._loader.warm_tails, weights)
            await timed(self._observer, info.name, "tail", tails)
            loading = self._host.load_adapter(weights, instead_of=evicted)
            await timed(self._observer, info.name, "slot", loading)
        except BaseException:
            resident.failed, resident.weights = True, None
            if evicted is not None:
                with suppress(EngineDead):
                    await finish(self._host.unload_adapter(evicted))
            raise
        finally:
            if evicted is not None:
                self._left(evicted)
            resident.ready = True
            await self._settle(key, resident)

    def _left(self, key: str) -> None:
        """An evicted one goes to the host tier."""
        resident, _ = self._leaving.pop(key)
        if resident.weights is not None and self._catalog.is_current(key):
            self.host_tier.put(resident.weights)

    async def _keep(self, info: AdapterInfo) -> None:
        """Load a version of a pinned name, after which it stays."""
        key = key_of(info)
        async with self.lease(info):
            self._resident[key].retired = False
        await self.retire_if_replaced(key)  # by then

    async def _keep_or_warn(self, info: AdapterInfo) -> None:
        try:
            await self._keep(info)
        except (KasaError, OSError) as error:
            logger.warning("%s is pinned and cannot be loaded: %s", info.name, error)

    async def _switch(self, lease: Lease | None) -> None:
        """Merge what the lease holds, or unmerge."""
        start = time.perf_counter()
        if lease is None:
            await self._host.unmerge_adapter()
        else:
            await self._host.merge_adapter(lease.key)
        self._permanent.merged = lease.key if lease else None
        self._observer.merged(lease.name if lease else "", seconds=time.perf_counter() - start)
        self._permanent.changed()
        await self._look_for_slots()
