"""The objective as the Trainer computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kasa_runtime.training.config import (
    DataSection,
    MethodSection,
    OutputSection,
    RunConfig,
    Schedule,
    TrainSection,
)
from kasa_runtime.training.data import IGNORED, Collator
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.trainer import num_steps, penalties, task_loss, training_arguments
from kasa_runtime.types import AdapterMethod


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    long = {"input_ids": [5, 6, 7, 8, 9, 0], "labels": [IGNORED] * 3 + [8, 9, 0]}
    short = {"input_ids": [3, 4, 0], "labels": [IGNORED, 4, 0]}
    return Collator(pad_id=0)([long, short])


def test_task_loss_equals_the_loss_of_the_model(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    """Ours feeds only the completion's positions to the output embeddings; theirs feeds all."""
    with torch.no_grad():
        got = task_loss(model, model.lm_head, batch)
        want = model(**batch).loss
    torch.testing.assert_close(got, want)


def test_task_loss_leaves_no_hook_behind(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    task_loss(model, model.lm_head, batch)
    assert model(batch["input_ids"]).logits.shape == (2, 6, 257)


def test_plain_lora_has_no_penalties() -> None:
    layer = KasaLinear(torch.nn.Linear(8, 8), 2, 1.0, tail=None, diag=False, dropout=0.0)
    assert penalties([layer], MethodSection(kind=AdapterMethod.LORA)) == {}


def test_steps_follow_rows_epochs_and_accumulation() -> None:
    settings = TrainSection(epochs=1.5, batch_size=4, accumulation=2, warmup_ratio=0.25)
    config = RunConfig(DataSection(Path("x")), OutputSection(Path("y")), train=settings)
    assert num_steps(config, num_rows=17) == 4  # three steps an epoch, the last one not full
    arguments = training_arguments(config, num_rows=17)
    assert (arguments.max_steps, arguments.warmup_steps) == (4, 1)
    capped = replace(config, train=replace(settings, max_steps=2, schedule=Schedule.CONSTANT))
    assert training_arguments(capped, num_rows=17).max_steps == 2
