"""A whole training run: base model and data -> baselines -> training -> adapter directory ->
metrics.

`train` is the path to read; each step is a function below it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.errors import ModelError, TrainingError
from kasa_runtime.training.card import Facts, render
from kasa_runtime.training.config import Dtype, RunConfig
from kasa_runtime.training.data import Examples, Row, encode, read_rows, shuffled
from kasa_runtime.training.evaluate import Evaluator, Outcome
from kasa_runtime.training.export import load_into, to_adapter
from kasa_runtime.training.layers import KasaLinear, attach
from kasa_runtime.training.metrics import check_metrics
from kasa_runtime.training.progress import ProgressCallback, counting
from kasa_runtime.training.trainer import KasaTrainer

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}

ZERO_SHOT = "base, zero-shot"
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of a run."""

    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tails: TailCache


@dataclass(frozen=True, slots=True)
class Datasets:
    """The data of a run. `train_rows` are shuffled; `evaluator` is None without a test file."""

    train_rows: list[Row]
    train: Examples
    held_out: Examples | None
    evaluator: Evaluator | None
    num_test_rows: int


def train(config: RunConfig, console: Console) -> Facts:
    """Run `config` and write the adapter to its output directory. Raises KasaError."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    check_metrics(config.eval.metrics)
    set_seed(config.train.seed)
    base = load_base(config)
    data = load_data(config, base.tokenizer)
    console.print(f"data: {data.train.describe()}")
    outcomes = measure_base(config, base, data, console)
    layers = attach(base.model, config.method, tails=base.tails.get, seed=config.train.seed)
    num_parameters = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    console.print(f"training {num_parameters:,} parameters in {len(layers)} layers")
    training = optimise(config, base, data, layers, console)
    write(config, base, layers, training)
    outcomes |= measure_adapter(config, base, data, layers, console)
    facts = _facts(config, data, layers, outcomes, training)
    write(config, base, layers, training, facts)
    _write_results(config, facts, outcomes)
    return facts


def load_base(config: RunConfig) -> Base:
    """Find, fetch if need be, and load the base model."""
    directory = resolve(config.model.name)
    dtype = TORCH_DTYPES[config.model.dtype]
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: cannot be loaded for training ({error})") from error
    return Base(directory, model, tokenizer, TailCache.for_model(directory))


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Datasets:
    """Read and encode all files before anything slow is done with them."""
    data, seed = config.data, config.train.seed
    train_rows = shuffled(read_rows(data.train), seed=seed, limit=data.limit)
    held_out = encode(read_rows(data.eval), data, tokenizer) if data.eval else None
    evaluator, num_test_rows = None, 0
    if data.test and config.eval.metrics:
        rows = read_rows(data.test)
        evaluator = Evaluator(data, config.eval, tokenizer, rows, seed=seed)
        num_test_rows = len(rows)
    return Datasets(
        train_rows, encode(train_rows, data, tokenizer), held_out, evaluator, num_test_rows
    )


def measure_base(
    config: RunConfig, base: Base, data: Datasets, console: Console
) -> dict[str, Outcome]:
    """The baselines, before the model is changed."""
    if data.evaluator is None or not config.eval.baselines:
        return {}
    with counting(console, ZERO_SHOT) as report:
        outcomes = {ZERO_SHOT: data.evaluator.zero_shot(base.model, report)}
    if config.eval.few_shot:
        name = f"base, {config.eval.few_shot}-shot"
        with counting(console, name) as report:
            outcomes[name] = data.evaluator.few_shot(base.model, data.train_rows, report)
    return outcomes


def measure_adapter(
    config: RunConfig,
    base: Base,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    console: Console,
) -> dict[str, Outcome]:
    """The metrics of what was written, not of what was in memory: storing it rounds."""
    load_into(layers, checkpoint.read(config.output.dir, base.tails.base))
    if data.evaluator is None:
        return {}
    with counting(console, ADAPTER) as report:
        return {ADAPTER: data.evaluator.adapter(base.model, report)}


def optimise(
    config: RunConfig,
    base: Base,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    console: Console,
) -> dict[str, Any]:
    """Train `layers`; returns the summary that goes into the sidecar."""
    callback = ProgressCallback(console)
    trainer = KasaTrainer(
        base.model,
        config,
        list(layers.values()),
        train=data.train,
        evaluation=data.held_out,
        pad_id=base.tokenizer.eos_token_id,
        callback=callback,
    )
    started = time.perf_counter()
    with _quiet_end(callback):
        trainer.train(resume_from_checkpoint=_checkpoint(config))
    losses = {name: callback.last[name] for name in ("L1", "L2", "L3") if name in callback.last}
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": len(data.train),
        "tokens": data.train.num_tokens,
        "losses": {name: round(value, 5) for name, value in losses.items()},
        **{
            key: getattr(config.train, key)
            for key in ("seed", "learning_rate", "batch_size", "accumulation", "epochs")
        },
    }


@contextlib.contextmanager
def _quiet_end(callback: ProgressCallback) -> Iterator[None]:
    try:
        yield
    finally:
        callback.stop()


def _checkpoint(config: RunConfig) -> str | None:
    if not config.train.resume:
        return None
    found: str | None = None
    if config.work_dir.is_dir():
        found = get_last_checkpoint(str(config.work_dir))
    if found is None:
        raise TrainingError(
            f"{config.work_dir}: no checkpoint to resume from; set train.save_steps"
        )
    return found


def write(
    config: RunConfig,
    base: Base,
    layers: Mapping[str, KasaLinear],
    training: Mapping[str, Any],
    facts: Facts | None = None,
) -> None:
    """Write the adapter directory; with `facts` also its model card."""
    summary = dict(training)
    if facts:
        summary["metrics"] = {way: dict(values) for way, values in facts.metrics.items()}
    adapter = to_adapter(
        config, layers, base_fingerprint=base.tails.base.fingerprint, summary=summary
    )
    readme = render(config, facts) if facts else None
    dtype = TORCH_DTYPES[config.output.dtype]
    checkpoint.write(config.output.dir, adapter, dtype=dtype, readme=readme)


def _facts(
    config: RunConfig,
    data: Datasets,
    layers: Mapping[str, KasaLinear],
    outcomes: Mapping[str, Outcome],
    training: Mapping[str, Any],
) -> Facts:
    example = None
    if data.evaluator and ADAPTER in outcomes:
        prompt = data.evaluator.rows[0].render(config.data.prompt)
        example = (prompt, outcomes[ADAPTER].predictions[0])
    return Facts(
        num_train_rows=len(data.train),
        num_train_tokens=data.train.num_tokens,
        num_too_long=data.train.num_too_long,
        num_test_rows=len(data.evaluator.rows) if data.evaluator else 0,
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
    results = {
        "facts": asdict(facts),
        "predictions": {way: outcome.predictions for way, outcome in outcomes.items()},
    }
    config.work_dir.mkdir(parents=True, exist_ok=True)
    path = config.work_dir / "results.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
