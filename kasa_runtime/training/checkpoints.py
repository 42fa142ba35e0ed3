"""Checkpoints in a run's work directory: `checkpoint-<step>/`, whole once it holds `complete`.

A process can be killed while it writes one; what lacks the mark is never resumed from.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

MARK = "complete"

_NAME = re.compile(r"checkpoint-(\d+)")


def newest(work_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step."""
    whole = [path for path in _all(work_dir) if (path / MARK).is_file()]
    return whole[-1] if whole else None


def mark_complete(directory: Path) -> None:
    """Call when every file of the checkpoint is written."""
    for path in directory.iterdir():
        _sync(path)
    (directory / MARK).touch()
    _sync(directory)


def discard_torn(work_dir: Path) -> None:
    """Remove what a killed process left behind."""
    for path in _all(work_dir):
        if not (path / MARK).is_file():
            shutil.rmtree(path, ignore_errors=True)


def rotate(work_dir: Path, keep: int, best: str | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best one."""
    whole = [path for path in _all(work_dir) if (path / MARK).is_file()]
    for path in whole[:-keep]:
        if best is None or path.resolve() != Path(best).resolve():
            (path / MARK).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _all(work_dir: Path) -> list[Path]:
    """By step."""
    if not work_dir.is_dir():
        return []
    found = [(m, p) for p in work_dir.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
