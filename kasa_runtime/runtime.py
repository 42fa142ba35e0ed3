"""The library's front door: one base model, many adapters, `generate`.

Interface (being filled in):
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kasa_runtime.types import (
    AdapterInfo,
    ChatMessage,
    GenerationRequest,
    ModelInfo,
    Observer,
    RuntimeStats,
    TokenChunk,
    UploadManifest,
)


@dataclass(frozen=True)
class RuntimeConfig:
    model: str = "smollm2-135m"
    adapters_dir: Path = Path("adapters")


class Upload(Protocol):
    """One upload in progress: staged in `.kasa/staging`, invisible until `commit`."""

    async def write(self, path: str, offset: int, data: bytes) -> None:
        """Raises InvalidRequest (unknown path, wrong offset) or DigestMismatch (more bytes than announced)."""

    async def commit(self) -> AdapterInfo:
        """Verify sizes, digests and content against the base, publish by rename.

        Raises DigestMismatch, AdapterInvalid, BaseMismatch, VersionConflict."""


class Runtime:
    @classmethod
    async def create(cls, config: RuntimeConfig, observer: Observer | None = None) -> Runtime:
        """Load the base model, scan the adapters directory, start the engine."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests (Overloaded) and wait for those in flight, at most `timeout_s`; cancel the rest."""

    async def close(self) -> None: ...

    @property
    def ready(self) -> bool:
        """True while requests can be served: engine alive, not draining."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """False once the engine's step thread has died."""
        raise NotImplementedError

    @property
    def model(self) -> ModelInfo:
        raise NotImplementedError

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Closing the iterator (aclose) cancels. Raises InvalidRequest, AdapterNotFound, AdapterQuarantined, Overloaded,
        EngineDead before the first chunk."""
        raise NotImplementedError

    def tokenize(
        self, *, prompt: str | None = None, messages: tuple[ChatMessage, ...] | None = None
    ) -> list[int]:
        raise NotImplementedError

    def list_adapters(self) -> list[AdapterInfo]: ...
    def get_adapter(self, name: str) -> AdapterInfo:
        """`name` or `name@version`; a quarantined one is returned, not raised. Raises AdapterNotFound."""

    def upload(self, manifest: UploadManifest) -> AbstractAsyncContextManager[Upload]:
        """Leaving the context without commit discards what was staged. Raises InvalidRequest, VersionConflict,
        StoreReadOnly."""

    async def delete_adapter(self, name: str) -> None: ...
    async def rollback_adapter(self, name: str, version: str) -> AdapterInfo:
        """Make an older version current again. version "": the one before the current."""

    async def load_adapter(self, name: str) -> AdapterInfo:
        """Bring into an engine slot ahead of its first request."""

    async def unload_adapter(self, name: str) -> AdapterInfo:
        """Free its slot once no request holds it. Raises AdapterInUse when merged."""

    async def merge_adapter(self, name: str) -> AdapterInfo: ...
    async def unmerge_adapter(self) -> None:
        """Put the pristine weights back; no-op when nothing is merged."""

    def stats(self) -> RuntimeStats: ...
