"""Work in progress beside the versions, and the lock under which versions and names change.

    .kasa/lock                held by the one process that changes names or versions now
    .kasa/staging/<x>/lock    held by the process that fills <x>/files, for as long as it does
    .kasa/staging/<x>/files/  an upload or a copy in progress
    .kasa/staging/<x>/<y>     something to be removed

The locks are flock's: the system frees them when their process dies, however it dies. So what lies
in staging and is not locked belongs to nobody, and any process may remove it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Staging:
    """Of one adapters directory's state. Any number of threads and processes; raises OSError where
    the directory cannot be written or its file system knows no locks."""

    def __init__(self, state: Path) -> None:
        self._lock = state / "lock"
        self.directory = state / "staging"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone among all threads of all processes. Not reentrant."""
        with _flock(self._lock):
            yield

    @contextmanager
    def files(self) -> Iterator[Path]:
        """A directory to build a version in; gone at the end unless it was renamed. Takes
        `exclusive` for a moment."""
        with self.exclusive():  # or a sweep could come between the directory and its lock
            own = Path(tempfile.mkdtemp(dir=self.directory))
            lock = _flock(own / "lock")
            lock.acquire()
        try:
            (own / "files").mkdir()
            yield own / "files"
        finally:
            shutil.rmtree(own, ignore_errors=True)
            lock.release()

    def discard(self, *paths: Path) -> None:
        """Remove files and directories, each at one stroke: none is ever seen in part."""
        trash = Path(tempfile.mkdtemp(dir=self.directory))
        for index, path in enumerate(paths):
            path.rename(trash / str(index))
        shutil.rmtree(trash, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what dead processes left. Only within `exclusive`."""
        for path in self.directory.iterdir():
            if not path.is_dir():
                path.unlink()
                continue
            lock = _flock(path / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            shutil.rmtree(path, ignore_errors=True)
            lock.release()


def _flock(path: Path) -> FileLock:
    """Not per thread: a background thread may take it and another one give it back."""
    return FileLock(path, thread_local=False)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
