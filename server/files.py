"""Files that are read again when they change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Stamps = tuple[tuple[int, int, int], ...]


def stamps(paths: Sequence[Path]) -> Stamps:
    """What differs after a file was written or replaced. Raises OSError."""
    found = (path.stat() for path in paths)
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)
