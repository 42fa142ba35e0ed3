"""The layer's own backward pass, against numerical gradients in float64 and against autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.kasa import compute_tail, scaling
from kasa_runtime.training.layers import KasaLinear

from .adapting import Linear4bit, dense_weight


def make_layer(kind: str = "linear", *, r: int = 2, **settings: Any) -> KasaLinear:
    """A float64 layer of 6 inputs and 5 outputs, with random values."""
    torch.manual_seed(0)
    linear: nn.Module = {
        "linear": lambda: nn.Linear(6, 5),
        "no bias": lambda: nn.Linear(6, 5, bias=False),
        "conv1d": lambda: Conv1D(5, 6),
        "4bit": lambda: Linear4bit(torch.randn(5, 6), torch.randn(5)),
    }[kind]()
    scale = scaling(3.0, r, settings.pop("use_rslora", False))
    tail = compute_tail(dense_weight(linear), 2)
    layer = KasaLinear(linear.double(), r, scale, tail=tail, **settings).double()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check(layer: KasaLinear, x: Tensor) -> None:
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout each time
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(forward, (x, *values))


@pytest.mark.parametrize("diag", [True, False])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "4bit"])
def test_gradients_of_the_layer(kind: str, diag: bool) -> None:
    check(make_layer(kind, diag=diag), inputs(2, 3, 6))


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("r", [1, 4])
def test_gradients_at_other_ranks_and_scalings(r: int, use_rslora: bool) -> None:
    check(make_layer(r=r, use_rslora=use_rslora), inputs(3, 6))


@pytest.mark.parametrize("kind", ["linear", "4bit"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_with_dropout(kind: str, training: bool) -> None:
    check(make_layer(kind, dropout=0.4).train(training), inputs(3, 6))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 1, 3, 6), (0, 6)])
def test_gradients_at_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    check(make_layer(), inputs(*shape))


def test_gradients_of_inputs_that_are_not_contiguous() -> None:
    check(make_layer(), inputs(6, 3).T)


def gradients(layer: KasaLinear, y: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return list(torch.autograd.grad((y * weights).sum(), list(layer.parameters())))


def test_backward_equals_that_of_the_formula() -> None:
    layer, x = make_layer(), inputs(4, 6)
    core = layer.lora_B @ torch.diag(layer.lora_diag) @ layer.lora_A
    written_out = x @ (layer.weight + layer.scaling * core).T + layer.bias
    torch.testing.assert_close(gradients(layer, layer(x)), gradients(layer, written_out))


def test_inputs_that_need_no_gradient_get_none() -> None:
    """Those of the first layer: the embeddings are frozen."""
    layer, x = make_layer(), inputs(4, 6)
    wanted = gradients(layer, layer(x))
    torch.testing.assert_close(gradients(layer, layer(x.detach())), wanted)


def test_checkpointed_layer_has_the_same_gradients() -> None:
    layer, x = make_layer(), inputs(4, 6)
    again = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(gradients(layer, again), gradients(layer, layer(x)))


def test_output_may_be_changed_in_place() -> None:
    """Models do, with scaled residuals."""
    layer, x = make_layer(), inputs(4, 6)
    wanted = gradients(layer, layer(x) * 2)
    torch.testing.assert_close(gradients(layer, layer(x).mul_(2)), wanted)


def test_gradients_of_a_bfloat16_base_are_near_those_in_float32() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    wide = KasaLinear(linear, 8, 2.0)
    nn.init.normal_(wide.lora_A, std=0.1)
    nn.init.normal_(wide.lora_B, std=0.1)
    narrow = KasaLinear(linear.bfloat16(), 8, 2.0)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(32, 64)
    for got, want in zip(
        gradients(narrow, narrow(x.bfloat16())), gradients(wide, wide(x)), strict=True
    ):
        assert got.dtype is torch.float32
        assert (got - want).norm() < 0.02 * want.norm()


def test_autocast_gives_the_dtype_of_the_base() -> None:
    layer = make_layer().bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    layer.lora_diag.data = layer.lora_diag.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 6))
    assert y.dtype is torch.bfloat16
    assert all(g.dtype is torch.float32 for g in gradients(layer, y))
