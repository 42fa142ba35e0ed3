"""Files that arrive as multipart/form-data: what browsers and `curl -F file=@PATH` send. They are
spooled, for the runtime wants the digests of all files before the first byte of one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import ManifestFile
from server.convert import MAX_CHUNK_BYTES, MAX_FILES

ENVELOPE_BYTES = 64 * 2**10
"""Boundaries and headers may take this much beside the files."""


@dataclass(frozen=True)
class ReceivedFile:
    """A file as it arrived, and what a manifest says of it."""

    entry: ManifestFile
    content: BinaryIO

    async def chunks(self) -> AsyncIterator[tuple[int, bytes]]:
        """Offset and data of each."""
        offset = 0
        while data := await asyncio.to_thread(self.content.read, MAX_CHUNK_BYTES):
            yield offset, data
            offset += len(data)


@asynccontextmanager
async def received_files(
    request: Request, require_size: Callable[[int], None]
) -> AsyncIterator[Sequence[ReceivedFile]]:
    """The files of a request, until the block ends. `require_size` raises when they are too large
    together. Raises InvalidRequest."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "multipart/form-data":
        raise InvalidRequest("content-type", "must be multipart/form-data, as of `curl -F file=@…`")
    try:
        form = await _Parser(request, require_size).parse()
    except MultiPartException as error:
        raise InvalidRequest("body", _wanted(error.message)) from None
    try:
        parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        yield [await asyncio.to_thread(_described, part) for part in parts]
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Refuses what is too large as soon as it is, and what was cut off, which would lack a file or
    the end of one and look whole."""

    def __init__(self, request: Request, require_size: Callable[[int], None]) -> None:
        received = self._received(request, require_size)
        super().__init__(request.headers, received, max_files=MAX_FILES, max_fields=0)
        self._complete = False

    def on_end(self) -> None:
        self._complete = True

    async def _received(
        self, request: Request, require_size: Callable[[int], None]
    ) -> AsyncGenerator[bytes, None]:
        num_bytes = 0
        async for data in request.stream():
            num_bytes += len(data)
            require_size(num_bytes - ENVELOPE_BYTES)
            yield data
        if not self._complete:
            raise InvalidRequest("body", "ends before its last boundary; was it cut off?")


def _wanted(message: str) -> str:
    if message.startswith("Too many fields"):
        return "must have files alone, got a field without a file name"
    if message.startswith("Too many files"):
        return f"must have at most {MAX_FILES} files"
    return f"is no multipart/form-data: {message}"


def _described(part: UploadFile) -> ReceivedFile:
    digest = hashlib.file_digest(part.file, "sha256").hexdigest()  # type: ignore[arg-type]
    num_bytes = part.file.tell()
    part.file.seek(0)
    return ReceivedFile(ManifestFile(part.filename or "", num_bytes, digest), part.file)
