"""Runs the cells of experiments, one result a line in `results.jsonl`: what is there is not run
again."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.base_model.source import resolve
from kasa_runtime.errors import ConfigError, TrainingError
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.experiments.approaches import make_trainable
from kasa_runtime.training.experiments.grid import Approach, Cell
from kasa_runtime.training.export import base_name
from kasa_runtime.training.prepare import load_base, load_data
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.trainer import KasaTrainer, num_steps, trainable
from kasa_runtime.types import AdapterMethod

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a cell. `curve`: what was measured on the held-out rows after each epoch; `final`:
    the metrics on the test rows, at the last step."""

    run: str  # name of the run.toml's adapter
    settings: str  # digest of the run.toml's settings
    cell: str  # Cell.key
    seed: int
    curve: Sequence[Mapping[str, float]]
    final: Mapping[str, float]
    num_parameters: int  # trained, without a new head
    seconds: float  # of training
    steps: int
    grad_norm_mean: float | None = None
    grad_norm_max: float | None = None
    defect_A: float | None = None  # mean of ||A A^T - I||_F at the end
    defect_B: float | None = None
    failure: str = ""  # why training stopped early; what it had measured before stands


class Results:
    """The lines of a results file, by (run, settings, cell, seed). Raises ConfigError for a line
    that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Result] = []
        if path.is_file():
            known = {item.name for item in fields(Result)}
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    raw = json.loads(line)
                    self.all.append(Result(**{k: v for k, v in raw.items() if k in known}))
                except (ValueError, TypeError) as error:
                    raise ConfigError(f"{path}:{number}: not a result ({error})") from error

    def find(self, config: RunConfig, cell: Cell, seed: int) -> Result | None:
        wanted = (config.name, digest(config), cell.key, seed)
        matches = (r for r in self.all if (r.run, r.settings, r.cell, r.seed) == wanted)
        return next(matches, None)

    def of_cell(self, config: RunConfig, cell: Cell) -> dict[int, Result]:
        """All results of a cell, by seed."""
        seeds = sorted({result.seed for result in self.all})
        found = {seed: self.find(config, cell, seed) for seed in seeds}
        return {seed: result for seed, result in found.items() if result}

    def add(self, result: Result) -> None:
        """Keep and append; a killed process loses at most the run that it was in."""
        self.all.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")


def digest(config: RunConfig) -> str:
    """Of all that a result depends on besides cell and seed."""
    model = replace(config.model, name=base_name(config))
    sections = (model, config.data, config.method, config.train, config.eval)
    told = json.dumps([_plain(section) for section in sections], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Without the folders of files, which differ between machines, and without what is left at its
    default, so that a new setting changes no digest."""
    if is_dataclass(value):
        told = {item.name: getattr(value, item.name) for item in fields(value)}
        defaults = {item.name: item.default for item in fields(value)}
        return {name: _plain(told[name]) for name in told if told[name] != defaults[name]}
    return value.name if isinstance(value, Path) else str(value)


def run_cells(
    config: RunConfig,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    results: Results,
    console: Console,
) -> None:
    """Run what `results` lacks, seed by seed, so that an early end leaves whole seeds."""
    wanted = {(cell.key, seed): cell for seed in seeds for cell in cells}
    todo = [
        (cell, seed) for (_, seed), cell in wanted.items() if not results.find(config, cell, seed)
    ]
    console.print(f"{config.name}: {len(todo)} of {len(wanted)} runs to do")
    started = time.perf_counter()
    for number, (cell, seed) in enumerate(todo, 1):
        result = run_cell(config, cell, seed)
        results.add(result)
        minutes_left = (time.perf_counter() - started) / number * (len(todo) - number) / 60
        console.print(
            f"{config.name} {number}/{len(todo)} ({minutes_left:.0f} min left)  seed {seed}  "
            f"{cell.label}: {result.failure or _shown(result)}",
            soft_wrap=True,
        )
        gc.collect()


def _shown(result: Result) -> str:
    last = {**(result.curve[-1] if result.curve else {}), **result.final}
    return "  ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "epoch")


def run_cell(config: RunConfig, cell: Cell, seed: int) -> Result:
    """Train and measure once, writing nothing. A run that diverges is a result too."""
    settings = digest(config)
    config = of_cell(config, cell, seed)
    task = make_task(config)
    directory = resolve(config.model.name)
    data = load_data(config, task, directory)
    base, config = load_base(config, task, directory)
    total_steps = config.train.max_steps or num_steps(config, len(data.train))
    made = make_trainable(cell.approach, config, task, base, total_steps=total_steps)
    course = _Course()
    trainer = KasaTrainer(
        base.model,
        config,
        task,
        made.layers,
        train=data.train,
        held_out=data.held_out,
        callbacks=[course, *made.callbacks],
        extra_loss=made.extra_loss,
    )
    heads = tuple(f"{name}." for name in task.trained_whole)
    parameters = {k: v for k, v in trainable(base.model).items() if not k.startswith(heads or "\0")}
    started, failure = time.perf_counter(), ""
    if cell.approach is Approach.FULL:
        base.model.float()  # a step is smaller than what bfloat16 can add
    if cell.approach is Approach.NOTHING:
        course.curve.append({"epoch": 0.0, **task.held_out(base.model, data.held_out)})
    else:
        try:
            trainer.train()
        except TrainingError as error:
            failure = str(error)
    seconds = time.perf_counter() - started
    final: Mapping[str, float] = {}
    if data.test and not failure:
        final = task.measure(base.model, data.test).metrics
    return Result(
        run=config.name,
        settings=settings,
        cell=cell.key,
        seed=seed,
        curve=course.curve,
        final=final,
        num_parameters=sum(p.numel() for p in parameters.values()),
        seconds=round(seconds, 2),
        steps=trainer.state.global_step,
        failure=failure,
        **course.summary(),
    )


def of_cell(config: RunConfig, cell: Cell, seed: int) -> RunConfig:
    """The settings of one run."""
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for dotted, value in cell.changes.items():
        section, _, key = dotted.partition(".")
        sections[section][key] = value
    if cell.approach is not Approach.KASA and cell.approach is not Approach.NOTHING:
        sections["method"]["kind"] = AdapterMethod.LORA
    if cell.approach is Approach.FULL:
        rate = sections["train"].get("learning_rate", config.train.learning_rate)
        sections["train"]["learning_rate"] = rate / 10
    sections["train"] |= {"seed": seed, "save_steps": 0, "resume": False, "best_metric": ""}
    changed = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, **changed)


class _Course(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self._logs: list[dict[str, float]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            measured = {k.removeprefix("eval_"): v for k, v in logs.items() if k[:5] == "eval_"}
            self.curve.append({"epoch": state.epoch or 0.0, **measured})
        elif logs and "loss" in logs:
            self._logs.append(logs)

    def summary(self) -> dict[str, float | None]:
        norms = [logs["grad_norm"] for logs in self._logs if "grad_norm" in logs]
        last = self._logs[-1] if self._logs else {}
        return {
            "grad_norm_mean": sum(norms) / len(norms) if norms else None,
            "grad_norm_max": max(norms, default=None),
            "defect_A": last.get("defect_A"),
            "defect_B": last.get("defect_B"),
        }
