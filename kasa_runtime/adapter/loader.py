"""From the files of a version to what users see of it and to what the engine loads.

Blocking, so it runs on background threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.content import changed_s, content_digest, signature
from kasa_runtime.adapter.index import AdapterIndex, Entry
from kasa_runtime.adapter.lora import Adapter, AdapterWeights, fold
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.adapter.versions import StoredVersion, present
from kasa_runtime.background import done_in_background
from kasa_runtime.errors import AdapterError, AdapterInvalid
from kasa_runtime.types import AdapterInfo, AdapterState

COARSEST_FILE_TIME_S = 2.0
"""Of the file systems in use, FAT's."""


@dataclass(frozen=True)
class Recorded:
    """A name of an earlier run. `found`: None if it has to be read. `source`: signature that its
    directory had when it was taken in, "" if that is not known; None if what it serves did not come
    from there."""

    name: str
    found: AdapterInfo | AdapterError | None
    source: str | None = None


class AdapterLoader:
    """Reads versions of one store for one base model."""

    def __init__(self, store: AdapterStore, tails: TailCache) -> None:
        self._store = store
        self._tails = tails
        self._index = AdapterIndex(store.state, tails.base.fingerprint)

    @asynccontextmanager
    async def hold(self, info: AdapterInfo) -> AsyncIterator[None]:
        """Keep a version on the disk until it has been read. Event loop."""
        self._store.hold(info.name, info.version)
        try:
            yield
        finally:
            if self._store.let_go(info.name, info.version):
                await done_in_background(self._store.sweep, info.name)

    def read(self, key: str, info: AdapterInfo) -> AdapterWeights:
        """The folded weights of a version. Raises AdapterNotFound, AdapterInvalid."""
        stored = self._store.held(info.name, info.version)
        with present(info.name, info.version, stored.directory):
            if content_digest(stored.directory) != info.version:
                raise AdapterInvalid(
                    f"{key}: its files changed on disk after they were checked", name=info.name
                )
            return fold(self._servable(stored.directory), key)

    def warm_tails(self, weights: AdapterWeights) -> None:
        """Compute, or read back, the tails that the weights need."""
        for name, delta in weights.modules.items():
            if delta.t:
                self._tails.get(name, delta.t)

    def verify(self, directory: Path) -> None:
        """Raises AdapterInvalid or BaseMismatch if an adapter directory cannot be served."""
        fold(self._servable(directory), "verify")

    def inspect(self, stored: StoredVersion) -> AdapterInfo:
        """What users see of a version; from the index if its files are those that were read before.
        Raises AdapterInvalid, BaseMismatch."""
        entry, found = self._remembered(stored)
        if entry and (entry.info.version, entry.signature) == (stored.version, found):
            return entry.info
        info = self._describe(stored)
        self._index.put(Entry(info, found, entry.source if entry else ""))
        return info

    def inspect_version(self, name: str, version: str) -> AdapterInfo:
        """`inspect` for one that need not be current. Raises AdapterNotFound too."""
        stored = self._store.version(name, version)
        if stored.version == self._store.current_version(name):
            return self.inspect(stored)
        return self._describe(stored)  # the index has one version of a name

    def recorded(self, name: str) -> Recorded:
        """What an earlier run published, if neither the base nor a file has changed since."""
        source = None
        try:
            if self._store.is_taken_from_directory(name):
                source = ""
            stored = self._store.current(name)
            entry, found = self._remembered(stored)
        except AdapterError as error:
            return Recorded(name, error, source)
        if entry is None:
            return Recorded(name, None, source)
        is_known = (entry.info.version, entry.signature) == (stored.version, found)
        return Recorded(name, entry.info if is_known else None, entry.source or source)

    def remember_source(self, name: str, source: str, began_s: float) -> None:
        """Spare the next start from reading `adapters/<name>/`: a look that began at `began_s`, in
        seconds since the epoch, found its content taken in, its signature being `source`.

        Not if it had changed just before: a file's times are too coarse to tell one change from
        another that follows at once."""
        with suppress(OSError):
            entry = self._index.get(name)
            settled = changed_s(self._store.root / name) < began_s - COARSEST_FILE_TIME_S
            if entry is not None and settled:
                self._index.put(replace(entry, source=source))

    def forget(self, name: str) -> None:
        """Drop what is remembered of a name."""
        self._index.drop(name)

    def _remembered(self, stored: StoredVersion) -> tuple[Entry | None, str]:
        """What the index has of the name, and the signature of the version's files."""
        with present(stored.name, stored.version, stored.directory):
            return self._index.get(stored.name), signature(stored.directory)

    def _describe(self, stored: StoredVersion) -> AdapterInfo:
        try:
            with present(stored.name, stored.version, stored.directory):
                return describe(self._servable(stored.directory), stored)
        except AdapterError as error:
            error.name = stored.name
            raise

    def _servable(self, directory: Path) -> Adapter:
        return checkpoint.read(directory, self._tails.base, to_serve=True)


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
