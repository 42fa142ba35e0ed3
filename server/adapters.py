"""What a caller may do with adapters: names are checked, permission is asked for, then the runtime
does it. The gRPC service and the JSON API are two ways of calling this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kasa_runtime.errors import KasaError, PermissionDenied
from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action, Caller
from kasa_runtime.types import AdapterInfo, AdapterVersion, Observer
from server import convert
from server.access import Gate


class Adapters:
    """The adapters of one runtime. Methods raise InvalidRequest, AdapterNotFound (also for what the
    caller may not see), PermissionDenied, and what the runtime raises."""

    def __init__(self, runtime: Runtime, observer: Observer, gate: Gate) -> None:
        self._runtime = runtime
        self._observer = observer
        self._gate = gate

    def visible(self, caller: Caller) -> list[AdapterInfo]:
        """Those that the caller may see."""
        return [info for info in self._runtime.list_adapters() if caller.sees(info.name)]

    async def get(self, caller: Caller, name: str) -> AdapterInfo:
        caller.require_sight(convert.adapter_ref("name", name))
        return await self._runtime.get_adapter(name)

    async def versions(self, caller: Caller, name: str) -> list[AdapterVersion]:
        caller.require_sight(convert.adapter_name("name", name))
        return await self._runtime.list_adapter_versions(name)

    async def delete(self, caller: Caller, name: str) -> None:
        caller.require_sight(convert.adapter_name("name", name))
        caller.require(Action.UPLOAD, name)
        await self._runtime.delete_adapter(name)

    async def rollback(self, caller: Caller, name: str, version: str) -> AdapterInfo:
        """`version` "": to the one before the current."""
        convert.adapter_name("name", name)
        convert.adapter_version("version", version)
        caller.require_sight(name)
        caller.require(Action.UPLOAD, name)
        return await self._runtime.rollback_adapter(name, version)

    async def load(self, caller: Caller, name: str, *, pin: bool) -> AdapterInfo:
        caller.require(Action.ADMINISTER, convert.adapter_ref("name", name))
        return await self._runtime.load_adapter(name, pin=pin)

    async def unload(self, caller: Caller, name: str) -> AdapterInfo:
        caller.require(Action.ADMINISTER, convert.adapter_ref("name", name))
        return await self._runtime.unload_adapter(name)

    async def merge(self, caller: Caller, name: str) -> AdapterInfo:
        caller.require(Action.ADMINISTER, convert.adapter_ref("name", name))
        self._require_merged(caller)
        return await self._runtime.merge_adapter(name)

    async def unmerge(self, caller: Caller) -> None:
        self._require_merged(caller)
        await self._runtime.unmerge_adapter()

    def admit_upload(self, caller: Caller, client: str, name: str, num_bytes: int) -> None:
        """Counts an upload that begins against the client's limits. Raises PermissionDenied,
        InvalidRequest if it is too large, Overloaded."""
        caller.require(Action.UPLOAD, name)
        self._gate.upload(client, num_bytes)

    @contextmanager
    def rejections(self) -> Iterator[None]:
        """Counts what is rejected before the runtime, which counts the rest, hears of it."""
        try:
            yield
        except KasaError as error:
            self._observer.upload_rejected(type(error).__name__)
            raise

    def _require_merged(self, caller: Caller) -> None:
        """Whoever changes what is merged must be allowed to take out what is merged now."""
        merged = self._runtime.stats().merged_adapter
        if merged and not caller.may(Action.ADMINISTER, merged):
            raise PermissionDenied(
                f"token {caller.name!r} may not administer the adapter that is merged now"
            )
        if not merged and not caller.patterns[Action.ADMINISTER]:
            raise PermissionDenied(f"token {caller.name!r} may not administer any adapter")
