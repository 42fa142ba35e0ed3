"""What an adapter's files hold, and whether they changed since they were looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES

VERSION_DIGITS = 16


def content_digest(directory: Path) -> str:
    """The version of an adapter directory: the first digits of the sha256 over its files' names and
    contents."""
    total = hashlib.sha256()
    for file in sorted(FILES):
        if (directory / file).is_file():
            with (directory / file).open("rb") as stream:
                total.update(
                    f"{file}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
                )
    return total.hexdigest()[:VERSION_DIGITS]


def signature(directory: Path) -> str:
    """Changes whenever a file of the adapter is written, without reading it."""
    parts = []
    for file in FILES:
        try:
            stat = (directory / file).stat()
        except FileNotFoundError:
            continue
        parts.append(f"{file}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}")
    return "|".join(parts)
