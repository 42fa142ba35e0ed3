"""Checkpoints in a run's work directory: `checkpoint-<step>/`, whole once it holds `complete`.

A process can be killed while it writes one; what lacks the mark is never resumed from.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kasa_runtime.errors import TrainingError

MARK = "complete"

_NAME = re.compile(r"checkpoint-(\d+)")


def directory_of(work_dir: Path, step: int) -> Path:
    return work_dir / f"checkpoint-{step}"


def newest(work_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step."""
    found = _whole(work_dir)
    return found[-1] if found else None


def describe_newest(work_dir: Path) -> str:
    """For an error message: what is left after a run has failed."""
    found = newest(work_dir)
    if found is None:
        return "no checkpoint was written before"
    return f"the last good checkpoint is {found}; --resume goes on from it"


@contextmanager
def writing(directory: Path, *, is_main: bool) -> Iterator[None]:
    """Write `directory` in the body, on all processes. What stood there is no longer whole. Where
    it cannot be written, what there is of it is removed and TrainingError raised."""
    if is_main:
        (directory / MARK).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        shutil.rmtree(directory, ignore_errors=True)
        raise TrainingError(
            f"{directory}: this checkpoint cannot be written ({error}); "
            f"{describe_newest(directory.parent)}"
        ) from error


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


def rotate(work_dir: Path, keep: int, best_step: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints and that of `best_step`."""
    whole = _whole(work_dir)
    for path in whole[: max(0, len(whole) - keep)]:
        if best_step is None or path.name != directory_of(work_dir, best_step).name:
            remove(path)


def remove_all(work_dir: Path) -> None:
    for path in _all(work_dir):
        remove(path)


def remove(checkpoint: Path) -> None:
    """The mark goes first: a checkpoint that is half removed is not whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _whole(work_dir: Path) -> list[Path]:
    return [path for path in _all(work_dir) if (path / MARK).is_file()]


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
