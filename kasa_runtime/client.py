"""Clients of a server, for threads (`Client`) and for asyncio (`AsyncClient`).

With the other `client_*.py` the one place outside `server/` that knows gRPC; callers see the
library's types. Errors are those of `kasa_runtime.errors`; a deadline that passes is a
TimeoutError. Methods that both clients have are described at `Client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Self, TypeVar, Unpack

import grpc

from kasa_runtime import client_wire as wire
from kasa_runtime.client_channel import MAX_ATTEMPTS, channel_options
from kasa_runtime.client_security import SecurityOptions, open_channel
from kasa_runtime.client_upload import Progress, UploadMessages, UploadOptions
from kasa_runtime.client_wire import GenerateOptions
from kasa_runtime.errors import KasaError
from kasa_runtime.types import AdapterInfo, AdapterVersion, ChatMessage, ModelInfo, TokenChunk

__all__ = [
    "AsyncClient",
    "Client",
    "GenerateOptions",
    "Progress",
    "SecurityOptions",
    "UploadOptions",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"

Result = TypeVar("Result")


class Client:
    """Calls a server, from any thread. Close it, or use `with`.

    `timeout_s`: of each call that is given none. `max_attempts` (1 to 5): where a server is not
    there, is shutting down or goes away, calls are made again, in all so often and for about 3 s;
    but no generation after its first token, and nothing that must not happen twice (upload, delete,
    rollback). Raises ConfigError, also for files of `security` that cannot be used."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, security, channel_options(max_attempts))
        self._stubs = wire.Stubs(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TokenChunk:
        """A whole generation, as one chunk."""
        return self._do(wire.generate(prompt, options))

    def stream(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[TokenChunk]:
        """A generation as it comes. Closing the iterator cancels it."""
        request = wire.generate_request(prompt, options)
        call = self._stubs.generation.GenerateStream(
            request, **wire.call_options(options, self._timeout_s)
        )
        try:
            for message in call:
                yield wire.chunk(message)
        except grpc.RpcError as error:
            raise wire.error(error, self._address) from None
        finally:
            call.cancel()

    def upload(self, directory: Path | str, **options: Unpack[UploadOptions]) -> AdapterInfo:
        """Publish a directory. Raises AdapterInvalid, BaseMismatch, VersionConflict."""
        messages = UploadMessages(Path(directory), options)
        try:
            return self._do(wire.upload(iter(messages)))
        except KasaError:
            if messages.failure is not None:
                raise messages.failure from None
            raise

    def list_adapters(self, *, timeout_s: float | None = None) -> list[AdapterInfo]:
        """All adapters by name, those in quarantine too. `timeout_s` is for each page of 1000."""
        infos, token = self._do(wire.list_adapters("", timeout_s))
        while token:
            page, token = self._do(wire.list_adapters(token, timeout_s))
            infos += page
        return infos

    def get_adapter(self, name: str) -> AdapterInfo:
        """An adapter, also one in quarantine. Raises AdapterNotFound."""
        return self._do(wire.to_adapter("GetAdapter", name=name))

    def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        """What is kept of a name, latest first: what `name@version` and a rollback can reach.
        Raises AdapterNotFound, AdapterQuarantined."""
        return self._do(wire.list_adapter_versions(name))

    def delete_adapter(self, name: str) -> None:
        """Delete all versions. Raises AdapterNotFound, AdapterInUse."""
        return self._do(wire.delete_adapter(name))

    def rollback_adapter(self, name: str, version: str = "") -> AdapterInfo:
        """Make an older version current; "" is the one before. Raises AdapterNotFound."""
        return self._do(wire.to_adapter("RollbackAdapter", name=name, version=version))

    def load_adapter(self, name: str, *, pin: bool = False) -> AdapterInfo:
        """Bring into a slot if one is free or idle, else into memory; `pin` waits for a slot and
        keeps it. Raises CapacityExceeded if a pin would leave no slot for others."""
        return self._do(wire.to_adapter("LoadAdapter", name=name, pin=pin))

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Take out of memory, and of the engine once no request holds it; its pin ends. Raises
        AdapterInUse when merged."""
        return self._do(wire.to_adapter("UnloadAdapter", name=name))

    def merge_adapter(self, name: str) -> AdapterInfo:
        """Put inside the weights, in place of one that was merged before."""
        return self._do(wire.to_adapter("MergeAdapter", name=name))

    def unmerge_adapter(self) -> None:
        """Put the pristine weights back."""
        return self._do(wire.unmerge_adapter())

    def get_model(self) -> ModelInfo:
        """The base model."""
        return self._do(wire.get_model())

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[ChatMessage] | None = None
    ) -> list[int]:
        """Token ids as `generate` would use them."""
        return self._do(wire.tokenize(prompt, messages))

    def _do(self, call: wire.UnaryCall[Result]) -> Result:
        try:
            return call.result(
                call.method(self._stubs)(call.request, **call.timed(self._timeout_s))
            )
        except grpc.RpcError as error:
            raise wire.error(error, self._address) from None


class AsyncClient:
    """Calls a server from the event loop in which it is made. Close it, or use `async with`. Takes
    what `Client` takes."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._security = security
        options = channel_options(max_attempts)
        self._channel = open_channel(address, security, options, asynchronous=True)
        self._stubs = wire.Stubs(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> TokenChunk:
        return await self._do(wire.generate(prompt, options))

    async def stream(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[TokenChunk]:
        request = wire.generate_request(prompt, options)
        call = self._stubs.generation.GenerateStream(
            request, **wire.call_options(options, self._timeout_s)
        )
        try:
            async for message in call:
                yield wire.chunk(message)
        except grpc.RpcError as error:
            raise wire.error(error, self._address) from None
        finally:
            call.cancel()

    async def upload(self, directory: Path | str, **options: Unpack[UploadOptions]) -> AdapterInfo:
        # In a thread, with gRPC's other client: a server that refuses early would here often look
        # like INTERNAL. Drop when grpc/grpc#36066 is fixed. Cancelling closes the channel.
        with Client(self._address, timeout_s=self._timeout_s, **self._security) as client:
            return await asyncio.to_thread(client.upload, directory, **options)

    async def list_adapters(self, *, timeout_s: float | None = None) -> list[AdapterInfo]:
        infos, token = await self._do(wire.list_adapters("", timeout_s))
        while token:
            page, token = await self._do(wire.list_adapters(token, timeout_s))
            infos += page
        return infos

    async def get_adapter(self, name: str) -> AdapterInfo:
        return await self._do(wire.to_adapter("GetAdapter", name=name))

    async def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        return await self._do(wire.list_adapter_versions(name))

    async def delete_adapter(self, name: str) -> None:
        return await self._do(wire.delete_adapter(name))

    async def rollback_adapter(self, name: str, version: str = "") -> AdapterInfo:
        return await self._do(wire.to_adapter("RollbackAdapter", name=name, version=version))

    async def load_adapter(self, name: str, *, pin: bool = False) -> AdapterInfo:
        return await self._do(wire.to_adapter("LoadAdapter", name=name, pin=pin))

    async def unload_adapter(self, name: str) -> AdapterInfo:
        return await self._do(wire.to_adapter("UnloadAdapter", name=name))

    async def merge_adapter(self, name: str) -> AdapterInfo:
        return await self._do(wire.to_adapter("MergeAdapter", name=name))

    async def unmerge_adapter(self) -> None:
        return await self._do(wire.unmerge_adapter())

    async def get_model(self) -> ModelInfo:
        return await self._do(wire.get_model())

    async def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[ChatMessage] | None = None
    ) -> list[int]:
        return await self._do(wire.tokenize(prompt, messages))

    async def _do(self, call: wire.UnaryCall[Result]) -> Result:
        try:
            return call.result(
                await call.method(self._stubs)(call.request, **call.timed(self._timeout_s))
            )
        except grpc.RpcError as error:
            raise wire.error(error, self._address) from None
