"""The objective as the Trainer computes it: over micro-batches, terms, dtypes and epochs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from kasa_runtime.errors import ConfigError, TrainingError
from kasa_runtime.training import checkpoints
from kasa_runtime.training.arguments import num_steps, training_arguments
from kasa_runtime.training.config import (
    DataSection,
    Dtype,
    OutputSection,
    RunConfig,
    Schedule,
    TrainSection,
)
from kasa_runtime.training.examples import Example, Examples
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.order import EpochOrder
from kasa_runtime.training.prepare import attach_layers, load_base, load_data
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.trainer import KasaTrainer, trainable
from kasa_runtime.types import AdapterMethod

from .making import WriteRows
from .runs import ROWS, make_run, with_train


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> RunConfig:
    """One step over all rows, which differ in length and in labelled tokens."""
    data = write_rows("rows.jsonl", ROWS[:16])
    return make_run(
        tmp_path, model_dir, data, max_steps=1, batch_size=16, schedule=Schedule.CONSTANT,
        max_grad_norm=0.0,
    )  # fmt: skip


def make_trainer(config: RunConfig, **options: Any) -> KasaTrainer:
    task = make_task(config)
    directory = Path(config.model.name)
    data = load_data(config, task, directory)
    base, config = load_base(config, task, directory)
    layers = list(attach_layers(config, task, base).values())
    return KasaTrainer(
        base.model, config, task, layers, train=data.train, held_out=data.held_out, **options
    )


def gradients(config: RunConfig) -> dict[str, Tensor]:
    """Those of the first step, clipping off."""
    found: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()

    make_trainer(config, callbacks=[Keep()]).train()
    return found


@pytest.mark.parametrize("size", [1, 2, 8])
def test_gradients_do_not_depend_on_how_a_step_is_cut_into_micro_batches(
    config: RunConfig, size: int
) -> None:
    """Micro-batches with different numbers of labelled tokens count by their tokens."""
    whole = gradients(config)
    parts = gradients(with_train(config, batch_size=size, accumulation=16 // size))
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(config: RunConfig) -> None:
    plain = gradients(config)
    saving = gradients(with_train(config, gradient_checkpointing=True))
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=0, atol=1e-6)


def test_the_log_holds_the_terms_that_make_the_loss(config: RunConfig) -> None:
    trainer = make_trainer(with_train(config, max_steps=3, batch_size=4, accumulation=2))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    method = config.method
    for entry in logs:
        total = entry["L1"] + method.beta * entry["L2"] + method.gamma * entry["L3"]
        assert entry["loss"] == pytest.approx(total, abs=1e-5)
        assert entry["tokens_per_s"] > 0 and entry["defect_A"] > 0
    # Before the first step B is zero: ||B^T B - I||_F = sqrt(r).
    assert logs[0]["defect_B"] == pytest.approx(math.sqrt(method.r), abs=1e-3)


def test_plain_lora_has_no_penalties(config: RunConfig) -> None:
    config = replace(config, method=replace(config.method, kind=AdapterMethod.LORA))
    trainer = make_trainer(config)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(entry["L1"])
    assert "L2" not in entry and "defect_A" not in entry


def test_an_extra_loss_is_added_once_however_a_step_is_cut(config: RunConfig) -> None:
    losses = []
    for size in (16, 4):
        settings = with_train(config, batch_size=size, accumulation=16 // size)
        trainer = make_trainer(settings, extra_loss=lambda: torch.tensor(7.0))
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses.append(entry["loss"])
        assert entry["loss"] > entry["L1"] + 6.9
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_bfloat16_base_is_trained_in_float32(config: RunConfig) -> None:
    config = replace(config, model=replace(config.model, dtype=Dtype.BFLOAT16))
    trainer = make_trainer(config)
    trainer.train()
    assert {value.dtype for value in trainable(trainer.base).values()} == {torch.float32}
    layer = trainer.layers[0]
    assert layer.weight is not None and layer.weight.dtype is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can train in float16")
def test_float16_without_cuda_is_refused(config: RunConfig) -> None:
    config = replace(config, model=replace(config.model, dtype=Dtype.FLOAT16))
    with pytest.raises(ConfigError, match=r"float16 trains on CUDA only.*bfloat16 or float32"):
        make_trainer(config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16])
def test_half_precision_trains_on_a_gpu(config: RunConfig, dtype: Dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = replace(config, model=replace(config.model, dtype=dtype))
    trainer = make_trainer(with_train(config, max_steps=20, max_grad_norm=1.0))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_retraction_keeps_the_factors_orthonormal(config: RunConfig) -> None:
    method = replace(config.method, ortho_form=OrthoForm.QR, diag_init=DiagInit.ZEROS)
    trainer = make_trainer(with_train(replace(config, method=method), max_steps=3))
    trainer.train()
    for layer in trainer.layers:
        eye = torch.eye(layer.r)
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, eye, rtol=0, atol=1e-5)


def test_parameters_that_are_not_finite_are_not_saved(config: RunConfig) -> None:
    trainer = make_trainer(config)
    with torch.no_grad():
        trainer.layers[0].lora_A[0, 0] = math.nan
    with pytest.raises(TrainingError, match="is not finite, so this step is not saved"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert checkpoints.newest(config.work_dir) is None


def test_steps_follow_rows_epochs_and_accumulation() -> None:
    settings = TrainSection(epochs=1.5, batch_size=4, accumulation=2, warmup_ratio=0.25)
    config = RunConfig(DataSection(Path("x")), OutputSection(Path("y")), train=settings)
    assert num_steps(config, 17) == 4  # three steps an epoch, the last one not full
    arguments = training_arguments(config, num_examples=17)
    assert (arguments.max_steps, arguments.warmup_steps) == (4, 1)
    capped = with_train(config, max_steps=2, schedule=Schedule.CONSTANT)
    assert training_arguments(capped, num_examples=17).max_steps == 2


def lengths(*values: int) -> Examples:
    examples = [Example((1,) * length, (1,) * length) for length in values]
    return Examples(examples, num_rows=len(examples))


def test_an_epoch_holds_every_row_once_the_longest_group_first() -> None:
    examples = lengths(*range(1, 42))
    order = list(EpochOrder(examples, group=4, seed=0, epoch=lambda: 0))
    assert sorted(order) == list(range(41))
    assert order[:4] == [40, 39, 38, 37]
    for start in range(0, 40, 4):  # a group is of like length
        group = order[start : start + 4]
        assert max(group) - min(group) == 3


def test_the_order_follows_the_seed_and_the_epoch_alone() -> None:
    examples = lengths(*[5] * 40)
    epoch = 0
    order = EpochOrder(examples, group=4, seed=1, epoch=lambda: epoch)
    first, again = list(order), list(order)
    epoch = 1
    second = list(order)
    assert first == again and first != second
    other = EpochOrder(examples, group=4, seed=1, epoch=lambda: 1)
    assert second == list(other)


def test_each_epoch_has_its_own_order(config: RunConfig) -> None:
    seen: list[int] = []

    class Watching(Examples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            seen.append(index)
            return super().__getitem__(index)

    trainer = make_trainer(with_train(config, max_steps=8, batch_size=4))
    train = trainer.train_dataset
    assert isinstance(train, Examples)
    trainer.train_dataset = Watching(train.examples, num_rows=train.num_rows)
    trainer.train()
    first, second = seen[:16], seen[16:32]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
