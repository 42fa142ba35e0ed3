"""What an adapter's files hold, and whether they changed since they were looked at."""

from __future__ import annotations

import fcntl
import hashlib
import signal
import sys
from contextlib import suppress
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES
from kasa_runtime.background import give_way

VERSION_DIGITS = 16
CHUNK_BYTES = 1 << 18


def content_digest(directory: Path) -> str:
    """The version of an adapter directory: the first digits of the sha256 over its files' names and
    contents."""
    total = hashlib.sha256()
    for file in sorted(FILES):
        if (directory / file).is_file():
            total.update(f"{file}:{_sha256(directory / file)}\n".encode())
    return total.hexdigest()[:VERSION_DIGITS]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            give_way()
    return digest.hexdigest()


def signature(directory: Path) -> str:
    """Changes whenever a file of the adapter is written, without reading it, and when files come
    and go beside them, as those do that copying programs rename at the end. Raises
    FileNotFoundError if the directory is gone."""
    parts = [str(directory.stat().st_mtime_ns)]
    for file in FILES:
        with suppress(FileNotFoundError):
            stat = (directory / file).stat()
            times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}"  # the first can be set to any value
            parts.append(f"{file}:{stat.st_ino}:{stat.st_size}:{times}")
    return "|".join(parts)


def changed_s(directory: Path) -> float:
    """When one of the adapter's files changed last, in seconds since the epoch; 0.0 without any."""
    paths = [directory / file for file in FILES]
    return max((path.stat().st_ctime for path in paths if path.is_file()), default=0.0)


def file_being_written(directory: Path) -> str:
    """The adapter's file that a process on this machine has open for writing, "" if there is none
    or the system does not say. However slow a copy is, this shows that it goes on."""
    for file in FILES:
        with suppress(FileNotFoundError), (directory / file).open("rb") as stream:
            if _has_writers(stream.fileno()):
                return file
    return ""


def _has_writers(descriptor: int) -> bool:
    """The system grants a read lease only on a file that nobody has open for writing."""
    if sys.platform != "linux":
        return False
    try:
        # Who opens it for writing in this instant sends a signal; by default one that kills.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, or a file system without leases
        return False
    return False
