"""What a run leaves behind of its course: `metrics.jsonl` and `spectra.jsonl` in its work
directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.training.layers import KasaLinear

METRICS_FILE = "metrics.jsonl"
SPECTRA_FILE = "spectra.jsonl"


class Journal(TrainerCallback):
    """Appends one line for each log. `layers` by path; their singular values go to
    SPECTRA_FILE."""

    def __init__(self, work_dir: Path, layers: Mapping[str, KasaLinear]) -> None:
        self.work_dir, self.layers = work_dir, layers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget what lies after the step that is resumed from; all of it for a new run."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            with (self.work_dir / METRICS_FILE).open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
