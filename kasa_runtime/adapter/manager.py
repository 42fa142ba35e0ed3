"""Adapters at run time: which versions exist, which are in the engine, who holds them.

The only place that changes residency. A request holds a lease on one version from admission to its
last token; replacing, rolling back, deleting and evicting never touch a version with leases.
Everything that reads or writes files runs on other threads; the state here belongs to the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import Adapter, AdapterWeights, fold
from kasa_runtime.adapter.store import (
    AdapterStore,
    StoredVersion,
    check_name,
    content_digest,
    is_name,
)
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.adapter.upload import Upload, check_manifest
from kasa_runtime.background import in_background
from kasa_runtime.errors import (
    AdapterError,
    AdapterInUse,
    AdapterInvalid,
    AdapterNotFound,
    AdapterQuarantined,
    CapacityExceeded,
    EngineDead,
    KasaError,
    VersionConflict,
)
from kasa_runtime.types import AdapterInfo, AdapterState, Observer, UploadManifest

logger = logging.getLogger(__name__)

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


class AdapterManager:
    """Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        tails: TailCache,
        host: AdapterHost,
        *,
        max_slots: int,
        observer: Observer,
        poll_interval_s: float = 1.0,
    ) -> None:
        self.store = store
        self.merged: str | None = None  # key
        self._base: BaseModel = tails.base
        self._tails = tails
        self._host = host
        self._max_slots = max_slots
        self._observer = observer
        self._poll_interval_s = poll_interval_s
        self._current: dict[str, AdapterInfo] = {}
        self._quarantined: dict[str, AdapterInfo] = {}
        self._signatures: dict[str, str] = {}  # of directories already looked at
        self._settling: dict[str, str] = {}  # seen once, maybe still being written
        self._resident: dict[str, Resident] = {}
        self._slot_freed = asyncio.Condition()
        self._publishing = asyncio.Lock()
        self._merging = asyncio.Lock()

    # --- the directory ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Take in what is there, then go on watching."""
        await self._adopt_recorded()
        await self.rescan(settled=True)
        self._watcher = asyncio.create_task(self._watch(), name="adapter-watcher")

    async def close(self) -> None:
        self._watcher.cancel()
        with suppress(asyncio.CancelledError):
            await self._watcher

    async def rescan(self, *, settled: bool = False) -> None:
        """Look at the directory once. A change counts when two scans in a row see it, or at once if
        `settled`."""
        found = await in_background(self.store.scan)
        for name, signature in found.items():
            if self._signatures.get(name) == signature:
                continue
            if settled or self._settling.get(name) == signature:
                await self._take_in(name, signature)
        gone = self._signatures.keys() - found.keys()
        for name in gone:
            if settled or self._settling.get(name) == "gone":
                await self._forget(name)
        self._settling = found | dict.fromkeys(gone, "gone")

    def list(self) -> list[AdapterInfo]:
        """All adapters, by name; a name whose directory was refused has an entry more,
        quarantined."""
        entries = [*self._current.values(), *self._quarantined.values()]
        return sorted((self._live(i) for i in entries), key=lambda i: (i.name, i.state))

    async def get(self, spec: str) -> AdapterInfo:
        """By "name" or "name@version". Raises AdapterNotFound."""
        name, _, version = spec.partition("@")
        if not version and name not in self._current and name in self._quarantined:
            return self._quarantined[name]
        return self._live(await self._resolve(name, version))

    # --- use --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, spec: str) -> AsyncIterator[Lease]:
        """Hold the version that `spec` names now, in the engine. Waits for a slot if all are held.

        Raises AdapterNotFound, AdapterQuarantined, AdapterInvalid, CapacityExceeded."""
        name, _, version = spec.partition("@")
        info = await self._resolve(name, version)
        key = _key(info)
        resident = await self._hold(key, info)
        try:
            await asyncio.shield(resident.loading)
            yield Lease(key, info.name, info.version)
        finally:
            await self._release(key, resident)

    async def load(self, spec: str) -> AdapterInfo:
        """Bring a version into the engine ahead of its first request."""
        async with self.lease(spec):
            pass
        return await self.get(spec)

    async def unload(self, spec: str) -> AdapterInfo:
        """Take a version out of the engine; with its last lease if it is held. Raises AdapterInUse
        if merged."""
        info = await self.get(spec)
        if _key(info) == self.merged:
            raise AdapterInUse(f"{_key(info)} is merged; unmerge it first", name=info.name)
        await self._retire(_key(info))
        return await self.get(spec)

    async def merge(self, spec: str) -> AdapterInfo:
        """Write a version into the weights. Requests go on; the one merged before is unmerged by
        the same switch."""
        async with self._merging, self.lease(spec) as lease:
            before = self.merged
            await _finish(self._switch(lease))
        await self._retire_if_replaced(before)
        return await self.get(f"{lease.name}@{lease.version}")

    async def unmerge(self) -> None:
        async with self._merging:
            if self.merged is None:
                return
            before = self.merged
            await _finish(self._switch(None))
        await self._retire_if_replaced(before)

    def resident_names(self) -> dict[str, str]:
        """Name -> tier, of what is in the engine."""
        return {key.partition("@")[0]: "slot" for key, r in self._resident.items() if r.ready}

    # --- change -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def upload(self, manifest: UploadManifest) -> AsyncIterator[Upload]:
        """Stage an adapter; `commit` publishes it, leaving without discards it.

        Raises InvalidRequest, VersionConflict, StoreReadOnly; whatever the caller's block raises
        counts as rejected."""
        try:
            check_manifest(manifest)
            self._check_expected(manifest)
            with self.store.staging() as staged:
                yield Upload(manifest, staged, lambda: self._publish(manifest, staged))
        except KasaError as error:
            self._observer.upload_rejected(type(error).__name__)
            raise

    async def rollback(self, name: str, version: str = "") -> AdapterInfo:
        """Make an older version current: the given one, or the one before the current."""
        check_name(name)
        async with self._publishing:
            current = (await in_background(self.store.current, name)).version
            if not version:
                versions = self.store.versions(name)
                older = versions[: versions.index(current)] if current in versions else ()
                if not older:
                    raise AdapterNotFound(f"{name} has no version before {current}", name=name)
                version = older[-1]
            stored = await in_background(self.store.version, name, version)
            info = await in_background(self._inspect, stored)
            await in_background(self.store.set_current, name, stored.version)
            await self._make_current(info)
        return self._live(info)

    async def delete(self, name: str) -> None:
        """Remove a name and all its versions; requests in flight finish. Raises AdapterInUse if one
        is merged."""
        check_name(name)
        if self.merged is not None and self.merged.partition("@")[0] == name:
            raise AdapterInUse(f"{self.merged} is merged; unmerge it before deleting it", name=name)
        async with self._publishing:
            await in_background(self.store.delete, name)
            await self._drop(name)

    # --- inside -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                await self.rescan()
            except OSError as error:
                logger.warning("cannot look at %s: %s", self.store.root, error)
            except Exception:  # the edge of a task: it has to outlive what nobody foresaw
                logger.exception("cannot take in what is in %s", self.store.root)

    async def _adopt_recorded(self) -> None:
        """What earlier runs published; checked again, for the base may be another one now."""
        for name in await in_background(self.store.names):
            try:
                if await in_background(self.store.is_taken_from_directory, name):
                    self._signatures[name] = ""  # so that it is missed if it is gone by now
                stored = await in_background(self.store.current, name)
                self._current[name] = await in_background(self._inspect, stored)
            except AdapterError as error:
                self._quarantine(name, str(error))

    async def _take_in(self, name: str, signature: str) -> None:
        async with self._publishing:
            try:
                stored = await in_background(self.store.take_in, name, self._verify)
            except (OSError, AdapterError) as error:
                self._quarantine(name, str(error))
                # Not looked at again until it changes, unless it changed while it was read.
                self._signatures[name] = "" if isinstance(error, OSError) else signature
                return
            self._signatures[name] = signature
            if stored is not None:
                logger.info("took in %s@%s", name, stored.version)
                await self._make_current(await in_background(self._inspect, stored))
            elif name in self._current and name in self._quarantined:
                del self._quarantined[name]
                self._observer.adapters_changed(self.list())

    async def _forget(self, name: str) -> None:
        async with self._publishing:
            self._signatures.pop(name, None)
            self._quarantined.pop(name, None)
            if await in_background(self.store.forget_if_taken_from, name):
                logger.info("%s: its directory is gone, no longer served", name)
                await self._drop(name)

    async def _publish(self, manifest: UploadManifest, staged: Path) -> AdapterInfo:
        """The second half of an upload: the staged files are complete and have the announced
        digests."""
        await in_background(self._verify, staged)
        async with self._publishing:
            self._check_expected(manifest)
            stored = await in_background(self.store.publish, manifest.name, staged)
            info = await in_background(self._inspect, stored)
            await self._make_current(info)
        logger.info("published %s@%s", info.name, info.version)
        return self._live(info)

    def _check_expected(self, manifest: UploadManifest) -> None:
        if manifest.expected_version is None:
            return
        current = self._current.get(manifest.name)
        found = current.version if current else ""
        if found != manifest.expected_version:
            raise VersionConflict(
                f"{manifest.name}: expected version {manifest.expected_version or 'none'!r}, "
                f"current is {found or 'none'!r}; look at it and upload again",
                name=manifest.name,
            )

    async def _make_current(self, info: AdapterInfo) -> None:
        before = self._current.get(info.name)
        self._current[info.name] = info
        self._quarantined.pop(info.name, None)
        if before is not None and before.version != info.version:
            await self._retire_if_replaced(_key(before))
        self._observer.adapters_changed(self.list())

    async def _drop(self, name: str) -> None:
        self._current.pop(name, None)
        self._quarantined.pop(name, None)
        self._signatures.pop(name, None)
        for key in [k for k in self._resident if k.partition("@")[0] == name]:
            await self._retire_if_replaced(key)
        self._observer.adapters_changed(self.list())

    def _quarantine(self, name: str, reason: str) -> None:
        known = self._quarantined.get(name)
        if known is not None and known.reason == reason:
            return
        logger.warning("quarantined %s: %s", name, reason)
        self._quarantined[name] = AdapterInfo(name, "", AdapterState.QUARANTINED, reason=reason)
        self._observer.adapters_changed(self.list())

    async def _resolve(self, name: str, version: str) -> AdapterInfo:
        """The version's description, state READY. Raises AdapterNotFound, AdapterQuarantined."""
        current = self._current.get(name)
        if current is not None and (not version or version == current.version):
            return current
        if current is None and not version and name in self._quarantined:
            raise AdapterQuarantined(
                f"{name} was refused: {self._quarantined[name].reason}", name=name
            )
        if not version or not is_name(name):
            raise AdapterNotFound(
                f"no adapter {name!r}; there are {sorted(self._current) or 'none'}", name=name
            )
        stored = await in_background(self.store.version, name, version)
        return await in_background(self._inspect, stored)

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
        await _finish(self._settle(key, resident))

    async def _settle(self, key: str, resident: Resident) -> None:
        """Forget it if it could not be loaded, unload it if it is retired and idle, and let those
        look who wait for a slot."""
        async with self._slot_freed:
            if self._resident.get(key) is resident:
                if resident.failed:
                    del self._resident[key]
                elif resident.retired and resident.idle and key != self.merged:
                    await self._unload(key)
            self._slot_freed.notify_all()

    async def _retire(self, key: str) -> None:
        """Unload as soon as nobody holds it."""
        resident = self._resident.get(key)
        if resident is not None and key != self.merged:
            resident.retired = True
            await _finish(self._settle(key, resident))

    async def _retire_if_replaced(self, key: str | None) -> None:
        if key is None:
            return
        name = key.partition("@")[0]
        current = self._current.get(name)
        if current is None or _key(current) != key:
            await self._retire(key)

    async def _evict_one(self) -> bool:
        """Unload the version that was not used for longest; False if all are held or merged."""
        idle = [k for k, r in self._resident.items() if r.idle and k != self.merged]
        if not idle:
            return False
        await _finish(self._unload(min(idle, key=lambda k: self._resident[k].last_used)))
        return True

    async def _unload(self, key: str) -> None:
        with suppress(EngineDead):  # then nothing is in it any more
            await self._host.unload_adapter(key)
        del self._resident[key]
        self._slot_freed.notify_all()

    async def _load(self, key: str, info: AdapterInfo) -> None:
        resident = self._resident[key]
        try:
            weights = await self._timed(info.name, "read", in_background(self._read, key, info))
            await self._timed(info.name, "tail", in_background(self._warm_tails, weights))
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

    def _read(self, key: str, info: AdapterInfo) -> AdapterWeights:
        stored = self.store.version(info.name, info.version)
        if content_digest(stored.directory) != info.version:
            raise AdapterInvalid(
                f"{key}: its files changed on disk after they were checked", name=info.name
            )
        return fold(self._servable(stored.directory), key)

    def _warm_tails(self, weights: AdapterWeights) -> None:
        for name, delta in weights.modules.items():
            if delta.t:
                self._tails.get(name, delta.t)

    def _verify(self, directory: Path) -> None:
        fold(self._servable(directory), "verify")

    def _servable(self, directory: Path) -> Adapter:
        return checkpoint.read(directory, self._base, to_serve=True)

    def _inspect(self, stored: StoredVersion) -> AdapterInfo:
        try:
            adapter = self._servable(stored.directory)
        except AdapterError as error:
            error.name = stored.name
            raise
        return describe(adapter, stored)

    def _live(self, info: AdapterInfo) -> AdapterInfo:
        """`info` with its present state and number of requests."""
        if info.state is AdapterState.QUARANTINED:
            return info
        key = _key(info)
        resident = self._resident.get(key)
        if key == self.merged:
            state = AdapterState.MERGED
        elif resident is None:
            state = AdapterState.READY
        else:
            state = AdapterState.RESIDENT if resident.ready else AdapterState.LOADING
        return replace(info, state=state, in_flight=resident.leases if resident else 0)


async def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled, who learns of that afterwards: the
    engine and the table of what is in it never disagree."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


def describe(adapter: Adapter, stored: StoredVersion) -> AdapterInfo:
    """What users see of a version. Ranks are the largest over its layers."""
    ranks = [w.a.shape[0] for w in adapter.modules.values()]
    return AdapterInfo(
        name=stored.name,
        version=stored.version,
        state=AdapterState.READY,
        rank=max(ranks),
        alpha=adapter.config.lora_alpha,
        method=adapter.method,
        truncation_rank=max(adapter.truncation.values(), default=0),
        truncation_rule=adapter.meta.truncation_rule.value,
        target_modules=_target_names(adapter),
        base_fingerprint=adapter.meta.base_fingerprint,
        size_bytes=stored.size_bytes,
        create_time=stored.create_time,
    )


def _target_names(adapter: Adapter) -> tuple[str, ...]:
    return tuple(sorted({name.rpartition(".")[2] for name in adapter.modules}))


def _key(info: AdapterInfo) -> str:
    return f"{info.name}@{info.version}"
