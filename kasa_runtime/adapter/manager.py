"""Adapters at run time: which versions exist, and what changes them.

A request leases the version that a name stands for when it is admitted (`residency.py`); uploads,
rollbacks, deletions and changes of the directory (`watcher.py`) move names. Everything that reads
or writes files runs on other threads; the state here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.names import check_name, is_name, listed
from kasa_runtime.adapter.residency import AdapterHost, Lease, Residency, key_of, name_of
from kasa_runtime.adapter.store import AdapterStore, check_expected
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.adapter.upload import Upload, check_manifest
from kasa_runtime.adapter.watcher import DirectoryWatcher
from kasa_runtime.background import entered_in_background, in_background
from kasa_runtime.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotFound,
    AdapterQuarantined,
    KasaError,
)
from kasa_runtime.types import AdapterInfo, AdapterState, Observer, UploadManifest

logger = logging.getLogger(__name__)


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
        force_polling: bool = False,
    ) -> None:
        self.store = store
        self._observer = observer
        self._loader = AdapterLoader(store, tails)
        self._residency = Residency(
            host,
            self._loader,
            max_slots=max_slots,
            observer=observer,
            is_current=self._is_current,
        )
        self._watcher = DirectoryWatcher(
            store,
            self._take_in,
            self._forget,
            self._follow,
            poll_interval_s=poll_interval_s,
            force_polling=force_polling,
        )
        self._current: dict[str, AdapterInfo] = {}
        self._quarantined: dict[str, AdapterInfo] = {}
        self._publishing = asyncio.Lock()

    # --- the directory ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Take in what is there, then go on watching."""
        await self._adopt_recorded()
        await self._watcher.first_look()
        self._watcher.start()

    async def close(self) -> None:
        await self._watcher.close()

    async def rescan(self, *, settled: bool = False) -> None:
        """Look at the directory once. A change counts when two scans in a row see it, or at once if
        `settled`."""
        await self._watcher.rescan(settled=settled)

    def list(self) -> list[AdapterInfo]:
        """All adapters, by name; a name whose directory was refused has an entry more,
        quarantined."""
        entries = [*self._current.values(), *self._quarantined.values()]
        return sorted((self._residency.live(i) for i in entries), key=lambda i: (i.name, i.state))

    async def get(self, spec: str) -> AdapterInfo:
        """By "name" or "name@version". Raises AdapterNotFound."""
        name, _, version = spec.partition("@")
        if not version and name not in self._current and name in self._quarantined:
            return self._quarantined[name]
        return self._residency.live(await self._resolve(name, version))

    # --- use --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, spec: str) -> AsyncIterator[Lease]:
        """Hold the version that `spec` names now, in the engine. Waits for a slot if all are held.

        Raises AdapterNotFound, AdapterQuarantined, AdapterInvalid, CapacityExceeded."""
        name, _, version = spec.partition("@")
        async with self._residency.lease(await self._resolve(name, version)) as lease:
            yield lease

    async def load(self, spec: str) -> AdapterInfo:
        """Bring a version into the engine ahead of its first request."""
        async with self.lease(spec):
            pass
        return await self.get(spec)

    async def unload(self, spec: str) -> AdapterInfo:
        """Take a version out of the engine; with its last lease if it is held. Raises AdapterInUse
        if merged."""
        info = await self.get(spec)
        key = key_of(info)
        if key == self.merged:
            raise AdapterInUse(f"{key} is merged; unmerge it first", name=info.name)
        await self._residency.retire(key)
        return await self.get(spec)

    async def merge(self, spec: str) -> AdapterInfo:
        """Write a version into the weights. Requests go on; the one merged before is unmerged by
        the same switch."""
        lease = await self._residency.merge(self.lease(spec))
        return await self.get(f"{lease.name}@{lease.version}")

    async def unmerge(self) -> None:
        """Put the pristine weights back; no-op when nothing is merged."""
        await self._residency.unmerge()

    @property
    def merged(self) -> str | None:
        """The merged version as "name@version"."""
        return self._residency.merged

    def resident_names(self) -> dict[str, str]:
        """Name -> tier, of what is in the engine."""
        return self._residency.names()

    # --- change -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def upload(self, manifest: UploadManifest) -> AsyncIterator[Upload]:
        """Stage an adapter; `commit` publishes it, leaving without discards it.

        Raises InvalidRequest, VersionConflict, StoreReadOnly; whatever the caller's block raises
        counts as rejected."""
        try:
            check_manifest(manifest)
            async with entered_in_background(self.store.staging()) as staged:
                await in_background(self._check_expected, manifest)
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
                versions = await in_background(self.store.versions, name)
                older = versions[: versions.index(current)] if current in versions else ()
                if not older:
                    raise AdapterNotFound(f"{name} has no version before {current}", name=name)
                version = older[-1]
            stored = await in_background(self.store.version, name, version)
            info = await in_background(self._loader.inspect, stored)
            await in_background(self.store.set_current, name, stored.version)
            await self._make_current(info)
        return self._residency.live(info)

    async def delete(self, name: str) -> None:
        """Remove a name and all its versions; requests in flight finish. Raises AdapterInUse if one
        is merged."""
        check_name(name)
        if self.merged is not None and name_of(self.merged) == name:
            raise AdapterInUse(f"{self.merged} is merged; unmerge it before deleting it", name=name)
        async with self._publishing:
            await in_background(self.store.delete, name)
            await self._drop(name)

    # --- inside -----------------------------------------------------------------------------------

    async def _adopt_recorded(self) -> None:
        names = await self._watcher.recorded_names()
        for recorded in await in_background(lambda: [*map(self._loader.recorded, names)]):
            if recorded.source is not None:
                self._watcher.expect(recorded.name, recorded.source)
            if isinstance(recorded.found, AdapterInfo):
                self._current[recorded.name] = recorded.found
            else:
                self._quarantine(recorded.name, str(recorded.found))

    async def _take_in(self, name: str, signature: str) -> bool:
        """Make what lies in the directory of a name current, or quarantine it. False if it has to
        be tried again."""
        began_s = time.time()
        async with self._publishing:
            try:
                stored = await in_background(self.store.take_in, name, self._loader.verify)
                if stored is not None:
                    logger.info("took in %s@%s", name, stored.version)
                    await self._make_current(await in_background(self._loader.inspect, stored))
            except (OSError, AdapterError) as error:
                self._quarantine(name, str(error))
                return not isinstance(error, OSError)
            if name in self._current and name in self._quarantined:
                del self._quarantined[name]
                self._observer.adapters_changed(self.list())
            await in_background(self._loader.remember_source, name, signature, began_s)
            return True

    async def _forget(self, name: str) -> None:
        async with self._publishing:
            self._quarantined.pop(name, None)
            if await in_background(self.store.forget_if_taken_from, name):
                logger.info("%s: its directory is gone, no longer served", name)
                await self._drop(name)

    async def _follow(self, name: str) -> None:
        """Serve what the name stands for on the disk, which another process may have changed."""
        async with self._publishing:
            try:
                stored = await in_background(self.store.current, name)
                known = self._current.get(name)
                if known is None or known.version != stored.version:
                    await self._make_current(await in_background(self._loader.inspect, stored))
                    logger.info("%s is now %s", name, stored.version)
            except AdapterNotFound:
                if name in self._current:
                    logger.info("%s was deleted, no longer served", name)
                    await self._drop(name)
            except AdapterError as error:
                self._quarantine(name, str(error))

    async def _publish(self, manifest: UploadManifest, staged: Path) -> AdapterInfo:
        """The second half of an upload: the staged files are complete and have the announced
        digests."""
        await in_background(self._loader.verify, staged)
        async with self._publishing:
            expected = manifest.expected_version
            stored = await in_background(
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

    async def _make_current(self, info: AdapterInfo) -> None:
        before = self._current.get(info.name)
        self._current[info.name] = info
        self._quarantined.pop(info.name, None)
        if before is not None and before.version != info.version:
            await self._residency.retire_if_replaced(key_of(before))
        self._observer.adapters_changed(self.list())

    async def _drop(self, name: str) -> None:
        self._current.pop(name, None)
        self._quarantined.pop(name, None)
        self._watcher.drop(name)
        await self._residency.retire_replaced_of(name)
        await in_background(self._loader.forget, name)
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
                f"no adapter {name!r}; there are {listed(self._current)}", name=name
            )
        stored = await in_background(self.store.version, name, version)
        return await in_background(self._loader.inspect, stored)

    def _is_current(self, key: str) -> bool:
        current = self._current.get(name_of(key))
        return current is not None and key_of(current) == key
