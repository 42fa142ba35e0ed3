"""kasa.v1.AdapterService over the runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kasa.v1 import adapters_pb2

from kasa_runtime.errors import KasaError, PermissionDenied
from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action
from kasa_runtime.types import Observer, UploadManifest
from server import convert
from server.access import Gate
from server.rpc import RpcCall, rpc


class AdapterService:
    """Uploads are written as they come, which holds the client back to the speed of the disk."""

    def __init__(self, runtime: Runtime, observer: Observer, gate: Gate) -> None:
        self._runtime = runtime
        self._observer = observer
        self.gate = gate

    @rpc
    async def UploadAdapter(self, messages: AsyncIterator[Any], call: RpcCall) -> Any:
        manifest = await self._manifest(messages, call)
        async with self._runtime.upload(manifest) as upload:
            async for message in messages:
                await upload.write(*convert.upload_chunk(message))
            info = await upload.commit()
        return adapters_pb2.UploadAdapterResponse(adapter=convert.adapter(info))

    async def _manifest(self, messages: AsyncIterator[Any], call: RpcCall) -> UploadManifest:
        """The first message. Rejected here, where the runtime, which counts, never hears of it."""
        first = await anext(messages, adapters_pb2.UploadAdapterRequest())
        try:
            manifest = convert.upload_manifest(first)
            call.caller.require(Action.UPLOAD, manifest.name)
            self.gate.upload(call.client, manifest)
        except KasaError as error:
            self._observer.upload_rejected(type(error).__name__)
            raise
        return manifest

    @rpc
    async def ListAdapters(self, message: Any, call: RpcCall) -> Any:
        size, after = convert.page(message)
        infos = [info for info in self._runtime.list_adapters() if call.caller.sees(info.name)]
        return convert.adapter_page(infos, size, after)

    @rpc
    async def GetAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_ref("name", message.name)
        call.caller.require_sight(name)
        info = await self._runtime.get_adapter(name)
        return adapters_pb2.GetAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def ListAdapterVersions(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_name("name", message.name)
        call.caller.require_sight(name)
        versions = await self._runtime.list_adapter_versions(name)
        return adapters_pb2.ListAdapterVersionsResponse(
            versions=map(convert.adapter_version_of, versions)
        )

    @rpc
    async def DeleteAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_name("name", message.name)
        _require_existing(call, Action.UPLOAD, name)
        await self._runtime.delete_adapter(name)
        return adapters_pb2.DeleteAdapterResponse()

    @rpc
    async def RollbackAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_name("name", message.name)
        version = convert.adapter_version("version", message.version)
        _require_existing(call, Action.UPLOAD, name)
        info = await self._runtime.rollback_adapter(name, version)
        return adapters_pb2.RollbackAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def LoadAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_ref("name", message.name)
        call.caller.require(Action.ADMINISTER, name)
        info = await self._runtime.load_adapter(name, pin=message.pin)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnloadAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_ref("name", message.name)
        call.caller.require(Action.ADMINISTER, name)
        info = await self._runtime.unload_adapter(name)
        return adapters_pb2.UnloadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def MergeAdapter(self, message: Any, call: RpcCall) -> Any:
        name = convert.adapter_ref("name", message.name)
        call.caller.require(Action.ADMINISTER, name)
        self._require_merged(call)
        info = await self._runtime.merge_adapter(name)
        return adapters_pb2.MergeAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnmergeAdapter(self, message: Any, call: RpcCall) -> Any:
        self._require_merged(call)
        await self._runtime.unmerge_adapter()
        return adapters_pb2.UnmergeAdapterResponse()

    def _require_merged(self, call: RpcCall) -> None:
        """Whoever changes what is merged must be allowed to take out what is merged now."""
        merged = self._runtime.stats().merged_adapter
        if merged and not call.caller.may(Action.ADMINISTER, merged):
            raise PermissionDenied(
                f"token {call.caller.name!r} may not administer the adapter that is merged now"
            )
        if not merged and not call.caller.patterns[Action.ADMINISTER]:
            raise PermissionDenied(f"token {call.caller.name!r} may not administer any adapter")


def _require_existing(call: RpcCall, action: Action, name: str) -> None:
    call.caller.require_sight(name)
    call.caller.require(action, name)
