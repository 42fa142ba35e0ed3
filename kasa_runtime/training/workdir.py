"""Whose checkpoints are in a work directory, and so where a run starts.

`run.json` holds the settings that decide the weights. A run is resumed with the same ones only. A
new run removes what a finished one left behind, but never the checkpoints of one that was cut off.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from kasa_runtime.errors import TrainingError
from kasa_runtime.training import checkpoints
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.processes import this_process

RECORD = "run.json"

_FREE = frozenset(
    (
        "data.eval",
        "data.test",
        "train.log_steps",
        "train.save_steps",
        "train.keep_checkpoints",
        "train.eval_steps",
        "train.best_metric",
        "train.patience",
        "train.resume",
        "train.threads",
    )
)
"""Keys that do not change any step, so a run may go on with others."""


def settings(config: RunConfig) -> dict[str, str]:
    """What decides the weights, as "section.key". Paths by name: a directory may move."""
    found = {}
    for section in ("model", "data", "method", "train"):
        values = getattr(config, section)
        for item in fields(values):
            key, value = f"{section}.{item.name}", getattr(values, item.name)
            if key not in _FREE:
                found[key] = value.name if isinstance(value, Path) else str(value)
    if config.method.init_from:
        del found["method.kind"]  # follows from the adapter
    return found | {"number of processes": str(this_process().num_processes)}


def starting_point(config: RunConfig) -> Path | None:
    """The checkpoint that the run goes on from, None to start at the first step. Changes nothing.

    Raises TrainingError where checkpoints of a run that was cut off stand in the way."""
    newest, record = checkpoints.newest(config.work_dir), _read(config.work_dir)
    finished = bool(record.get("finished"))
    known = record.get("settings", {})
    now = settings(config)
    changed = [key for key in now if key in known and known[key] != now[key]]
    if newest is None:
        return None
    if config.train.resume and not changed:
        return newest
    if finished:
        return None
    if changed and config.train.resume:
        key = changed[0]
        raise TrainingError(
            f"{newest}: was made with {key} = {known[key]}, now it is {now[key]}; take back the "
            f"change, or remove {config.work_dir} to start anew"
        )
    raise TrainingError(
        f"{config.work_dir}: holds the checkpoints of a run that did not finish (the newest is "
        f"{newest.name}); go on with --resume, or remove the directory to start anew"
    )


def claim(config: RunConfig) -> Path | None:
    """Make the work directory this run's own; on every process. Returns `starting_point`."""
    found = starting_point(config)
    state = this_process()
    state.wait_for_everyone()  # all have looked before one of them changes anything
    if state.is_main_process:
        checkpoints.discard_torn(config.work_dir)
        if found is None:
            checkpoints.remove_all(config.work_dir)
        _write(config, finished=False)
    state.wait_for_everyone()
    return found


def require_writable(directory: Path) -> None:
    """Raises TrainingError where files cannot be written into `directory`, or it cannot be made.
    Leaves nothing behind: an empty directory would look like an adapter."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise TrainingError(
            f"{directory}: cannot be written ({error}); choose another directory by [output] dir"
        ) from error


def finish(config: RunConfig) -> None:
    """The adapter is written: the checkpoints are no longer needed."""
    _write(config, finished=True)


def _write(config: RunConfig, *, finished: bool) -> None:
    record = {"finished": finished, "settings": settings(config)}
    try:
        config.work_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        (config.work_dir / RECORD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{config.work_dir}: cannot be written ({error})") from error


def _read(work_dir: Path) -> dict[str, Any]:
    try:
        record = json.loads((work_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
