"""Directories that are built once and then only read, by any number of processes.

A build happens in a hidden directory beside its place, under a lock, and appears there by one
rename. So a reader sees all of it or nothing, and a process that dies leaves only what the next
build sweeps away.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kasa_runtime.errors import ModelError

_ADVICE = {
    errno.ENOSPC: "free some space, or set KASA_HOME to a directory on a larger disk",
    errno.EDQUOT: "free some of your quota, or set KASA_HOME to a directory elsewhere",
    errno.EACCES: "set KASA_HOME to a directory that you may write",
    errno.EPERM: "set KASA_HOME to a directory that you may write",
    errno.EROFS: "set KASA_HOME to a directory that can be written",
}


def build_once(
    final: Path,
    build: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool],
    say: Callable[[str], None],
) -> Path:
    """Return `final`, made by `build(staging directory)` unless `is_complete(final)` holds already.

    Blocks while another process builds the same directory, then uses its result. A `final` that is
    there but not complete is replaced. Raises ModelError where the disk refuses.
    """
    if is_complete(final):  # before the lock: a cache baked into a read-only image must work
        return final
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final, say):
            if not is_complete(final):
                _build(final, build)
    return final


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the work inside into a ModelError that says what to do about it."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and try again")
        place = error.filename or where
        raise ModelError(f"{place}: {error.strerror or error}; {advice}") from error


def require_free(directory: Path, num_bytes: int) -> None:
    """Raise OSError (ENOSPC) now rather than in the middle of the work. `directory` must exist."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        message = f"{num_bytes / 1e6:.0f} MB are needed here, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(directory))


@contextmanager
def _locked(final: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(_beside(final, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {final.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(final: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{final.name}.build-"
    for leftover in final.parent.glob(f"{prefix}*"):  # the lock is ours: nobody builds these
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        made = staging / "made"  # follows the umask, as mkdtemp's own directory does not
        made.mkdir()
        build(made)
        _sync(made)
        if final.exists():
            os.rename(final, staging / "replaced")
        os.rename(made, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Put the files on the disk before they get their name: a power cut must not tear weights."""
    for path in (*sorted(directory.rglob("*")), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(final: Path, kind: str) -> Path:
    return final.parent / f".{final.name}.{kind}"


def file_sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
