"""How each approach makes a model trainable: our own layers, PEFT's, or the model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.experiments.grid import Approach
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.prepare import Base, attach_layers
from kasa_runtime.training.targets import plan
from kasa_runtime.training.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Trainable:
    """What the trainer needs to know of a model that was made trainable."""

    layers: Sequence[KasaLinear] = ()
    callbacks: Sequence[TrainerCallback] = ()
    extra_loss: Callable[[], Tensor] | None = field(default=None)


def make_trainable(
    approach: Approach, config: RunConfig, task: Task, base: Base, *, total_steps: int
) -> Trainable:
    """Change `base.model` in place. Raises ConfigError where PEFT is wanted and missing."""
    if approach in (Approach.KASA, Approach.LORA, Approach.NOTHING):
        return Trainable(list(attach_layers(config, task, base).values()))
    if approach is Approach.FULL:
        base.model.requires_grad_(True)
        return Trainable()
    base.model.requires_grad_(False)
    result = Trainable()
    if approach is not Approach.HEAD:
        result = _inject(approach, config, task, base, total_steps)
    for name in task.trained_whole:
        base.model.get_submodule(name).requires_grad_(True)
    return result


def _inject(
    approach: Approach, config: RunConfig, task: Task, base: Base, total_steps: int
) -> Trainable:
    peft = _peft()
    method = config.method
    paths = [item.path for item in plan(base.model, method, exclude=task.trained_whole)]
    common = {
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": paths,
    }
    if approach is Approach.ADALORA:
        budget = peft.AdaLoraConfig(
            init_r=method.r * 3 // 2,
            target_r=method.r,
            tinit=total_steps // 10,
            tfinal=total_steps * 3 // 10,
            deltaT=max(1, total_steps // 50),
            total_step=total_steps,
            **common,
        )
        tuner = peft.tuners.adalora.AdaLoraModel(base.model, budget, "default")
        return Trainable(
            callbacks=[_Allocation(tuner)],
            extra_loss=lambda: budget.orth_reg_weight * _adalora_defect(base.model),
        )
    forms: dict[Approach, dict[str, Any]] = {
        Approach.DORA: {"use_dora": True},
        Approach.PISSA: {"init_lora_weights": "pissa"},
    }
    settings = peft.LoraConfig(r=method.r, **forms[approach], **common)
    peft.inject_adapter_in_model(settings, base.model)
    return Trainable()


def _adalora_defect(model: nn.Module) -> Tensor:
    """AdaLoRA's own regulariser: the mean of ||P P^T - I|| over its factors (r, n)."""
    defects = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            defects.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
    return torch.stack(defects).mean()


class _Allocation(TrainerCallback):
    """AdaLoRA moves its budget of ranks after each step, while the gradients are there."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *rest: Any, **_: Any
    ) -> None:
        self.tuner.update_and_allocate(state.global_step + 1)


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.adalora
    except ImportError as error:
        raise ConfigError(
            "the baselines of this experiment need PEFT; pip install peft, or leave them out with "
            "--only"
        ) from error
    return peft
