"""A real run, recorded: what an independent implementation needs to repeat it step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

from kasa_runtime.training import prepare, run
from kasa_runtime.training.reader import load
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.trainer import KasaTrainer

from .making import WriteRows

STEPS, WARMUP = 50, 3
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-2, 0.05, 1.0

RUN = f"""
[model]
name = "tiny"

[data]
train = "train.jsonl"
prompt = "{{q}} ="
completion = " {{a}}"

[method]
%s

[train]
max_steps = {STEPS}
batch_size = 4
learning_rate = {LEARNING_RATE}
weight_decay = {WEIGHT_DECAY}
max_grad_norm = {MAX_GRAD_NORM}
schedule = "linear"
warmup_ratio = {WARMUP / STEPS}
log_steps = 1

[output]
dir = "adapter"
"""


@dataclass
class Start:
    """The first values of one layer, and its settings."""

    a: Tensor
    b: Tensor
    d: Tensor
    scaling: float
    t: int


@dataclass
class Recording:
    """A run of ours: where it started, what it saw, and the loss of every step."""

    model_dir: Path
    starts: dict[str, Start] = field(default_factory=dict)
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    task_losses: list[float] = field(default_factory=list)

    def model(self) -> LlamaForCausalLM:
        """The base model as it lies on disk, in training mode."""
        return LlamaForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32).train()


def record(
    model_dir: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, method: str
) -> Recording:
    """Train with `method`, the lines of `[method]`, through the functions of a run."""
    recording = Recording(model_dir)
    words = ["red", "green", "blue", "black", "white", "grey", "brown"]
    rows = [{"q": q, "a": f"{q[::-1]} {len(q)}"} for q in words]
    path = write_rows("train.jsonl", rows).with_name("run.toml")
    path.write_text(RUN % method, encoding="utf-8")
    config = load(path, [f"model.name={model_dir}"])
    task, quiet = make_task(config), Console(quiet=True)
    data = prepare.load_data(config, task, model_dir)
    base, config = prepare.load_base(config, task, model_dir)
    layers = prepare.attach_layers(config, task, base)
    for name, layer in layers.items():
        a, b, d = (p.detach().clone() for p in (layer.lora_A, layer.lora_B, layer.lora_diag))
        recording.starts[name] = Start(a, b, d, layer.scaling, layer.truncation_rank)

    class Recorder(KasaTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
            recording.batches.append({name: value.clone() for name, value in inputs.items()})
            loss = super().compute_loss(model, inputs, **options)
            recording.totals.append(loss.item())
            return loss

        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log(logs, *args)
            if "L1" in logs:
                recording.task_losses.append(logs["L1"])

    monkeypatch.setattr(run, "KasaTrainer", Recorder)
    run.optimise(config, task, base, data, layers, quiet)
    assert len(recording.totals) == len(recording.task_losses) == STEPS
    return recording


def optimised(
    parameters: list[nn.Parameter], batches: list[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """A plain loop: for each batch a list, into which the caller puts the loss to step by."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for batch in batches:
        losses: list[Tensor] = []
        yield batch, losses
        optimizer.zero_grad()
        losses[0].backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()


def assert_same_curve(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == STEPS
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert difference <= 1e-4, f"the curves are {difference:.1e} apart, relatively"
    assert min(ours[-5:]) < 0.9 * ours[0], "the loss did not fall, so the curve proves little"
