"""What a run needs before it trains: its rows, its base model, the layers that it will train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from kasa_runtime.adapter.lora import Adapter
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.training.base import load_model, load_tokenizer, tails_of
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.examples import Examples
from kasa_runtime.training.export import load_into
from kasa_runtime.training.layers import KasaLinear, attach
from kasa_runtime.training.rows import Row, read_rows, sample, shuffled
from kasa_runtime.training.start import read_start
from kasa_runtime.training.tasks.base import Task


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
    if held_out:
        task.encode(held_out)
    if test:
        task.check(test)
    return Datasets(train_rows, task.encode(train_rows), held_out, test, len(all_test))


def load_base(config: RunConfig, task: Task, directory: Path) -> tuple[Base, RunConfig]:
    """The base model, and `config` with the shape of the adapter that it goes on from."""
    set_seed(config.train.seed)  # a new head is drawn here
    model = load_model(directory, config.model, task)
    tails = tails_of(directory, model, config.model)
    start = read_start(config.method, tails.base, model, trained_whole=task.trained_whole)
    if start:
        config = replace(config, method=replace(config.method, kind=start.method))
    return Base(directory, model, tails, start), config


def attach_layers(config: RunConfig, task: Task, base: Base) -> dict[str, KasaLinear]:
    """Put the trained layers into the model, and make its new head trainable."""
    layers = attach(
        base.model,
        config.method,
        tails=TailCache(base.tails.base).get,  # of its own: nothing it read outlives this call
        seed=config.train.seed,
        exclude=task.trained_whole,
        start=base.start,
    )
    for name in task.trained_whole:
        base.model.get_submodule(name).requires_grad_(True)
    if base.start:
        load_into(base.model, layers, base.start)
    return layers
