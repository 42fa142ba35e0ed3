"""What the names of adapters stand for now, and which were refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.names import is_name, key_of, listed, name_of
from kasa_runtime.background import in_background
from kasa_runtime.errors import AdapterError, AdapterNotFound, AdapterQuarantined
from kasa_runtime.types import AdapterInfo, AdapterState, Observer

logger = logging.getLogger(__name__)

TELL_S = 0.5
"""Between two times that the observer is told of all adapters, while many are taken in."""


class Catalog:
    """Event loop only. `live` adds to a description where the adapter is now; `num_coming` is the
    number of changes that will follow at once."""

    def __init__(
        self,
        loader: AdapterLoader,
        observer: Observer,
        live: Callable[[AdapterInfo], AdapterInfo],
        num_coming: Callable[[], int],
    ) -> None:
        self._loader = loader
        self._observer = observer
        self._live = live
        self._num_coming = num_coming
        self._current: dict[str, AdapterInfo] = {}
        self._quarantined: dict[str, AdapterInfo] = {}
        self._older: dict[str, dict[str, asyncio.Task[AdapterInfo]]] = {}  # by name and version
        self._telling: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()

    def __contains__(self, name: str) -> bool:
        """Whether a name is served."""
        return name in self._current

    def current(self, name: str) -> AdapterInfo | None:
        """What a name stands for, state READY."""
        return self._current.get(name)

    def is_current(self, key: str) -> bool:
        """Whether a version is what its name stands for."""
        info = self._current.get(name_of(key))
        return info is not None and key_of(info) == key

    def refused(self, name: str) -> AdapterInfo | None:
        """The quarantined entry of a name that nothing is served of."""
        return None if name in self._current else self._quarantined.get(name)

    def list(self) -> list[AdapterInfo]:
        """All adapters, by name; a name whose directory was refused has an entry more,
        quarantined."""
        entries = [*self._current.values(), *self._quarantined.values()]
        return sorted(map(self._live, entries), key=lambda info: (info.name, info.state))

    # --- changes ----------------------------------------------------------------------------------

    def adopt(self, info: AdapterInfo) -> AdapterInfo | None:
        """Let a name stand for this from now on; what it stood for before. Tells nobody."""
        before = self._current.get(info.name)
        self._current[info.name] = info
        self._quarantined.pop(info.name, None)
        self._older.pop(info.name, None)
        return before

    def drop(self, name: str) -> None:
        """Forget a name. Tells nobody."""
        self._current.pop(name, None)
        self._quarantined.pop(name, None)
        self._older.pop(name, None)

    def versions_changed(self, name: str) -> None:
        """Which versions there are of it may be other ones."""
        self._older.pop(name, None)

    def quarantine(self, name: str, reason: str) -> None:
        known = self._quarantined.get(name)
        if known is not None and known.reason == reason:
            return
        logger.warning("quarantined %s: %s", name, reason)
        self._quarantined[name] = AdapterInfo(name, "", AdapterState.QUARANTINED, reason=reason)
        self.announce()

    def release(self, name: str) -> None:
        """What was refused is no longer there."""
        if self._quarantined.pop(name, None) is not None:
            self.announce()

    def announce(self) -> None:
        """Tell the observer what adapters there are: at once, or while many come now and then."""
        if not self._num_coming():
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell)

    def caught_up(self) -> None:
        """No more changes follow."""
        if self._telling is not None:
            self._tell()

    def _tell(self) -> None:
        self.close()
        self._telling = None
        self._observer.adapters_changed(self.list())

    # --- looking up -------------------------------------------------------------------------------

    async def resolve(self, spec: str) -> AdapterInfo:
        """What "name" or "name@version" names, state READY. Raises AdapterNotFound,
        AdapterQuarantined, AdapterInvalid."""
        name, _, version = spec.partition("@")
        current = self._current.get(name)
        if current is not None and (not version or version == current.version):
            return current
        if not version and (refused := self.refused(name)) is not None:
            raise AdapterQuarantined(f"{name} was refused: {refused.reason}", name=name)
        if not version or not is_name(name):
            raise AdapterNotFound(
                f"no adapter {name!r}; there are {listed(self._current)}", name=name
            )
        return await self._version(name, version)

    async def _version(self, name: str, version: str) -> AdapterInfo:
        """By its digest or a beginning of it. Read once, and known until something changes that is
        recorded of the name."""
        if name not in self._current:
            return await in_background(self._loader.inspect_version, name, version)
        known = self._older.setdefault(name, {})
        if version not in known:
            reading = in_background(self._loader.inspect_version, name, version)
            known[version] = asyncio.create_task(reading, name=f"inspect {name}@{version}")
        try:
            return await asyncio.shield(known[version])
        except (AdapterError, OSError):
            known.pop(version, None)
            raise
