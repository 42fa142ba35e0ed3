"""What is known of adapters since an earlier start, so that a start reads none of their weights.

    adapters/.kasa/index/<base>/<name>.json    of the current version, as served on one base

Only a memory: it is written without flushing, anybody may remove it, and an entry that is damaged,
or was made by another version of this package, counts as absent. An entry holds as long as the
signatures of the files are those of the files that were read. What the engine gets is read and
checked against its digest at every load, whatever the index says.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kasa_runtime import __version__
from kasa_runtime.types import AdapterInfo, AdapterMethod, AdapterState, AdapterTier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """`signature`: of the version's files. `source`: signature of `adapters/<name>/` when its
    content was last taken in, "" if that is not known."""

    info: AdapterInfo
    signature: str
    source: str = ""


class AdapterIndex:
    """Entries by name, for the base with a fingerprint. Blocking; any number of threads and
    processes."""

    def __init__(self, state: Path, base_fingerprint: str) -> None:
        self._directory = state / "index" / base_fingerprint[:16]

    def get(self, name: str) -> Entry | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            checksum, _, body = self._path(name).read_text().partition("\n")
            if checksum == _checksum(body):
                return _entry(json.loads(body))
        return None

    def put(self, entry: Entry) -> None:
        """Best effort: without it the next start reads the adapter."""
        path = self._path(entry.info.name)
        body = json.dumps(asdict(entry))
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(f"{_checksum(body)}\n{body}")
            staged.replace(path)
        except OSError as error:
            logger.debug("%s is not remembered: %s", path, error)

    def drop(self, name: str) -> None:
        with suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def _checksum(body: str) -> str:
    return f"{__version__} {zlib.crc32(body.encode()):08x}"


def _entry(raw: dict[str, Any]) -> Entry:
    info = raw.pop("info")
    info |= {
        "state": AdapterState(info["state"]),
        "method": AdapterMethod(info["method"]),
        "target_modules": tuple(info["target_modules"]),
        "tier": AdapterTier(info["tier"]),
    }
    return Entry(AdapterInfo(**info), **raw)
