"""kasa.v1.AdapterService over the runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kasa.v1 import adapters_pb2

from kasa_runtime.runtime import Runtime
from kasa_runtime.types import UploadManifest
from server import convert
from server.access import Gate
from server.adapters import Adapters
from server.rpc import RpcCall, rpc


class AdapterService:
    """Uploads are written as they come, which holds the client back to the speed of the disk."""

    def __init__(self, runtime: Runtime, adapters: Adapters, gate: Gate) -> None:
        self._runtime = runtime
        self._adapters = adapters
        self.gate = gate

    @rpc
    async def UploadAdapter(self, messages: AsyncIterator[Any], call: RpcCall) -> Any:
        with self._adapters.rejections():
            manifest = await self._manifest(messages, call)
        async with self._runtime.upload(manifest) as upload:
            async for message in messages:
                await upload.write(*convert.upload_chunk(message))
            info = await upload.commit()
        return adapters_pb2.UploadAdapterResponse(adapter=convert.adapter(info))

    async def _manifest(self, messages: AsyncIterator[Any], call: RpcCall) -> UploadManifest:
        """The first message."""
        first = await anext(messages, adapters_pb2.UploadAdapterRequest())
        manifest = convert.upload_manifest(first)
        num_bytes = sum(file.size_bytes for file in manifest.files)
        self._adapters.admit_upload(call.caller, call.client, manifest.name, num_bytes)
        return manifest

    @rpc
    async def ListAdapters(self, message: Any, call: RpcCall) -> Any:
        size, after = convert.page(message)
        return convert.adapter_page(self._adapters.visible(call.caller), size, after)

    @rpc
    async def GetAdapter(self, message: Any, call: RpcCall) -> Any:
        info = await self._adapters.get(call.caller, message.name)
        return adapters_pb2.GetAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def ListAdapterVersions(self, message: Any, call: RpcCall) -> Any:
        versions = await self._adapters.versions(call.caller, message.name)
        return adapters_pb2.ListAdapterVersionsResponse(
            versions=map(convert.adapter_version_of, versions)
        )

    @rpc
    async def DeleteAdapter(self, message: Any, call: RpcCall) -> Any:
        await self._adapters.delete(call.caller, message.name)
        return adapters_pb2.DeleteAdapterResponse()

    @rpc
    async def RollbackAdapter(self, message: Any, call: RpcCall) -> Any:
        info = await self._adapters.rollback(call.caller, message.name, message.version)
        return adapters_pb2.RollbackAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def LoadAdapter(self, message: Any, call: RpcCall) -> Any:
        info = await self._adapters.load(call.caller, message.name, pin=message.pin)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnloadAdapter(self, message: Any, call: RpcCall) -> Any:
        info = await self._adapters.unload(call.caller, message.name)
        return adapters_pb2.UnloadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def MergeAdapter(self, message: Any, call: RpcCall) -> Any:
        info = await self._adapters.merge(call.caller, message.name)
        return adapters_pb2.MergeAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnmergeAdapter(self, message: Any, call: RpcCall) -> Any:
        await self._adapters.unmerge(call.caller)
        return adapters_pb2.UnmergeAdapterResponse()
