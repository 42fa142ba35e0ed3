"""What the names of an adapters directory stand for: one small file each, replaced by rename."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kasa_runtime.adapter.staging import Staging, sync
from kasa_runtime.errors import AdapterInvalid


@dataclass(frozen=True)
class NameRecord:
    """`names/<name>.json`. `versions`: oldest first. `seen`: content digest of `<name>/` when it
    was last taken in."""

    current: str
    versions: tuple[str, ...]
    seen: str = ""

    def with_version(self, version: str) -> tuple[str, ...]:
        """All versions with a new one. What is replaced comes last before the new one, also after
        a rollback: it is kept longest and is the one to roll back to."""
        replaced = [self.current] if self.current in self.versions else []
        others = [v for v in self.versions if v not in (version, *replaced)]
        return tuple(dict.fromkeys([*others, *replaced, version]))


class NameRecords:
    """Blocking. Reading needs no lock; what changes anything runs within `Staging.exclusive`."""

    def __init__(self, directory: Path, staging: Staging) -> None:
        self._directory = directory
        self._staging = staging

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def get(self, name: str) -> NameRecord | None:
        """None if there is none. Raises AdapterInvalid if it is damaged."""
        path = self._path(name)
        try:
            raw = json.loads(path.read_text())
            return NameRecord(raw["current"], tuple(raw["versions"]), raw["seen"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterInvalid(
                f"{path} is damaged ({error!r}); delete {name} and upload it again", name=name
            ) from error

    def signatures(self) -> dict[str, str]:
        """All names that are recorded, each with a signature that changes when its record does."""
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in self._directory.glob("*.json"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    found[path.stem] = f"{stat.st_ino}:{stat.st_mtime_ns}"
        return found

    def put(self, name: str, record: NameRecord) -> None:
        path = self._path(name)
        staged = self._staging.directory / path.name
        with staged.open("w") as stream:
            json.dump(asdict(record), stream)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
        sync(path.parent)

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        sync(self._directory)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"
