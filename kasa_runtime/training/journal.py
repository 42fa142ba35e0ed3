"""What a run leaves behind of its course, in its work directory: `metrics.jsonl`, a line for each
log and each measurement, and `spectra.jsonl`, the singular values of every layer at some fifty
steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.errors import TrainingError
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.spectra import diagonal, singular_values

METRICS_FILE = "metrics.jsonl"
SPECTRA_FILE = "spectra.jsonl"
NUM_SNAPSHOTS = 50


class Journal(TrainerCallback):
    """Writes both files while the Trainer runs. `layers` by path. A resumed run keeps the lines up
    to its first step; a new one starts with empty files."""

    def __init__(self, work_dir: Path, layers: Mapping[str, KasaLinear]) -> None:
        self.work_dir, self.layers = work_dir, layers
        self._last_snapshot = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for name in (METRICS_FILE, SPECTRA_FILE):
            lines = read_lines(self.work_dir / name) if state.global_step else []
            kept = [line for line in lines if line["step"] <= state.global_step]
            self._write(name, kept, mode="w")
            if name == SPECTRA_FILE and kept:
                self._last_snapshot = kept[-1]["step"]
        if state.global_step == 0:
            self._snapshot(0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            finite = {k: v if math.isfinite(v) else None for k, v in logs.items()}
            self._write(METRICS_FILE, [{"step": state.global_step, **finite}])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        every = -(-state.max_steps // NUM_SNAPSHOTS)
        if state.is_world_process_zero and state.global_step % every == 0:
            self._snapshot(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and state.global_step > self._last_snapshot:
            self._snapshot(state.global_step)

    def _snapshot(self, step: int) -> None:
        if not self.layers:
            return
        layers = {path: _spectrum(layer) for path, layer in self.layers.items()}
        self._write(SPECTRA_FILE, [{"step": step, "layers": layers}])
        self._last_snapshot = step

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]], *, mode: str = "a") -> None:
        path = self.work_dir / name
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written ({error})") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal file; a process can be killed while it writes one."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "step" in found:
            lines.append(found)
    return lines


def _spectrum(layer: KasaLinear) -> dict[str, list[float]]:
    """`values`: of the update. `diag`: |d|, where there is one."""
    values = {"values": _short(singular_values(layer))}
    diag = diagonal(layer)
    return values if diag is None else {**values, "diag": _short(diag)}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
