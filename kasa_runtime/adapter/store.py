"""The adapters directory: what is in it, in which versions.

    adapters/<name>/                      where people put adapters; only read, except by delete
    adapters/.kasa/versions/<name>/<v>/   immutable copies, v being the digest of the content
    adapters/.kasa/names/<name>.json      the current version, all versions in order, and the
                                          content last seen in <name>/
    adapters/.kasa/staging/               uploads and copies in progress; emptied at start

A version enters by rename and `names/<name>.json` moves by rename, so a crash at any moment leaves
the old or the new state. On a directory that cannot be written the store serves what it finds in
place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES, REQUIRED_FILES
from kasa_runtime.errors import AdapterInvalid, AdapterNotFound, InvalidRequest, StoreReadOnly

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
VERSION_DIGITS = 16


def is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str, field: str = "name") -> str:
    """`name` if it is a legal adapter name; raises InvalidRequest naming `field`."""
    if not is_name(name):
        raise InvalidRequest(
            field, f"want a name like [a-z0-9][a-z0-9._-]{{0,62}} without '..', got {name!r}"
        )
    return name


@dataclass(frozen=True)
class NameRecord:
    """`names/<name>.json`. `versions`: oldest first. `seen`: content digest of `<name>/` when it
    was last taken in."""

    current: str
    versions: tuple[str, ...]
    seen: str = ""


@dataclass(frozen=True)
class StoredVersion:
    """One immutable version on disk."""

    name: str
    version: str
    directory: Path
    size_bytes: int
    create_time: float


class AdapterStore:
    """Files only: it does not know what an adapter means. Blocking, so never called on the event
    loop."""

    def __init__(self, root: Path, keep_versions: int = 5) -> None:
        self.root = root
        self.keep_versions = keep_versions
        self._state = root / ".kasa"
        self._in_place: dict[str, StoredVersion] = {}  # of a read-only directory
        self.writable = self._prepare()

    def names(self) -> list[str]:
        """All names that have a current version."""
        recorded = (p.stem for p in (self._state / "names").glob("*.json"))
        return sorted({*recorded, *self._in_place})

    def current(self, name: str) -> StoredVersion:
        """Raises AdapterNotFound."""
        record = self._record(name)
        if record is None:
            if name in self._in_place:
                return self._in_place[name]
            raise AdapterNotFound(self._missing(name), name=name)
        return self._stored(name, record.current)

    def version(self, name: str, version: str) -> StoredVersion:
        """A version by its digest or an unambiguous beginning of it. Raises AdapterNotFound."""
        record = self._record(name)
        versions = record.versions if record else ()
        if name in self._in_place:
            versions = (*versions, self._in_place[name].version)
        matches = sorted({v for v in versions if v.startswith(version)})
        if len(matches) != 1:
            raise AdapterNotFound(
                f"{name}@{version}: want one of the versions {list(versions)}, "
                f"found {len(matches)} that match",
                name=name,
            )
        if name in self._in_place and self._in_place[name].version == matches[0]:
            return self._in_place[name]
        return self._stored(name, matches[0])

    def versions(self, name: str) -> tuple[str, ...]:
        """Oldest first."""
        record = self._record(name)
        return record.versions if record else ()

    def scan(self) -> dict[str, str]:
        """The adapters that people put into the directory, by name, each with a cheap signature of
        its files."""
        found = {}
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if is_name(path.name) and path.is_dir() and (path / REQUIRED_FILES[0]).exists():
                found[path.name] = _signature(path)
        return found

    def take_in(self, name: str, verify: Callable[[Path], None]) -> StoredVersion | None:
        """Make what lies in `<name>/` the current version; None if that was done before.

        `verify` looks at an immutable copy first, and what it raises leaves everything as it was. A
        read-only store serves `<name>/` where it is. Raises OSError while somebody is still writing
        there."""
        source = self.root / name
        digest = content_digest(source)
        if not self.writable:
            return self._take_in_place(name, digest, verify)
        record = self._record(name)
        if record is not None and record.seen == digest:
            return None
        with self.staging() as staged:
            for file in FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, staged / file)
            if content_digest(staged) != digest:
                raise BlockingIOError(f"{source} changed while it was read")
            verify(staged)
            return self.publish(name, staged, seen=digest)

    def is_taken_from_directory(self, name: str) -> bool:
        """Whether what it serves is what lay in its directory, not an upload or a rollback."""
        record = self._record(name)
        return record is not None and record.current == record.seen

    def forget_if_taken_from(self, name: str) -> bool:
        """Drop a name whose directory is gone, if what it serves is what lay there. True if it was
        dropped."""
        self._in_place.pop(name, None)
        if self._record(name) is None:
            return True
        if not self.is_taken_from_directory(name) or not self.writable:
            return False
        self.delete(name)
        return True

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to build a version in; gone at the end unless it was published. Raises
        StoreReadOnly."""
        if not self.writable:
            raise StoreReadOnly(
                f"{self.root} cannot be written; mount it writable to upload adapters"
            )
        path = Path(tempfile.mkdtemp(dir=self._state / "staging"))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, name: str, staged: Path, *, seen: str | None = None) -> StoredVersion:
        """Make a staged directory the current version of `name`: flush, rename, move the name."""
        check_name(name)
        version = content_digest(staged)
        for file in staged.iterdir():
            _sync(file)
        _sync(staged)
        target = self._version_dir(name, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and content_digest(target) != version:
            # Damaged, or left by a crash in the middle of its removal.
            with self.staging() as trash:
                target.rename(trash / version)
        if not target.exists():
            staged.rename(target)
            _sync(target.parent)
        record = self._record(name) or NameRecord(version, ())
        # What is replaced comes last before the new one, also after a rollback: it is kept longest
        # and is the one to roll back to.
        replaced = [record.current] if record.current in record.versions else []
        others = [v for v in record.versions if v not in (version, *replaced)]
        versions = tuple(dict.fromkeys([*others, *replaced, version]))
        kept = versions[-self.keep_versions :]
        self._write_record(name, NameRecord(version, kept, record.seen if seen is None else seen))
        for old in set(versions) - set(kept):
            shutil.rmtree(self._version_dir(name, old), ignore_errors=True)
        return self._stored(name, version)

    def set_current(self, name: str, version: str) -> StoredVersion:
        """Point `name` at an older version. Raises AdapterNotFound, StoreReadOnly."""
        self._require_writable()
        stored = self.version(name, version)
        record = self._record(name)
        assert record is not None
        self._write_record(name, NameRecord(stored.version, record.versions, record.seen))
        return stored

    def delete(self, name: str) -> None:
        """Remove a name with all its versions, and the directory it was taken from. Raises
        AdapterNotFound."""
        self._require_writable()
        if not self._record_path(name).exists() and not (self.root / name).is_dir():
            raise AdapterNotFound(self._missing(name), name=name)
        with self.staging() as trash:
            if (self.root / name).is_dir():
                (self.root / name).rename(trash / "source")
            self._record_path(name).unlink(missing_ok=True)
            if (versions := self._state / "versions" / name).is_dir():
                versions.rename(trash / "versions")

    def _prepare(self) -> bool:
        """Make the state's folders and clear what a crash left; False if the directory cannot be
        written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for folder in ("versions", "names", "staging"):
                (self._state / folder).mkdir(parents=True, exist_ok=True)
            for leftover in (self._state / "staging").iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
            probe = self._state / "staging" / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            logger.warning("%s cannot be written (%s): serving it read-only", self.root, error)
            return False
        return True

    def _take_in_place(
        self, name: str, digest: str, verify: Callable[[Path], None]
    ) -> StoredVersion | None:
        known = self._in_place.get(name)
        if known is not None and known.version == digest:
            return None
        verify(self.root / name)
        self._in_place[name] = _describe(name, digest, self.root / name)
        return self._in_place[name]

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreReadOnly(
                f"{self.root} cannot be written; mount it writable to change adapters"
            )

    def _missing(self, name: str) -> str:
        return f"no adapter {name!r}; there are {self.names() or 'none'}"

    def _version_dir(self, name: str, version: str) -> Path:
        return self._state / "versions" / name / version

    def _stored(self, name: str, version: str) -> StoredVersion:
        directory = self._version_dir(name, version)
        if not directory.is_dir():
            raise AdapterNotFound(f"{name}@{version} is not on disk any more", name=name)
        return _describe(name, version, directory)

    def _record_path(self, name: str) -> Path:
        return self._state / "names" / f"{name}.json"

    def _record(self, name: str) -> NameRecord | None:
        path = self._record_path(name)
        try:
            raw = json.loads(path.read_text())
            return NameRecord(raw["current"], tuple(raw["versions"]), raw["seen"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterInvalid(
                f"{path} is damaged ({error!r}); delete {name} and upload it again", name=name
            ) from error

    def _write_record(self, name: str, record: NameRecord) -> None:
        path = self._record_path(name)
        staged = path.with_name(f".{name}.{os.getpid()}")
        with staged.open("w") as stream:
            json.dump(asdict(record), stream)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
        _sync(path.parent)


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


def _signature(directory: Path) -> str:
    """Changes whenever a file of the adapter is written, without reading it."""
    parts = []
    for file in FILES:
        try:
            stat = (directory / file).stat()
        except FileNotFoundError:
            continue
        parts.append(f"{file}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}")
    return "|".join(parts)


def _describe(name: str, version: str, directory: Path) -> StoredVersion:
    files = [directory / file for file in FILES if (directory / file).is_file()]
    size_bytes = sum(f.stat().st_size for f in files)
    created = max((f.stat().st_mtime for f in files), default=time.time())
    return StoredVersion(name, version, directory, size_bytes, created)


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
