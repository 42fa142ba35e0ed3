"""The adapters directory: what is in it, in which versions.

    adapters/<name>/                      where people put adapters; only read, except by delete
    adapters/.kasa/versions/<name>/<v>/   immutable copies, v being the digest of the content
    adapters/.kasa/names/<name>.json      the current version, all versions in order, and the
                                          content last seen in <name>/
    adapters/.kasa/staging/               work in progress, see `staging.py`

A version enters by rename and `names/<name>.json` moves by rename, so a crash at any moment leaves
the old or the new state, and the next start removes what belongs to neither. What is returned is on
the disk, and a power cut does not undo it.

Any number of processes may use one directory, if its file system knows flock: each change is made
whole, one after the other, and readers need no lock. A process learns of the changes of others by
looking (`records`). Retention and deletion remove versions without asking other processes; in this
one, `hold` keeps a version.

On a directory that cannot be written the store serves what it finds in place.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kasa_runtime.adapter.checkpoint import FILES, REQUIRED_FILES
from kasa_runtime.adapter.content import content_digest, file_being_written, signature
from kasa_runtime.adapter.names import check_name, is_name, listed
from kasa_runtime.adapter.records import NameRecord, NameRecords
from kasa_runtime.adapter.staging import Staging, sync
from kasa_runtime.adapter.versions import StoredVersion, Versions, describe
from kasa_runtime.errors import (
    AdapterInvalid,
    AdapterNotFound,
    StoreReadOnly,
    VersionConflict,
)

logger = logging.getLogger(__name__)


class AdapterStore:
    """Files only: it does not know what an adapter means. Blocking, so never called on the event
    loop."""

    def __init__(self, root: Path, keep_versions: int = 5) -> None:
        self.root = root
        self.keep_versions = keep_versions
        self.state = root / ".kasa"
        self._staging = Staging(self.state)
        self._records = NameRecords(self.state / "names", self._staging)
        self._versions = Versions(self.state / "versions", self._staging)
        self._in_place: dict[str, StoredVersion] = {}  # of a read-only directory
        self.writable = self._prepare()

    def names(self) -> list[str]:
        """All names that have a current version."""
        return sorted({*self.records(), *self._in_place})

    def current(self, name: str) -> StoredVersion:
        """Raises AdapterNotFound, AdapterInvalid."""
        record = self._records.get(name)
        while record is not None:
            try:
                return self._versions.get(name, record.current)
            except AdapterNotFound:
                before, record = record, self._records.get(name)
                if record == before:
                    raise
        if name in self._in_place:
            return self._in_place[name]
        raise AdapterNotFound(self._missing(name), name=name)

    def current_version(self, name: str) -> str:
        """The digest of `current`, "" if there is none. Raises AdapterInvalid."""
        record = self._records.get(name)
        return record.current if record else ""

    def version(self, name: str, version: str) -> StoredVersion:
        """A version by its digest or an unambiguous beginning of it. Raises AdapterNotFound."""
        record = self._records.get(name)
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
        return self._versions.get(name, matches[0])

    def held(self, name: str, version: str) -> StoredVersion:
        """A version by its whole digest, also one that is only kept for who holds it. Raises
        AdapterNotFound."""
        in_place = self._in_place.get(name)
        if in_place is not None and in_place.version == version:
            return in_place
        return self._versions.get(name, version)

    def versions(self, name: str) -> tuple[str, ...]:
        """Oldest first."""
        record = self._records.get(name)
        return record.versions if record else ()

    def kept(self, name: str) -> tuple[str, list[StoredVersion]]:
        """The current version's digest, and what `version` finds, oldest first. Raises
        AdapterNotFound, AdapterInvalid."""
        record, in_place = self._records.get(name), self._in_place.get(name)
        versions = record.versions if record else ()
        if in_place is not None and in_place.version not in versions:
            versions = (*versions, in_place.version)
        if not versions:
            raise AdapterNotFound(self._missing(name), name=name)
        found = []
        for version in versions:
            with suppress(AdapterNotFound):  # retention or deletion was quicker
                found.append(self.held(name, version))
        return record.current if record else versions[-1], found

    def scan(self) -> dict[str, str]:
        """The adapters that people put into the directory, by name, each with a cheap signature of
        its files."""
        found = {}
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if is_name(path.name) and path.is_dir() and (path / REQUIRED_FILES[0]).exists():
                found[path.name] = signature(path)
        return found

    def records(self) -> dict[str, str]:
        """All names that are recorded, each with a signature that changes when its record does."""
        return self._records.signatures()

    def take_in(self, name: str, verify: Callable[[Path], None]) -> StoredVersion | None:
        """Make what lies in `<name>/` the current version; None if that was done before.

        `verify` looks at an immutable copy first, and what it raises leaves everything as it was. A
        read-only store serves `<name>/` where it is. Raises OSError while somebody is still writing
        there."""
        source = self.root / name
        if file := file_being_written(source):
            raise BlockingIOError(f"{source / file} is still being written")
        before = signature(source)
        digest = content_digest(source)
        if not self.writable:
            return self._take_in_place(name, digest, verify)
        record = self._records.get(name)
        if record is not None and record.seen == digest:
            return None
        with self.staging() as staged:
            for file in FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, staged / file)
            verify(staged)
            if content_digest(staged) != digest or signature(source) != before:
                raise BlockingIOError(f"{source} changed while it was read")
            return self.publish(name, staged, seen=digest)

    def is_taken_from_directory(self, name: str) -> bool:
        """Whether what it serves is what lay in its directory, not an upload or a rollback."""
        record = self._records.get(name)
        return record is not None and record.current == record.seen

    def forget_if_taken_from(self, name: str) -> bool:
        """Drop a name whose directory is gone, if what it serves is what lay there. True if it was
        dropped."""
        self._in_place.pop(name, None)
        if not self.writable:
            return self._records.get(name) is None
        with self._staging.exclusive():
            if self.is_taken_from_directory(name):
                self._remove(name)
            return self._records.get(name) is None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to build a version in; gone at the end unless it was published. Raises
        StoreReadOnly."""
        self._require_writable()
        with self._staging.files() as files:
            yield files

    def hold(self, name: str, version: str) -> None:
        """Keep a version on the disk until it is let go, whatever this process publishes or
        deletes meanwhile. Does not block."""
        self._versions.hold(name, version)

    def let_go(self, name: str, version: str) -> bool:
        """Whether nothing else kept it, so that there is something to `sweep`. Does not block."""
        return self._versions.let_go(name, version)

    def sweep(self, name: str) -> None:
        """Remove versions of a name that neither its record nor anybody keeps."""
        with self._staging.exclusive():
            self._sweep(name)

    def publish(
        self, name: str, staged: Path, *, seen: str | None = None, expected: str | None = None
    ) -> StoredVersion:
        """Make a staged directory the current version of `name`: flush, rename, move the name.

        `seen`: the content of `<name>/` that this is; nothing moves if it was taken in meanwhile.
        `expected`: the version to replace, "" for none. Raises VersionConflict if it is another."""
        check_name(name)
        version = content_digest(staged)
        for file in staged.iterdir():
            sync(file)
        sync(staged)
        with self._staging.exclusive():
            record = self._records.get(name)
            check_expected(name, record.current if record else "", expected)
            if record is not None and seen is not None and record.seen == seen:
                return self._versions.get(name, record.current)
            self._versions.enter(staged, name, version)
            record = record or NameRecord(version, ())
            seen = record.seen if seen is None else seen
            kept = self._retained(name, record.with_version(version))
            self._records.put(name, NameRecord(version, kept, seen))
            self._versions.keep_only(name, kept)
        return self._versions.get(name, version)

    def set_current(self, name: str, version: str) -> StoredVersion:
        """Point `name` at an older version. Raises AdapterNotFound, StoreReadOnly."""
        self._require_writable()
        with self._staging.exclusive():
            stored = self.version(name, version)
            record = self._records.get(name)
            assert record is not None
            self._records.put(name, NameRecord(stored.version, record.versions, record.seen))
        return stored

    def delete(self, name: str) -> None:
        """Remove a name with all its versions, and the directory it was taken from. Raises
        AdapterNotFound."""
        self._require_writable()
        with self._staging.exclusive():
            if name not in self._records and not (self.root / name).is_dir():
                raise AdapterNotFound(self._missing(name), name=name)
            self._remove(name)

    # --- inside; what changes anything runs within `exclusive` ------------------------------------

    def _prepare(self) -> bool:
        """Make the state's folders and remove what a crash left; False if the directory cannot be
        written."""
        try:
            for folder in ("versions", "names", "staging"):
                if not (self.state / folder).is_dir():
                    (self.state / folder).mkdir(parents=True, exist_ok=True)
                    sync(self.state)
                    sync(self.root)
            with self._staging.exclusive():
                self._staging.sweep()
                probe = self._staging.directory / ".probe"
                probe.touch()
                probe.unlink()
                for name in self._versions.names():  # of a crash between two steps of a change
                    self._sweep(name)
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be written (%s): serving it read-only", self.root, error)
            return False
        return True

    def _sweep(self, name: str) -> None:
        try:
            record = self._records.get(name)
        except AdapterInvalid:
            return  # somebody may repair it
        self._versions.keep_only(name, record.versions if record else ())

    def _retained(self, name: str, versions: tuple[str, ...]) -> tuple[str, ...]:
        last = versions[-self.keep_versions :]
        return tuple(v for v in versions if v in last or self._versions.is_held(name, v))

    def _remove(self, name: str) -> None:
        """Its directory first: a record without it is dropped at the next start, a directory
        without a record would be taken in."""
        source = self.root / name
        if source.is_dir():
            self._staging.discard(source)
            sync(self.root)
        self._records.remove(name)
        self._versions.keep_only(name, ())

    def _take_in_place(
        self, name: str, digest: str, verify: Callable[[Path], None]
    ) -> StoredVersion | None:
        known = self._in_place.get(name)
        if known is not None and known.version == digest:
            return None
        verify(self.root / name)
        self._in_place[name] = describe(name, digest, self.root / name)
        return self._in_place[name]

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreReadOnly(
                f"{self.root} cannot be written; mount it writable to change adapters"
            )

    def _missing(self, name: str) -> str:
        return f"no adapter {name!r}; there are {listed(self.names())}"


def check_expected(name: str, found: str, expected: str | None) -> None:
    """Raises VersionConflict if the current version ("" for none) is not the one that an upload
    means to replace; None replaces any."""
    if expected is not None and found != expected:
        raise VersionConflict(
            f"{name}: expected version {expected or 'none'!r}, current is {found or 'none'!r}; "
            "look at it and upload again",
            name=name,
        )
