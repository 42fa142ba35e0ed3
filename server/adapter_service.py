"""kasa.v1.AdapterService over the runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kasa.v1 import adapters_pb2

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.runtime import Runtime
from kasa_runtime.types import Observer, UploadManifest
from server import convert
from server.rpc import Call, rpc


class AdapterService:
    """Uploads are written as they come, which holds the client back to the speed of the disk."""

    def __init__(self, runtime: Runtime, observer: Observer) -> None:
        self._runtime = runtime
        self._observer = observer

    @rpc
    async def UploadAdapter(self, messages: AsyncIterator[Any], call: Call) -> Any:
        manifest = await self._manifest(messages)
        async with self._runtime.upload(manifest) as upload:
            async for message in messages:
                await upload.write(*convert.upload_chunk(message))
            info = await upload.commit()
        return adapters_pb2.UploadAdapterResponse(adapter=convert.adapter(info))

    async def _manifest(self, messages: AsyncIterator[Any]) -> UploadManifest:
        """The first message. Rejected here, where the runtime, which counts, never hears of it."""
        first = await anext(messages, adapters_pb2.UploadAdapterRequest())
        try:
            return convert.upload_manifest(first)
        except InvalidRequest as error:
            self._observer.upload_rejected(type(error).__name__)
            raise

    @rpc
    async def ListAdapters(self, message: Any, call: Call) -> Any:
        size, after = convert.page(message)
        return convert.adapter_page(self._runtime.list_adapters(), size, after)

    @rpc
    async def GetAdapter(self, message: Any, call: Call) -> Any:
        info = await self._runtime.get_adapter(convert.adapter_ref("name", message.name))
        return adapters_pb2.GetAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def ListAdapterVersions(self, message: Any, call: Call) -> Any:
        name = convert.adapter_name("name", message.name)
        versions = await self._runtime.list_adapter_versions(name)
        return adapters_pb2.ListAdapterVersionsResponse(
            versions=map(convert.adapter_version_of, versions)
        )

    @rpc
    async def DeleteAdapter(self, message: Any, call: Call) -> Any:
        await self._runtime.delete_adapter(convert.adapter_name("name", message.name))
        return adapters_pb2.DeleteAdapterResponse()

    @rpc
    async def RollbackAdapter(self, message: Any, call: Call) -> Any:
        name = convert.adapter_name("name", message.name)
        version = convert.adapter_version("version", message.version)
        info = await self._runtime.rollback_adapter(name, version)
        return adapters_pb2.RollbackAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def LoadAdapter(self, message: Any, call: Call) -> Any:
        name = convert.adapter_ref("name", message.name)
        info = await self._runtime.load_adapter(name, pin=message.pin)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnloadAdapter(self, message: Any, call: Call) -> Any:
        info = await self._runtime.unload_adapter(convert.adapter_ref("name", message.name))
        return adapters_pb2.UnloadAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def MergeAdapter(self, message: Any, call: Call) -> Any:
        info = await self._runtime.merge_adapter(convert.adapter_ref("name", message.name))
        return adapters_pb2.MergeAdapterResponse(adapter=convert.adapter(info))

    @rpc
    async def UnmergeAdapter(self, message: Any, call: Call) -> Any:
        await self._runtime.unmerge_adapter()
        return adapters_pb2.UnmergeAdapterResponse()
