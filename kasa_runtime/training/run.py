"""A whole training run: data and base model -> baselines -> training -> adapter directory ->
metrics.

`train` is the path to read; each step is a function below it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel, set_seed

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import Adapter
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.errors import AdapterError, ConfigError
from kasa_runtime.training import checkpoints
from kasa_runtime.training.base import TORCH_DTYPES, load_model, load_tokenizer, tails_of
from kasa_runtime.training.card import Facts, render
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.examples import Examples
from kasa_runtime.training.export import load_into, to_adapter
from kasa_runtime.training.journal import Journal
from kasa_runtime.training.layers import KasaLinear, attach
from kasa_runtime.training.progress import ProgressCallback, counting
from kasa_runtime.training.report import write_report
from kasa_runtime.training.rows import Row, read_rows, sample, shuffled
from kasa_runtime.training.targets import plan
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.tasks.base import Outcome, Task
from kasa_runtime.training.trainer import KasaTrainer, trainable

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Datasets:
    """The rows of a run, all of them readable. `train_rows` are shuffled; `test` is a sample of
    `num_test_rows` rows."""

    train_rows: list[Row]
    train: Examples
    held_out: list[Row]
    test: list[Row]
    num_test_rows: int


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of a run. `start` is the adapter that the run goes on from."""

    directory: Path
    model: PreTrainedModel
    tails: TailCache
    start: Adapter | None


