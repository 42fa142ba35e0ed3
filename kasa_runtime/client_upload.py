"""The messages of an upload: a manifest, then the files in chunks, read as they are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from kasa.v1 import adapters_pb2

from kasa_runtime.errors import AdapterInvalid

CHUNK_BYTES = 2**20
REQUIRED_FILES = ("adapter_config.json", "adapter_model.safetensors")
OPTIONAL_FILES = ("kasa_meta.json", "README.md")

Progress = Callable[[int, int], None]
"""Called, in another thread, with the bytes sent so far and those of the whole upload. What it
raises ends the upload, and comes out of it."""


class UploadOptions(TypedDict, total=False):
    """What an upload takes beside the directory."""

    name: str | None  # default: the directory's
    expected_version: str | None  # only onto this version; "" = only if the name is new
    progress: Progress | None


class UploadMessages:
    """One upload, as an iterator over its messages.

    gRPC reads it in a thread of its own, whose exceptions it logs and hides. So what goes wrong is
    kept as `failure`, and the server is sent a message that makes it discard the upload."""

    def __init__(self, directory: Path, options: UploadOptions) -> None:
        """Reads all files once. Raises AdapterInvalid when one is missing or cannot be read."""
        missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
        if missing:
            raise AdapterInvalid(f"{directory} is no adapter: it has no {', '.join(missing)}")
        optional = [name for name in OPTIONAL_FILES if (directory / name).is_file()]
        self._paths = [directory / name for name in (*REQUIRED_FILES, *optional)]
        self._manifest = adapters_pb2.UploadManifest(
            name=options.get("name") or directory.resolve().name,
            files=[_described(path) for path in self._paths],
            expected_version=options.get("expected_version"),
        )
        self._progress = options.get("progress")
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield adapters_pb2.UploadAdapterRequest(manifest=self._manifest)
            yield from self._chunks()
        except Exception as error:
            self.failure = error
            yield adapters_pb2.UploadAdapterRequest()  # neither manifest nor chunk: refused

    def _chunks(self) -> Iterator[Any]:
        num_sent, num_bytes = 0, sum(file.size for file in self._manifest.files)
        for path in self._paths:
            offset = 0
            for data in _read(path):
                chunk = adapters_pb2.UploadChunk(path=path.name, offset=offset, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                offset += len(data)
                num_sent += len(data)
                if self._progress is not None:
                    self._progress(num_sent, num_bytes)


def _described(path: Path) -> Any:
    size, digest = 0, hashlib.sha256()
    for data in _read(path):
        size += len(data)
        digest.update(data)
    return adapters_pb2.UploadFile(path=path.name, size=size, sha256=digest.hexdigest())


def _read(path: Path) -> Iterator[bytes]:
    """The content of a file, in parts. Raises AdapterInvalid when it cannot be read."""
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield data
    except OSError as error:
        raise AdapterInvalid(f"{path} cannot be read: {error.strerror or error}") from error
