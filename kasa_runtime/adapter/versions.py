"""The immutable copies that are served: `versions/<name>/<digest>/`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.staging import Staging, sync
from kasa_runtime.errors import AdapterError, AdapterNotFound


@dataclass(frozen=True)
class StoredVersion:
    """One immutable version on disk."""

    name: str
    version: str
    directory: Path
    size_bytes: int
    create_time: float


class Versions:
    """Blocking. Reading needs no lock; what changes anything runs within `Staging.exclusive`. No
    version that is held is removed by this process."""

    def __init__(self, directory: Path, staging: Staging) -> None:
        self._directory = directory
        self._staging = staging
        self._holders: Counter[tuple[str, str]] = Counter()
        self._orphans: set[tuple[str, str]] = set()  # not recorded, only held

    def get(self, name: str, version: str) -> StoredVersion:
        """Raises AdapterNotFound."""
        directory = self._directory / name / version
        with present(name, version, directory):
            return describe(name, version, directory)

    def is_held(self, name: str, version: str) -> bool:
        return self._holders[name, version] > 0

    def hold(self, name: str, version: str) -> None:
        self._holders[name, version] += 1

    def let_go(self, name: str, version: str) -> bool:
        """Whether nothing keeps it any more."""
        self._holders[name, version] -= 1
        if self._holders[name, version]:
            return False
        del self._holders[name, version]
        return (name, version) in self._orphans

    def names(self) -> list[str]:
        return [folder.name for folder in self._directory.iterdir()]

    def enter(self, staged: Path, name: str, version: str) -> None:
        """Move a complete directory in; nothing if that version is there."""
        target = self._directory / name / version
        if not target.parent.exists():
            target.parent.mkdir()
            sync(self._directory)
        if target.exists() and content_digest(target) != version:
            self._staging.discard(target)  # damaged
        if not target.exists():
            staged.rename(target)
            sync(target.parent)

    def keep_only(self, name: str, versions: tuple[str, ...]) -> None:
        """Remove what is neither one of `versions` nor held."""
        folder = self._directory / name
        if not folder.is_dir():
            return
        there = list(folder.iterdir())
        held = [path.name for path in there if self.is_held(name, path.name)]
        self._orphans = {orphan for orphan in self._orphans if orphan[0] != name}
        self._orphans |= {(name, version) for version in held if version not in versions}
        kept = [path for path in there if path.name in versions or path.name in held]
        if not kept:
            self._staging.discard(folder)
        elif len(kept) < len(there):
            self._staging.discard(*(path for path in there if path not in kept))


@contextmanager
def present(name: str, version: str, directory: Path) -> Iterator[None]:
    """Raises AdapterNotFound if a version is removed, as by retention, while it is read."""
    gone = f"{name}@{version} is not on disk any more"
    try:
        if not directory.is_dir():
            raise AdapterNotFound(gone, name=name)
        yield
    except (OSError, AdapterError) as error:
        if directory.is_dir():
            raise
        raise AdapterNotFound(gone, name=name) from error


def describe(name: str, version: str, directory: Path) -> StoredVersion:
    files = [directory / file for file in FILES if (directory / file).is_file()]
    size_bytes = sum(f.stat().st_size for f in files)
    created = max((f.stat().st_mtime for f in files), default=time.time())
    return StoredVersion(name, version, directory, size_bytes, created)
