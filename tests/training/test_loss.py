"""Loss terms against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.loss import (
    OrthoForm,
    RegReduction,
    orthogonality_loss,
    singular_value_loss,
)


@pytest.fixture
def layers() -> list[KasaLinear]:
    torch.manual_seed(3)
    made = []
    for out_features, in_features in ((16, 24), (40, 12), (16, 24)):
        linear = nn.Linear(in_features, out_features)
        layer = KasaLinear(linear, 4, 2.0, tail=None, diag=True, dropout=0.0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        made.append(layer)
    return made


def reduce(values: list[torch.Tensor], reduction: RegReduction) -> torch.Tensor:
    total = torch.stack(values).sum()
    return total / len(values) if reduction is RegReduction.MEAN else total


@pytest.mark.parametrize("reduction", list(RegReduction))
def test_l2_is_the_sum_of_squared_singular_values(
    layers: list[KasaLinear], reduction: RegReduction
) -> None:
    want = reduce([(layer.lora_diag**2).sum() for layer in layers], reduction)
    torch.testing.assert_close(singular_value_loss(layers, reduction), want)


@pytest.mark.parametrize("reduction", list(RegReduction))
@pytest.mark.parametrize("form", list(OrthoForm))
def test_l3_equals_its_formula(
    layers: list[KasaLinear], form: OrthoForm, reduction: RegReduction
) -> None:
    """gram_n is compared with the n x n matrices, which the code never builds."""
    values = []
    for layer in layers:
        a, b = layer.lora_A, layer.lora_B
        grams = [a.T @ a, b @ b.T] if form is OrthoForm.GRAM_N else [a @ a.T, b.T @ b]
        norms = [torch.linalg.norm(gram - torch.eye(len(gram))) for gram in grams]
        values.append(sum(n**2 if form is OrthoForm.GRAM_R_SQ else n for n in norms))
    torch.testing.assert_close(
        orthogonality_loss(layers, form, reduction), reduce(values, reduction)
    )


def test_l3_of_orthonormal_factors_is_zero_or_the_floor_of_its_form(
    layers: list[KasaLinear],
) -> None:
    layer = layers[0]
    nn.init.orthogonal_(layer.lora_A)
    nn.init.orthogonal_(layer.lora_B)
    floor = (24 - 4) ** 0.5 + (16 - 4) ** 0.5
    assert orthogonality_loss([layer], OrthoForm.GRAM_R).item() == pytest.approx(0, abs=1e-5)
    assert orthogonality_loss([layer], OrthoForm.GRAM_N).item() == pytest.approx(floor)


def test_l3_gives_no_gradient_to_a_zero_factor(layers: list[KasaLinear]) -> None:
    """At the start B = 0: only the task can move it, and the norm must not make it NaN."""
    layer = layers[0]
    nn.init.zeros_(layer.lora_B)
    orthogonality_loss([layer]).backward()
    assert torch.equal(layer.lora_B.grad, torch.zeros_like(layer.lora_B))
    assert layer.lora_A.grad.abs().sum() > 0
