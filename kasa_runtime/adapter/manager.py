"""Adapters at run time: which versions exist, and what changes them.

A request leases the version that a name stands for when it is admitted (`residency.py`); uploads,
rollbacks, deletions and changes of the directory (`watcher.py`) move names. Everything that reads
or writes files runs on other threads; the state here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from kasa_runtime.adapter.catalog import Catalog
from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.names import check_name, key_of, name_of
from kasa_runtime.adapter.permanent import Permanent
from kasa_runtime.adapter.residency import AdapterHost, Lease, Residency
from kasa_runtime.adapter.store import AdapterStore, check_expected
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.adapter.upload import Upload, check_manifest
from kasa_runtime.adapter.versions import StoredVersion
from kasa_runtime.adapter.watcher import DirectoryWatcher
from kasa_runtime.background import done_in_background, entered_in_background, in_background
from kasa_runtime.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotFound,
    AdapterQuarantined,
    InvalidRequest,
    KasaError,
)
from kasa_runtime.types import (
    AdapterInfo,
    AdapterState,
    AdapterTier,
    AdapterVersion,
    Observer,
    UploadManifest,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AdapterManager:
    """Event loop only. `pinned`: names to keep in slots; `max_host_bytes`: of the host tier."""

    def __init__(
        self,
        store: AdapterStore,
        tails: TailCache,
        host: AdapterHost,
        *,
        max_slots: int,
        observer: Observer,
        max_host_bytes: int = 0,
        pinned: Iterable[str] = (),
        poll_interval_s: float = 1.0,
        force_polling: bool = False,
    ) -> None:
        self.store = store
        self._observer = observer
        self._loader = AdapterLoader(store, tails)
        self._catalog = Catalog(
            self._loader,
            observer,
            live=lambda info: self._residency.live(info),
            num_coming=lambda: self._watcher.num_pending,
        )
        self._permanent = Permanent(max_slots, self._catalog)
        self._residency = Residency(
            host,
            self._loader,
            self._catalog,
            self._permanent,
            max_slots=max_slots,
            max_host_bytes=max_host_bytes,
            observer=observer,
        )
        self._watcher = DirectoryWatcher(
            store,
            self._take_in,
            self._forget,
            self._follow,
            self._catalog.caught_up,
            poll_interval_s=poll_interval_s,
            force_polling=force_polling,
        )
        self._publishing = asyncio.Lock()
        self._standing = frozenset(pinned)
        for name in self._standing:
            self._permanent.pin(name)

    # --- the directory ----------------------------------------------------------------------------

    async def start(self, wait_s: float | None = None) -> None:
        """Serve what earlier starts have checked, and go on watching. The rest is taken in beside;
        that is waited for for `wait_s`, None for as long as it takes."""
        await self._adopt_recorded()
        await self._watcher.first_look()
        self._watcher.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._watcher.all_arrived()
        if self._watcher.num_pending:
            logger.info("%d adapters are yet to be checked", self._watcher.num_pending)

    async def close(self) -> None:
        await self._watcher.close()
        await self._residency.close()
        self._catalog.close()

    async def rescan(self, *, settled: bool = False) -> None:
        """Look at the directory once. A change counts when two scans in a row see it, or at once if
        `settled`."""
        await self._watcher.rescan(settled=settled)

    async def versions(self, name: str) -> list[AdapterVersion]:
        """What is kept of a name, latest first. Raises AdapterNotFound, AdapterQuarantined."""
        check_name(name)
        await self._resolve(name)
        current, kept = await in_background(self.store.kept, name)
        return [self._version(stored, current) for stored in reversed(kept)]

    def list(self) -> list[AdapterInfo]:
        """All adapters, by name; a name whose directory was refused has an entry more,
        quarantined."""
        return self._catalog.list()

    async def get(self, spec: str) -> AdapterInfo:
        """By "name" or "name@version". Raises AdapterNotFound."""
        try:
            return self._residency.live(await self._resolve(spec))
        except AdapterQuarantined:
            refused = self._catalog.refused(name_of(spec))
            assert refused is not None
            return refused

    # --- use --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, spec: str) -> AsyncIterator[Lease]:
        """Hold the version that `spec` names now, in the engine. Waits for a slot if all are held.

        Raises AdapterNotFound, AdapterQuarantined, AdapterInvalid, CapacityExceeded."""

        async with AsyncExitStack() as stack:
            yield await self._with_version(
                spec, lambda info: stack.enter_async_context(self._residency.lease(info))
            )

    async def load(self, spec: str, *, pin: bool = False) -> AdapterInfo:
        """Bring a version into a slot ahead of its first request, if one is free or idle, else into
        the host tier; what it says is where it is. `pin`: wait for a slot, and keep what the name
        stands for there. Raises as `lease`, and InvalidRequest for a pin of a version."""
        if pin:
            if "@" in spec:
                raise InvalidRequest(
                    "pin", f"is of a name and follows it to new versions, got the version {spec!r}"
                )
            await self._with_version(spec, self._residency.pin)
        else:
            await self._with_version(spec, self._residency.prefetch)
        return await self.get(spec)

    async def fetch(self, spec: str) -> None:
        """Bring a version into the host tier, if it is in no slot. Raises as `lease`."""
        await self._with_version(spec, self._residency.fetch)

    async def unload(self, spec: str) -> AdapterInfo:
        """Take a version out of the engine and of memory, with its last lease if it is held; its
        name is not pinned any more. Raises AdapterInUse if merged."""
        info = await self.get(spec)
        key = key_of(info)
        if key == self.merged:
            raise AdapterInUse(f"{key} is merged; unmerge it first", name=info.name)
        if self._permanent.is_pinned(key):
            await self._residency.unpin(info.name)
        await self._residency.retire(key)
        return await self.get(spec)

    async def merge(self, spec: str) -> AdapterInfo:
        """Write a version into the weights. Requests go on; the one merged before is unmerged by
        the same switch."""
        lease = await self._residency.merge(name_of(spec), self.lease(spec))
        return await self.get(f"{lease.name}@{lease.version}")

    async def unmerge(self) -> None:
        """Put the pristine weights back; no-op when nothing is merged."""
        await self._residency.unmerge()

    @property
    def merged(self) -> str | None:
        """The merged version as "name@version"."""
        return self._permanent.merged

    def resident_names(self) -> dict[str, AdapterTier]:
        """Name -> tier, of what is in memory."""
        return self._residency.names()

    @property
    def host_tier_bytes(self) -> int:
        """Of the weights that are in memory and in no slot."""
        return self._residency.host_tier.num_bytes

    def always_in_slots(self) -> set[str]:
        """Names that have a slot whatever requests come: pinned, merged, or about to be."""
        return self._permanent.names()

    def when_slots_change(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever `always_in_slots` may have changed."""
        self._permanent.changed = call

    # --- change -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def upload(self, manifest: UploadManifest) -> AsyncIterator[Upload]:
        """Stage an adapter; `commit` publishes it, leaving without discards it.

        Raises InvalidRequest, VersionConflict, StoreReadOnly; whatever the caller's block raises
        counts as rejected."""
        try:
            check_manifest(manifest)
            await self._arrival(manifest.name)  # what lies in its directory came before
            async with entered_in_background(self.store.staging()) as staged:
                await in_background(self._check_expected, manifest)
                yield Upload(manifest, staged, lambda: self._publish(manifest, staged))
        except KasaError as error:
            self._observer.upload_rejected(type(error).__name__)
            raise

    async def rollback(self, name: str, version: str = "") -> AdapterInfo:
        """Make an older version current: the given one, or the one before the current."""
        check_name(name)
        await self._arrival(name)
        async with self._publishing:
            current = (await in_background(self.store.current, name)).version
            if not version:
                versions = await in_background(self.store.versions, name)
                older = versions[: versions.index(current)] if current in versions else ()
                if not older:
                    raise AdapterNotFound(f"{name} has no version before {current}", name=name)
                version = older[-1]
            stored = await in_background(self.store.version, name, version)
            info = await in_background(self._loader.inspect, stored)
            await done_in_background(self.store.set_current, name, stored.version)
            await self._make_current(info)
        return self._residency.live(info)

    async def delete(self, name: str) -> None:
        """Remove a name and all its versions; requests in flight finish. Raises AdapterInUse if one
        is merged."""
        check_name(name)
        if self.merged is not None and name_of(self.merged) == name:
            raise AdapterInUse(f"{self.merged} is merged; unmerge it before deleting it", name=name)
        async with self._publishing:
            await done_in_background(self.store.delete, name)
            await self._drop(name)

    # --- inside -----------------------------------------------------------------------------------

    async def _adopt_recorded(self) -> None:
        names = await self._watcher.recorded_names()
        for recorded in await in_background(lambda: [*map(self._loader.recorded, names)]):
            if recorded.source is not None:
                self._watcher.expect(recorded.name, recorded.source)
            if isinstance(recorded.found, AdapterInfo):
                self._catalog.adopt(recorded.found)
                self._residency.follow_pin(recorded.found)
            elif recorded.found is None:
                self._watcher.check(recorded.name)
            else:
                self._catalog.quarantine(recorded.name, str(recorded.found))

    async def _take_in(self, name: str, signature: str) -> bool:
        """Make what lies in the directory of a name current, or quarantine it. False if it has to
        be tried again."""
        began_s = time.time()
        async with self._publishing:
            try:
                stored = await done_in_background(self.store.take_in, name, self._loader.verify)
                if stored is not None:
                    logger.info("took in %s@%s", name, stored.version)
                    await self._make_current(await in_background(self._loader.inspect, stored))
            except (OSError, AdapterError) as error:
                if await in_background((self.store.root / name).is_dir):
                    self._catalog.quarantine(name, str(error))
                return not isinstance(error, OSError)
            if name in self._catalog:
                self._catalog.release(name)
            await done_in_background(self._loader.remember_source, name, signature, began_s)
            return True

    async def _forget(self, name: str) -> None:
        async with self._publishing:
            self._catalog.release(name)
            if await done_in_background(self.store.forget_if_taken_from, name):
                logger.info("%s: its directory is gone, no longer served", name)
                await self._drop(name)

    async def _follow(self, name: str) -> None:
        """Serve what the name stands for on the disk, which another process may have changed."""
        async with self._publishing:
            self._catalog.versions_changed(name)
            try:
                stored = await in_background(self.store.current, name)
                known = self._catalog.current(name)
                if known is None or known.version != stored.version:
                    await self._make_current(await in_background(self._loader.inspect, stored))
                    logger.info("%s is now %s", name, stored.version)
            except AdapterNotFound:
                if name in self._catalog:
                    logger.info("%s was deleted, no longer served", name)
                    await self._drop(name)
            except AdapterError as error:
                self._catalog.quarantine(name, str(error))

    async def _publish(self, manifest: UploadManifest, staged: Path) -> AdapterInfo:
        """The second half of an upload: the staged files are complete and have the announced
        digests."""
        await in_background(self._loader.verify, staged)
        async with self._publishing:
            expected = manifest.expected_version
            stored = await done_in_background(
                self.store.publish, manifest.name, staged, expected=expected
            )
            info = await in_background(self._loader.inspect, stored)
            await self._make_current(info)
        logger.info("published %s@%s", info.name, info.version)
        return self._residency.live(info)

    def _check_expected(self, manifest: UploadManifest) -> None:
        """Before the bytes come, and not only when they are published."""
        if manifest.expected_version is not None:
            found = self.store.current_version(manifest.name)
            check_expected(manifest.name, found, manifest.expected_version)

    def _version(self, stored: StoredVersion, current: str) -> AdapterVersion:
        live = self._residency.live(AdapterInfo(stored.name, stored.version, AdapterState.READY))
        return AdapterVersion(
            stored.version,
            stored.version == current,
            stored.size_bytes,
            stored.create_time,
            live.state,
            live.tier,
            live.in_flight,
        )

    async def _make_current(self, info: AdapterInfo) -> None:
        before = self._catalog.adopt(info)
        self._watcher.expect_record(info.name)
        self._residency.follow_pin(info)
        if before is not None and before.version != info.version:
            await self._residency.retire_if_replaced(key_of(before))
        self._catalog.announce()

    async def _drop(self, name: str) -> None:
        self._catalog.drop(name)
        self._watcher.drop(name)
        if name not in self._standing:
            await self._residency.unpin(name)
        await self._residency.retire_replaced_of(name)
        await done_in_background(self._loader.forget, name)
        self._catalog.announce()

    async def _arrival(self, name: str) -> None:
        """Of a name that is not served: look first whether it lies in the directory."""
        if name not in self._catalog:
            await self._watcher.arrival(name)

    async def _with_version(self, spec: str, use: Callable[[AdapterInfo], Awaitable[T]]) -> T:
        """`use` what `spec` names now; if another server has removed that from the disk, what the
        name stands for there."""
        info = await self._resolve(spec)
        try:
            return await use(info)
        except AdapterNotFound:
            await self._follow(info.name)
            now = await self._resolve(spec)
            if now.version == info.version:
                raise
            return await use(now)

    async def _resolve(self, spec: str) -> AdapterInfo:
        """As the catalog does, once it has what was noticed of the name."""
        await self._arrival(name_of(spec))
        return await self._catalog.resolve(spec)
