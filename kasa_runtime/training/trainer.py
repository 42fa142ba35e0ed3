"""transformers' Trainer around the KaSA objective: its loss, its log and its checkpoints are ours,
all else is theirs.

A checkpoint holds what is trained and the optimiser's state, never the frozen base.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kasa_runtime.errors import TrainingError
from kasa_runtime.training.config import MethodSection, RunConfig, Schedule
from kasa_runtime.training.data import IGNORED, Collator, Examples
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.loss import orthogonality_loss, singular_value_loss
from kasa_runtime.types import AdapterMethod

CHECKPOINT_FILE = "trainable.safetensors"

_SCHEDULES = {
    Schedule.COSINE: "cosine",
    Schedule.LINEAR: "linear",
    Schedule.CONSTANT: "constant_with_warmup",
}


class KasaTrainer(Trainer):
    """Trains the `layers` that were attached to `model`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        layers: Sequence[KasaLinear],
        *,
        train: Examples,
        evaluation: Examples | None,
        pad_id: int,
        callback: TrainerCallback,
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(config, num_rows=len(train)),
            data_collator=Collator(pad_id),
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[callback],
        )
        self.remove_callback(PrinterCallback)
        self.base = model  # `self.model` may become a wrapper
        self.head: nn.Module = model.get_output_embeddings()
        self.method = config.method
        self.layers = layers
        self.loss_is_scaled_for_ga = False  # ours is a mean per batch
        self._terms: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """L = L1 + beta * L2 + gamma * L3. Raises TrainingError where it is not finite."""
        terms = {"L1": task_loss(model, self.head, inputs), **penalties(self.layers, self.method)}
        loss = terms["L1"]
        if "L2" in terms:
            loss = loss + self.method.beta * terms["L2"] + self.method.gamma * terms["L3"]
        values = {name: term.item() for name, term in terms.items()}
        self._check_finite({"loss": loss.item(), **values})
        for name, value in values.items():
            self._terms[name] += value
        self._terms["batches"] += 1
        self._terms["tokens"] += int(inputs["attention_mask"].sum())
        return (loss, {}) if return_outputs else loss

    def _check_finite(self, values: dict[str, float]) -> None:
        if any(value != value or abs(value) == float("inf") for value in values.values()):
            shown = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            raise TrainingError(
                f"step {self.state.global_step}: the loss is not finite ({shown}); lower [train] "
                f"learning_rate (now {self.args.learning_rate:g}) or use model.dtype = float32"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """L1 alone: penalties say nothing about held-out rows."""
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            return task_loss(model, self.head, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss's terms, and tokens per second, since the last log."""
        batches = self._terms.pop("batches", 0)
        if "loss" in logs and batches:
            logs["tokens_per_s"] = self._terms.pop("tokens") / (time.perf_counter() - self._since)
            logs |= {name: value / batches for name, value in self._terms.items()}
            self._terms.clear()
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        save_file(trainable(self.base), directory / CHECKPOINT_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint) / CHECKPOINT_FILE
        if not path.is_file():
            raise TrainingError(f"{path}: want a checkpoint of this command, found none")
        saved, current = load_file(path), trainable(self.base)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in current.items()}:
            raise TrainingError(
                f"{path}: made with other [method] settings; remove it or set train.resume=false"
            )
        for name, parameter in current.items():
            parameter.copy_(saved[name])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, detached, sharing memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def task_loss(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """L1: mean cross-entropy over the completion tokens of a batch, in float32.

    Only those positions enter `head`, the output embeddings: with a large vocabulary they cost as
    much as many layers. The hook leaves the model's own forward, with any scaling of its logits, as
    it is."""
    targets = inputs["labels"][:, 1:]
    keep = targets != IGNORED  # (batch, length - 1)
    with head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][keep],)):
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits  # (num completion tokens, vocabulary)
    return functional.cross_entropy(logits.float(), targets[keep])


def penalties(layers: Sequence[KasaLinear], method: MethodSection) -> dict[str, Tensor]:
    """L2 and L3 before their coefficients; nothing for plain LoRA. A term of coefficient 0 is
    measured all the same."""
    if method.kind is AdapterMethod.LORA:
        return {}
    return {
        "L2": singular_value_loss(layers, method.reg_reduction),
        "L3": orthogonality_loss(layers, method.ortho_form, method.reg_reduction),
    }


def training_arguments(config: RunConfig, *, num_rows: int) -> TrainingArguments:
    """Our `[train]` in transformers' terms."""
    train = config.train
    steps = train.max_steps or num_steps(config, num_rows)
    return TrainingArguments(
        output_dir=str(config.work_dir),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=round(steps * train.warmup_ratio),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if train.eval_steps and config.data.eval else "no",
        eval_steps=train.eval_steps or None,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        report_to="none",
    )  # fmt: skip


def num_steps(config: RunConfig, num_rows: int) -> int:
    """Optimiser steps that `epochs` passes over the rows take."""
    per_epoch = -(-num_rows // (config.train.batch_size * config.train.accumulation))
    return max(1, round(config.train.epochs * per_epoch))
