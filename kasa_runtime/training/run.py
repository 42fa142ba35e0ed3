"""A whole training run: data and base model -> baselines -> training -> adapter directory ->
metrics.

`train` is the path to read; each step is a function below it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    is_tensorboard_available,
)

from kasa_runtime.adapter import checkpoint
from kasa_runtime.base_model.source import resolve
from kasa_runtime.errors import ConfigError, TrainingError
from kasa_runtime.training import workdir
from kasa_runtime.training.base import TORCH_DTYPES
from kasa_runtime.training.card import render, summary
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.export import load_into, to_adapter
from kasa_runtime.training.facts import Facts
from kasa_runtime.training.journal import Journal
from kasa_runtime.training.labels import Labels
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.prepare import Base, Datasets, attach_layers, load_base, load_data
from kasa_runtime.training.processes import this_process
from kasa_runtime.training.progress import ProgressCallback, counting
from kasa_runtime.training.reader import conflicts
from kasa_runtime.training.report import write_report
from kasa_runtime.training.targets import plan
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.tasks.base import Outcome, Task
from kasa_runtime.training.trainer import KasaTrainer, trainable

ADAPTER = "adapter"


def train(config: RunConfig, console: Console) -> Facts:
    """Run `config` and write the adapter to its output directory. Raises KasaError."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if not this_process().is_main_process:
        console = Console(quiet=True)
    for conflict in conflicts(config):  # of a configuration that no reader checked
        raise ConfigError(conflict)
    workdir.starting_point(config)  # fails here rather than after the baselines
    task = make_task(config)
    directory = resolve(config.model.name)
    data = load_data(config, task, directory)
    console.print(f"data: {data.train.describe()}")
    base, config = load_base(config, task, directory)
    plan(base.model, config.method, exclude=task.trained_whole, start=base.start)
    workdir.require_writable(config.output.dir)
    outcomes = measure_base(task, base, data, console)
    layers = attach_layers(config, task, base)
    num_parameters = sum(p.numel() for p in trainable(base.model).values())
    console.print(f"training {num_parameters:,} parameters in {len(layers)} layers")
    try:
        training = optimise(config, task, base, data, layers, console)
    except TrainingError:
        with contextlib.suppress(TrainingError):  # the disk may be full
            _report(config, {}, console)  # of use above all when something went wrong
        raise
    write(config, task, base, layers, training)
    outcomes |= measure_adapter(config, task, base, data, layers, console)
    facts = _facts(task, base, data, layers, outcomes, training)
    write(config, task, base, layers, training, facts)
    _write_results(config, facts, outcomes)
    _report(config, summary(config, facts), console)
    return facts


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
    this_process().wait_for_everyone()
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
    """Train `layers`; returns the summary that goes into the sidecar. Where there is a
    `best_metric`, the layers have the weights of the best step afterwards."""
    progress = ProgressCallback(console)
    start = workdir.claim(config)
    if config.train.resume:
        console.print(f"going on from {start}" if start else "no checkpoint, starting at step 0")
    trainer = KasaTrainer(
        base.model,
        config,
        task,
        list(layers.values()),
        train=data.train,
        held_out=data.held_out,
        callbacks=[progress, Journal(config.work_dir, layers), *_tensorboard(config)],
    )
    with _stopping(progress):
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    kept = trainer.keep_best()
    if kept != trainer.state.global_step:
        console.print(f"kept step {kept}, the best in {config.train.best_metric}")
    history = trainer.state.log_history
    last = next((logs for logs in reversed(history) if "L1" in logs), {})
    return {
        "steps": trainer.state.global_step,
        "kept_step": kept,
        "seconds": round(trainer.train_s, 1),
        "rows": data.train.num_rows,
        "tokens": data.train.num_tokens,
        "processes": this_process().num_processes,
        "losses": {name: round(last[name], 5) for name in ("L1", "L2", "L3") if name in last},
        **{
            key: getattr(config.train, key)
            for key in ("seed", "learning_rate", "batch_size", "accumulation", "epochs")
        },
    }


@contextlib.contextmanager
def _stopping(progress: ProgressCallback) -> Iterator[None]:
    with warnings.catch_warnings():
        # torch>=2.13 calls it forward_sync_buffers, which transformers<5.20 cannot set
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        try:
            yield
        finally:
            progress.stop()


def _tensorboard(config: RunConfig) -> list[TrainerCallback]:
    """Where it is installed."""
    if not is_tensorboard_available():
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(config.work_dir / "tensorboard")
    return [callback]


def _report(config: RunConfig, facts: Mapping[str, str], console: Console) -> None:
    if not this_process().is_main_process:
        return
    path = write_report(config.work_dir, title=config.output.title or config.name, facts=facts)
    if path:
        console.print(f"report: {path}")
    else:
        console.print("report: left out, matplotlib is missing; pip install 'kasa-runtime[train]'")


def write(
    config: RunConfig,
    task: Task,
    base: Base,
    layers: Mapping[str, KasaLinear],
    training: Mapping[str, Any],
    facts: Facts | None = None,
) -> None:
    """Write the adapter directory; with `facts` also its model card."""
    if not this_process().is_main_process:
        return
    summary = dict(training)
    if facts:
        summary["metrics"] = {way: dict(values) for way, values in facts.metrics.items()}
    adapter = to_adapter(
        config,
        layers,
        base=base.tails.base,
        summary=summary,
        task_type=task.task_type,
        whole=task.trained_whole,
        saved=saved_whole(base.model, task.trained_whole),
        start=base.start,
    )
    readme = render(config, facts) if facts else None
    dtype = TORCH_DTYPES[config.output.dtype]
    try:
        checkpoint.write(config.output.dir, adapter, dtype=dtype, readme=readme)
    except OSError as error:
        raise TrainingError(f"{config.output.dir}: cannot be written ({error})") from error
    workdir.finish(config)


def saved_whole(model: PreTrainedModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of the modules `names`, by their names in the model."""
    return {
        f"{name}.{key}": tensor.detach().cpu()
        for name in names
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def _facts(
    task: Task,
    base: Base,
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
        num_train_sequences=len(data.train),
        num_train_tokens=data.train.num_tokens,
        num_too_long=data.train.num_too_long,
        num_test_rows=len(data.test),
        num_all_test_rows=data.num_test_rows,
        num_steps=training["steps"],
        kept_step=training["kept_step"],
        num_processes=training["processes"],
        train_seconds=training["seconds"],
        num_parameters=sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        num_modules=len(layers),
        trained_whole=tuple(task.trained_whole),
        labels=task_labels(task),
        final_losses=training["losses"],
        metrics={way: outcome.metrics for way, outcome in outcomes.items()},
        example=example,
    )


def task_labels(task: Task) -> tuple[str, ...]:
    """What the answers are called, of a classification."""
    labels = getattr(task, "labels", None)
    return labels.names if isinstance(labels, Labels) else ()


def _write_results(config: RunConfig, facts: Facts, outcomes: Mapping[str, Outcome]) -> None:
    """Everything that was measured, with all predictions, for a look at what went wrong."""
    if not this_process().is_main_process:
        return
    results = {
        "facts": asdict(facts),
        "predictions": {way: list(outcome.predictions) for way, outcome in outcomes.items()},
    }
    path = config.work_dir / "results.json"
    try:
        config.work_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error})") from error
