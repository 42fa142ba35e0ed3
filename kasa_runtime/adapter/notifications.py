"""Being told by the file system that the adapters directory changed, where it can tell."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from kasa_runtime.background import in_background

logger = logging.getLogger(__name__)

STEP_MS = 200
"""Between looks of the watching thread at what was noted for it."""

_LOCAL_NETWORK = {"cifs", "nfs", "nfs4", "smb3", "smbfs"}
_CLUSTER = {"9p", "afs", "beegfs", "ceph", "glusterfs", "gpfs", "lustre", "virtiofs"}
REMOTE = _LOCAL_NETWORK | _CLUSTER
"""File systems that do not tell of what other machines change."""


class Notifications:
    """Sets `changed` whenever something in `root` may have changed. Event loop only.

    `working` is False where that cannot be known, and then the directory has to be looked at."""

    def __init__(self, root: Path) -> None:
        self.changed = asyncio.Event()
        self.working = False
        self._root = root.resolve()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._listen(), name="adapter-notifications")

    async def close(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _listen(self) -> None:
        watchfiles = await in_background(import_module, "watchfiles")  # not cheap
        try:
            changes = watchfiles.awatch(
                self._root,
                watch_filter=self._counts,
                stop_event=self._stop,
                step=STEP_MS,
                debounce=2 * STEP_MS,
                force_polling=False,
            )
            self.working = True
            self.changed.set()  # by what changed until now
            async for _ in changes:
                self.changed.set()
        except (OSError, RuntimeError) as error:
            logger.warning("%s cannot be watched (%s): looking at it instead", self._root, error)
        finally:
            self.working = False
            self.changed.set()

    def _counts(self, _: object, path: str) -> bool:
        """Not what the store does inside, but for names that another process moved."""
        parts = Path(path).relative_to(self._root).parts
        return parts[:1] != (".kasa",) or parts[1:2] == ("names",)


def is_remote(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether other machines may change what lies at a path; False where that cannot be found out.
    `mounts`: proc(5)'s table."""
    kind, depth = "", 0
    with suppress(OSError):
        for line in mounts.read_text().splitlines():
            mount, _, rest = line.partition(" - ")
            point = Path(mount.split()[4].replace("\\040", " "))
            if path.is_relative_to(point) and len(point.parts) >= depth:
                kind, depth = rest.split()[0], len(point.parts)
    return kind in REMOTE or kind.startswith("fuse.")
