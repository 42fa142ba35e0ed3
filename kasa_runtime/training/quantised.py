"""A base that is held in 4 bits by bitsandbytes: how it is loaded, and the tails of what the codes
stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import ModelSection


def quantisation(settings: ModelSection, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to load onto `device`. Raises ConfigError without
    bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"[model] quantization = {settings.quantization} needs bitsandbytes; pip install "
            "'kasa-runtime[quantized]'"
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantization.value,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype.value),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def make_trainable(model: PreTrainedModel) -> None:
    """Tell transformers that a quantised model gets trained layers, and keep its codes readable.

    On CPUs with AVX512-BF16 bitsandbytes repacks the codes of a layer in place when it is first
    evaluated; neither the tail nor a gradient can be had of them afterwards."""
    model._hf_peft_config_loaded = True  # the Trainer refuses a quantised model without adapters
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


class QuantisedBase(BaseModel):
    """A base whose weights are those of a quantised model in memory: the tail is cut from what the
    model computes with, and kept apart from that of the files, by which adapters know the base."""

    def __init__(self, base: BaseModel, model: nn.Module, settings: ModelSection) -> None:
        super().__init__(base.directory, architecture=base.architecture)
        self.model, self.suffix = model, settings.quantization.value

    @property
    def tails_key(self) -> str:
        return f"{self.fingerprint}-{self.suffix}"

    def weight(self, module: str) -> Tensor:
        return dense_weight(self.model.get_submodule(module))


def dense_weight(linear: nn.Module) -> Tensor:
    """What the codes of a quantised layer stand for, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    parameter: Any = linear.weight
    weight: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
    return weight
