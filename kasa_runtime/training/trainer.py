"""transformers' Trainer around the KaSA objective: its loss, its log, its order of rows and its
checkpoints are ours, all else is theirs.

A checkpoint holds what is trained and the optimiser's state, never the frozen base.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from kasa_runtime.errors import TrainingError
from kasa_runtime.training import checkpoints
from kasa_runtime.training.arguments import (
    num_steps,
    rows_per_step,
    steps_per_epoch,
    training_arguments,
)
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.examples import IGNORED, Collator, Examples
from kasa_runtime.training.initialisation import retract
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.loss import OrthoForm, defects, singular_value_loss
from kasa_runtime.training.order import EpochOrder
from kasa_runtime.training.rows import Row
from kasa_runtime.training.selection import Selection, unknown_metric
from kasa_runtime.training.tasks.base import Task

__all__ = ["CHECKPOINT_FILE", "KasaTrainer", "num_steps", "trainable"]

CHECKPOINT_FILE = "trainable.safetensors"


class KasaTrainer(Trainer):
    """Trains whatever parameters of `model` require a gradient, for `task`. `layers` are those that
    L2 and L3 are of; there may be none."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        task: Task,
        layers: Sequence[KasaLinear],
        *,
        train: Examples,
        held_out: Sequence[Row] = (),
        callbacks: Sequence[TrainerCallback] = (),
        extra_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(config, num_examples=len(train), evaluates=bool(held_out)),
            data_collator=Collator(task.pad_id),
            train_dataset=train,
            eval_dataset=Examples([], num_rows=0) if held_out else None,
            callbacks=[*callbacks, *_own_callbacks(config, layers)],
        )
        self.remove_callback(PrinterCallback)
        self.base = model  # `self.model` may become a wrapper
        self.config, self.task, self.method, self.layers = config, task, config.method, layers
        self.held_out_rows = held_out
        self.extra_loss = extra_loss
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what is in all micro-batches
        self._num_micro_batches = 1
        self._terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._num_tokens = 0
        self._since_step = -1  # the log's means are over the steps after it; -1: nothing added yet
        self._since = 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one step, and the number of labelled tokens (or rows) in them on all
        devices: L1 is a mean over these, so that accumulation and devices do not change it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_micro_batches = max(1, len(batches))
        if self._since_step < 0:
            self._since_step, self._since = self.state.global_step, time.perf_counter()
        count = torch.tensor(sum(_num_items(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of L = L1 + beta * L2 + gamma * L3. Raises TrainingError where it
        is not finite."""
        batch = self.task.loss(model, inputs)
        num_items = int(num_items_in_batch) if num_items_in_batch is not None else batch.count
        # Gradients are averaged over devices afterwards, hence the number of devices.
        terms = {"L1": batch.total * (self.accelerator.num_processes / max(1, num_items))}
        share = 1 / self._num_micro_batches
        terms |= {name: value * share for name, value in self._penalties().items()}
        loss = terms["L1"]
        if "L2" in terms:
            loss = loss + self.method.beta * terms["L2"] + self.method.gamma * terms["L3"]
        if self.extra_loss:
            loss = loss + share * self.extra_loss()
        self._check_finite(loss, terms)
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value.detach().cpu()
        self._num_tokens += _num_tokens(inputs)
        return (loss, {}) if return_outputs else loss

    def _penalties(self) -> dict[str, Tensor]:
        """L2 and L3 before their coefficients, and the defects that L3 is of, as means over
        modules; nothing for plain LoRA. A term of coefficient 0 is measured all the same."""
        if not self.layers or not self.method.is_kasa:
            return {}
        measured = defects(self.layers)
        form, reduction = self.method.ortho_form, self.method.reg_reduction
        return {
            "L2": singular_value_loss(self.layers, reduction),
            "L3": measured.loss(form, reduction),
            "defect_A": measured.a.detach().sqrt().mean(),
            "defect_B": measured.b.detach().sqrt().mean(),
        }

    def _check_finite(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        if not math.isfinite(loss.item()):
            shown = ", ".join(f"{name} = {value.item():g}" for name, value in terms.items())
            raise TrainingError(
                f"step {self.state.global_step}: the loss is not finite ({shown}); lower [train] "
                f"learning_rate (now {self.args.learning_rate:g}) or use model.dtype = float32; "
                f"{checkpoints.describe_newest(self.config.work_dir)}"
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """What the task measures on the held-out rows, on every device the same. L1 alone:
        penalties say nothing about them."""
        started = time.perf_counter()
        measured = self.task.held_out(self.base, self.held_out_rows)
        best_metric = self.args.metric_for_best_model
        if best_metric and best_metric not in measured:
            raise unknown_metric(best_metric, list(measured))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self._since += time.perf_counter() - started
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss's terms, and tokens per second, since the last log, and the
        seconds of training so far, of a resumed run all of them."""
        steps = self.state.global_step - self._since_step
        if "loss" in logs and self._terms and steps > 0:
            now = time.perf_counter()
            seconds, self._since = now - self._since, now
            mean = self._over_devices({k: v / steps for k, v in self._terms.items()})
            tokens = self._num_tokens * self.accelerator.num_processes
            logs |= mean | {"tokens_per_s": tokens / seconds, "train_s": self.train_s + seconds}
            self._terms.clear()
            self._num_tokens, self._since_step = 0, self.state.global_step
        super().log(logs, start_time)

    @property
    def train_s(self) -> float:
        """Seconds of training up to the last log, measurements left out."""
        history = reversed(self.state.log_history)
        return next((float(logs["train_s"]) for logs in history if "train_s" in logs), 0.0)

    def _over_devices(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        values = torch.stack(list(terms.values())).to(self.args.device)[None]
        means = self.accelerator.gather(values).mean(dim=0).tolist()
        return dict(zip(terms, means, strict=True))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        assert isinstance(self.train_dataset, Examples)
        per_epoch = steps_per_epoch(self.config, len(self.train_dataset))
        return EpochOrder(
            self.train_dataset,
            group=rows_per_step(self.config),
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // per_epoch,
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Theirs, then marked as whole. Raises TrainingError where the disk is full."""
        work_dir, step = self.config.work_dir, self.state.global_step
        directory = checkpoints.directory_of(work_dir, step)
        with checkpoints.writing(directory, is_main=self.args.should_save):
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.mark_complete(directory)
        if self.args.should_save:
            keep = self.config.train.keep_checkpoints
            checkpoints.rotate(work_dir, keep, self.state.best_global_step)

    def keep_best(self) -> int:
        """After `train`: give the model the weights of the best checkpoint, where the run has a
        `best_metric`. Returns the step whose weights it now has."""
        best = self.state.best_global_step
        if not self.args.metric_for_best_model or not best or best == self.state.global_step:
            return self.state.global_step
        self._load_from_checkpoint(str(checkpoints.directory_of(self.config.work_dir, best)))
        return best

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        parameters = trainable(self.base)
        if bad := [name for name, value in parameters.items() if not value.isfinite().all()]:
            raise TrainingError(
                f"step {self.state.global_step}: {bad[0]} is not finite, so this step is not "
                f"saved; lower [train] learning_rate (now {self.args.learning_rate:g}); "
                f"{checkpoints.describe_newest(self.config.work_dir)}"
            )
        directory = Path(output_dir or self.args.output_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        save_file(parameters, directory / CHECKPOINT_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint) / CHECKPOINT_FILE
        if not path.is_file():
            raise TrainingError(f"{path}: want a checkpoint of this command, found none")
        try:
            saved, current = load_file(path), trainable(self.base)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path}: cannot be read ({error})") from error
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in current.items()}:
            raise TrainingError(
                f"{path}: made with other [method] settings; remove it or set train.resume=false"
            )
        for name, parameter in current.items():
            parameter.copy_(saved[name])


class _Retraction(TrainerCallback):
    """`ortho_form = qr`: A's rows and B's columns are orthonormal again after each step."""

    def __init__(self, layers: Sequence[KasaLinear]) -> None:
        self.layers = layers

    @torch.no_grad()
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for layer in self.layers:
            layer.lora_A.copy_(retract(layer.lora_A))
            layer.lora_B.copy_(retract(layer.lora_B.T).T)


def _own_callbacks(config: RunConfig, layers: Sequence[KasaLinear]) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    if config.method.is_kasa and config.method.ortho_form is OrthoForm.QR and layers:
        found.append(_Retraction(layers))
    if config.train.best_metric:
        found.append(Selection(config.train.best_metric, config.train.patience))
    return found


def _num_items(batch: Mapping[str, Tensor]) -> int:
    labels = batch["labels"]
    return int((labels[:, 1:] != IGNORED).sum()) if labels.ndim == 2 else len(labels)


def _num_tokens(inputs: Mapping[str, Tensor]) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, detached, sharing memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
