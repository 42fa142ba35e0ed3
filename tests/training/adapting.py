"""What tests of adapted layers share: a source of tails, and layers whose update is not zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kasa_runtime.adapter.kasa import Tail, compute_tail
from kasa_runtime.training.config import MethodSection
from kasa_runtime.training.layers import KasaLinear, TailSource, attach
from kasa_runtime.training.targets import is_linear, layer_shape

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Linear4bit(nn.Module):
    """Stands for bitsandbytes' layer of this name: codes that no arithmetic may touch, and a
    product that only the layer itself knows."""

    def __init__(self, dense: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.shape
        self.weight = nn.Parameter(torch.zeros(dense.numel() // 2, 1).byte(), requires_grad=False)
        self.register_buffer("dense", dense)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense, self.bias)


def dense_weight(linear: nn.Module) -> Tensor:
    """(out, in) of any layer that can be adapted, a copy."""
    if isinstance(linear, Linear4bit):
        return linear.dense.clone()
    weight = linear.weight.detach()
    return weight.clone() if weight.shape == layer_shape(linear) else weight.T.clone()


def tails_of(model: nn.Module) -> TailSource:
    """The tails of the weights that `model` has now."""
    weights = {n: dense_weight(m) for n, m in model.named_modules() if is_linear(m)}

    def get(path: str, t: int) -> Tail:
        return compute_tail(weights[path], t)

    return get


def attached(model: nn.Module, method: MethodSection, *, seed: int = 0) -> dict[str, KasaLinear]:
    return attach(model, method, tails=tails_of(model), seed=seed)


def randomise(layers: dict[str, KasaLinear], *, seed: int = 5) -> None:
    """B starts at zero, with which any error in A, d or s would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
