"""One upload in progress: files staged byte by byte, their digests checked, then handed on to be
published."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES, REQUIRED_FILES
from kasa_runtime.adapter.names import check_name
from kasa_runtime.background import done_in_background
from kasa_runtime.errors import DigestMismatch, InvalidRequest
from kasa_runtime.types import AdapterInfo, ManifestFile, UploadManifest

MAX_UPLOAD_BYTES = 4 << 30

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: UploadManifest) -> None:
    """Raises InvalidRequest naming the field."""
    check_name(manifest.name, "manifest.name")
    paths = [file.path for file in manifest.files]
    for i, file in enumerate(manifest.files):
        if file.path not in FILES:
            raise InvalidRequest(
                f"manifest.files[{i}].path", f"want one of {list(FILES)}, got {file.path!r}"
            )
        if paths.count(file.path) > 1:
            raise InvalidRequest(f"manifest.files[{i}].path", f"{file.path} is listed twice")
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidRequest(f"manifest.files[{i}].sha256", "want 64 lower-case hex digits")
        if file.size_bytes < 0:
            raise InvalidRequest(f"manifest.files[{i}].size", f"got {file.size_bytes}")
    if missing := [path for path in REQUIRED_FILES if path not in paths]:
        raise InvalidRequest("manifest.files", f"want {list(REQUIRED_FILES)}, {missing} is missing")
    if (total := sum(f.size_bytes for f in manifest.files)) > MAX_UPLOAD_BYTES:
        raise InvalidRequest(
            "manifest.files", f"{total} bytes are more than the limit of {MAX_UPLOAD_BYTES}"
        )


class Upload:
    """Receives the chunks of one upload, each file in order. Not for concurrent use."""

    def __init__(
        self,
        manifest: UploadManifest,
        staged: Path,
        publish: Callable[[], Awaitable[AdapterInfo]],
    ) -> None:
        self._files = {file.path: file for file in manifest.files}
        self._received = dict.fromkeys(self._files, 0)
        self._hashes = {path: hashlib.sha256() for path in self._files}
        self._staged = staged
        self._publish = publish

    async def write(self, path: str, offset: int, data: bytes) -> None:
        """Append a chunk. Raises InvalidRequest (a path that was not announced, a gap) or
        DigestMismatch (more bytes than announced)."""
        announced = self._files.get(path)
        if announced is None:
            raise InvalidRequest("chunk.path", f"{path!r} is not in the manifest")
        if offset != self._received[path]:
            raise InvalidRequest(
                "chunk.offset", f"{path}: want {self._received[path]}, the next byte, got {offset}"
            )
        if offset + len(data) > announced.size_bytes:
            raise DigestMismatch(
                f"{path}: announced {announced.size_bytes} bytes, got {offset + len(data)} or more"
            )
        await done_in_background(self._append, path, data)

    async def commit(self) -> AdapterInfo:
        """Check sizes and digests, then content, then publish. Raises DigestMismatch,
        AdapterInvalid, BaseMismatch, VersionConflict; nothing is published then."""
        for file in self._files.values():
            self._check_complete(file)
        return await self._publish()

    def _append(self, path: str, data: bytes) -> None:
        self._hashes[path].update(data)
        with (self._staged / path).open("ab") as stream:
            stream.write(data)
        self._received[path] += len(data)

    def _check_complete(self, file: ManifestFile) -> None:
        received = self._received[file.path]
        if received != file.size_bytes:
            raise DigestMismatch(f"{file.path}: announced {file.size_bytes} bytes, got {received}")
        digest = self._hashes[file.path].hexdigest()
        if digest != file.sha256:
            raise DigestMismatch(f"{file.path}: announced sha256 {file.sha256}, got {digest}")