def train(config: RunConfig, console: Console) -> Facts:
    """Run `config` and write the adapter to its output directory. Raises KasaError."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if not PartialState().is_main_process:
        console = Console(quiet=True)
    task = make_task(config)
    directory = resolve(config.model.name)
    data = load_data(config, task, directory)
    console.print(f"data: {data.train.describe()}")
    base, config = load_base(config, task, directory)
    plan(base.model, config.method, exclude=task.trained_whole, start=base.start)
    outcomes = measure_base(task, base, data, console)
    layers = attach_layers(config, task, base)
    num_parameters = sum(p.numel() for p in trainable(base.model).values())
    console.print(f"training {num_parameters:,} parameters in {len(layers)} layers")
    training = optimise(config, task, base, data, layers, console)
    write(config, task, base, layers, training)
    outcomes |= measure_adapter(config, task, base, data, layers, console)
    facts = _facts(task, data, layers, outcomes, training)
    write(config, task, base, layers, training, facts)
    _write_results(config, facts, outcomes)
    return facts


def load_data(config: RunConfig, task: Task, directory: Path) -> Datasets:
    """Read and encode all rows before anything slow is done with them."""
    data, seed = config.data, config.train.seed
    sources = {"train": data.train, "eval": data.eval, "test": data.test}
    rows = {name: read_rows(s, data.columns) for name, s in sources.items() if s}
    train_rows = shuffled(rows["train"], seed=seed, limit=data.limit)
    task.prepare(load_tokenizer(directory), rows["train"])
    held_out = rows.get("eval", [])
    all_test = rows.get("test", []) if config.eval.metrics else []
    test = sample(all_test, config.eval.rows, seed=seed)
    for checked in (held_out, test):
        if checked:
            task.encode(checked)
    return Datasets(train_rows, task.encode(train_rows), held_out, test, len(all_test))


def load_base(config: RunConfig, task: Task, directory: Path) -> tuple[Base, RunConfig]:
    """The base model, and `config` with the shape of the adapter that it goes on from."""
    set_seed(config.train.seed)  # a new head is drawn here
    model = load_model(directory, config.model, task)
    tails = tails_of(directory, model, config.model)
    start = None
    if config.method.init_from:
        try:
            start = checkpoint.read(config.method.init_from, tails.base)
        except AdapterError as error:
            raise ConfigError(f"[method] init_from: {config.method.init_from}: {error}") from error
        config = replace(config, method=replace(config.method, kind=start.method))
    return Base(directory, model, tails, start), config


def attach_layers(config: RunConfig, task: Task, base: Base) -> dict[str, KasaLinear]:
    """Put the trained layers into the model, and make its new head trainable."""
    layers = attach(
        base.model,
        config.method,
        tails=base.tails.get,
        seed=config.train.seed,
        exclude=task.trained_whole,
        start=base.start,
    )
    for name in task.trained_whole:
        base.model.get_submodule(name).requires_grad_(True)
    if base.start:
        load_into(base.model, layers, base.start)
    return layers


def measure_base(task: Task, base: Base, data: Datasets, console: Console) -> dict[str, Outcome]:
    """The baselines, before the model is changed."""
    if not data.test or not task.config.eval.baselines:
        return {}
    return task.measure_base(
        base.model, data.test, data.train_rows, lambda name: counting(console, name)
    )


def measure_adapter(
    config: RunConfig,
    task: Task,
    base: Base,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    console: Console,
) -> dict[str, Outcome]:
    """The metrics of what was written, not of what was in memory: storing it rounds."""
    PartialState().wait_for_everyone()
    load_into(base.model, layers, checkpoint.read(config.output.dir, base.tails.base))
    if not data.test:
        return {}
    with counting(console, ADAPTER) as report:
        return {ADAPTER: task.measure(base.model, data.test, report)}


def optimise(
    config: RunConfig,
    task: Task,
    base: Base,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    console: Console,
) -> dict[str, Any]:
    """Train `layers`; returns the summary that goes into the sidecar."""
    progress, journal = ProgressCallback(console), Journal(config.work_dir, layers)
    trainer = KasaTrainer(
        base.model,
        config,
        task,
        list(layers.values()),
        train=data.train,
        held_out=data.held_out,
        callbacks=[progress, journal],
    )
    started = time.perf_counter()
    with _stopping(progress):
        trainer.train(resume_from_checkpoint=_checkpoint(config, console))
    if trainer.state.is_world_process_zero:
        write_report(config.work_dir, title=config.name)
    losses = {name: progress.last[name] for name in ("L1", "L2", "L3") if name in progress.last}
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": data.train.num_rows,
        "tokens": data.train.num_tokens,
        "losses": {name: round(value, 5) for name, value in losses.items()},
        **{
            key: getattr(config.train, key)
            for key in ("seed", "learning_rate", "batch_size", "accumulation", "epochs")
        },
    }


@contextlib.contextmanager
def _stopping(progress: ProgressCallback) -> Iterator[None]:
    try:
        yield
    finally:
        progress.stop()


def _checkpoint(config: RunConfig, console: Console) -> str | None:
    """The newest whole checkpoint where one is wanted."""
    if not config.train.resume:
        return None
    found = checkpoints.newest(config.work_dir)
    if found is None:
        console.print(f"{config.work_dir}: no checkpoint yet, starting at the first step")
        return None
    return str(found)


def write(
    config: RunConfig,
    task: Task,
    base: Base,
    layers: Mapping[str, KasaLinear],
    training: Mapping[str, Any],
    facts: Facts | None = None,
) -> None:
    """Write the adapter directory; with `facts` also its model card."""
    if not PartialState().is_main_process:
        return
    summary = dict(training)
    if facts:
        summary["metrics"] = {way: dict(values) for way, values in facts.metrics.items()}
    adapter = to_adapter(
        config,
        layers,
        base_fingerprint=BaseModel(base.directory).fingerprint,
        summary=summary,
        task_type=task.task_type,
        saved=saved_whole(base.model, task.trained_whole),
        start=base.start,
    )
    readme = render(config, facts) if facts else None
    dtype = TORCH_DTYPES[config.output.dtype]
    checkpoint.write(config.output.dir, adapter, dtype=dtype, readme=readme)


def saved_whole(model: PreTrainedModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of the modules `names`, by their names in the model."""
    return {
        f"{name}.{key}": tensor.detach().cpu()
        for name in names
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def _facts(
    task: Task,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    outcomes: Mapping[str, Outcome],
    training: Mapping[str, Any],
) -> Facts:
    example = None
    if ADAPTER in outcomes and outcomes[ADAPTER].predictions:
        example = (task.question(data.test[0]), outcomes[ADAPTER].predictions[0])
    return Facts(
        num_train_rows=data.train.num_rows,
        num_train_tokens=data.train.num_tokens,
        num_too_long=data.train.num_too_long,
        num_test_rows=len(data.test),
        num_all_test_rows=data.num_test_rows,
        num_steps=training["steps"],
        train_seconds=training["seconds"],
        num_parameters=sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        num_modules=len(layers),
        final_losses=training["losses"],
        metrics={way: outcome.metrics for way, outcome in outcomes.items()},
        example=example,
    )


def _write_results(config: RunConfig, facts: Facts, outcomes: Mapping[str, Outcome]) -> None:
    """Everything that was measured, with all predictions, for a look at what went wrong."""
    if not PartialState().is_main_process:
        return
    results = {
        "facts": asdict(facts),
        "predictions": {way: list(outcome.predictions) for way, outcome in outcomes.items()},
    }
    config.work_dir.mkdir(parents=True, exist_ok=True)
    path = config.work_dir / "results.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
