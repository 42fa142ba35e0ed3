"""Whole runs for tests: their configuration in memory, as a run.toml, and as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from kasa_runtime.training.config import (
    DataSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
    TrainSection,
)

COLOURS = [
    {"q": q, "a": a}
    for q, a in (("red", "stop"), ("green", "go"), ("blue", "wait"), ("black", "leave"))
]
# Rows of many lengths, in a number that no batch size divides.
ROWS = [{"q": f"{i} {'.' * (i % 7)}", "a": ("stop", "go", "wait")[i % 3] * 2} for i in range(22)]


def make_run(
    directory: Path, model_dir: Path, data: Path, *, r: int = 8, **train: Any
) -> RunConfig:
    """A completion run in `directory` that measures nothing at its end. `train`: of [train]."""
    defaults: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "log_steps": 1}
    return RunConfig(
        path=directory / "run.toml",
        model=ModelSection(name=str(model_dir)),
        data=DataSection(train=data, eval=data, prompt="{q} =>", completion=" {a}"),
        method=MethodSection(r=r, alpha=16),
        train=TrainSection(**{"learning_rate": 1e-2, **defaults, **train}),
        output=OutputSection(dir=directory / "out" / "colours", work_dir=directory / "work"),
    )


def with_train(config: RunConfig, **train: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **train))


def with_output(config: RunConfig, directory: Path) -> RunConfig:
    """The same run elsewhere."""
    output = replace(config.output, dir=directory / "colours", work_dir=directory / "work")
    return replace(config, output=output)


def quiet() -> Console:
    return Console(quiet=True)


def weights(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def write_toml(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> Path:
    """Values that JSON and TOML write alike."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def kasa_train(
    run: Path,
    *arguments: str,
    launcher: Sequence[str] = (sys.executable,),
    preexec_fn: Callable[[], None] | None = None,
) -> subprocess.Popen[str]:
    """`kasa train` as a process of its own, with one thread."""
    return subprocess.Popen(
        [*launcher, "-m", "kasa_runtime.cli", "train", str(run), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=preexec_fn,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Its output, once it has ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output
