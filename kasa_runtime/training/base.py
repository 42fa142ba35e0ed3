"""The base model of a run: its tokenizer, its weights as the task needs them, its tails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.errors import ConfigError, ModelError
from kasa_runtime.training.config import Dtype, ModelSection, Quantization
from kasa_runtime.training.processes import this_process
from kasa_runtime.training.tasks.base import Task

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: has no tokenizer that can be read ({error})") from error


def load_model(directory: Path, settings: ModelSection, task: Task) -> PreTrainedModel:
    """The base in `settings.dtype`, on this process's device. Raises ModelError, ConfigError."""
    device = this_process().device
    if settings.dtype is Dtype.FLOAT16 and device.type != "cuda":
        raise ConfigError(
            f"[model] dtype = float16 trains on CUDA only, this device is {device.type}; use "
            "bfloat16 or float32"
        )
    quantised = settings.quantization is not Quantization.NONE
    options: dict[str, Any] = {}
    if quantised:
        from kasa_runtime.training.quantised import make_trainable, quantisation

        options = quantisation(settings, device)
    try:
        model = task.load_model(directory, TORCH_DTYPES[settings.dtype], **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory}: cannot be loaded for training ({error})") from error
    if quantised:
        make_trainable(model)
    else:
        model.to(device)
    return model


def tails_of(directory: Path, model: PreTrainedModel, settings: ModelSection) -> TailCache:
    """The tails of the weights that `model` holds: of the files, or of what quantisation made of
    them."""
    base = BaseModel(directory, architecture=type(model).__name__)
    if settings.quantization is not Quantization.NONE:
        from kasa_runtime.training.quantised import QuantisedBase

        base = QuantisedBase(base, model, settings)
    return TailCache(base)
