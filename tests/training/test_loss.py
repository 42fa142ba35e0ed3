"""The penalties: pinned by hand, against their formulas written out, and at their odd points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kasa_runtime.training.loss import (
    OrthoForm,
    RegReduction,
    defects,
    orthogonality_loss,
    singular_value_loss,
)

FORMS = (OrthoForm.GRAM_R, OrthoForm.GRAM_N, OrthoForm.GRAM_R_SQ)


@dataclass
class Module:
    """What the penalties see of a layer."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_diag: nn.Parameter | None


def made(
    out_features: int, in_features: int, r: int, *, dtype: torch.dtype = torch.float32
) -> Module:
    """Random factors, from torch's generator."""
    shapes = ((r, in_features), (out_features, r), (r,))
    return Module(*(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes))


def of(a: list[list[float]], b: list[list[float]], d: list[float]) -> Module:
    return Module(*(nn.Parameter(torch.tensor(x)) for x in (a, b, d)))


@pytest.fixture
def modules() -> list[Module]:
    """Of different shapes and ranks; two share a shape, and not next to each other."""
    torch.manual_seed(3)
    return [made(16, 24, 4), made(40, 12, 4), made(16, 24, 4), made(24, 16, 7), made(9, 9, 1)]


def written_out(module: Module, form: OrthoForm) -> Tensor:
    """L3 of one module, with the n x n matrices that the code never builds."""
    a, b = module.lora_A, module.lora_B
    grams = [a.T @ a, b @ b.T] if form is OrthoForm.GRAM_N else [a @ a.T, b.T @ b]
    norms = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
    first, second = (n**2 if form is OrthoForm.GRAM_R_SQ else n for n in norms)
    return first + second


def reduced(values: list[Tensor], reduction: RegReduction) -> Tensor:
    total = torch.stack(values).sum()
    return total / len(values) if reduction is RegReduction.MEAN else total


@pytest.mark.parametrize(
    ("reduction", "want"), [(RegReduction.SUM, 1 + 4 + 9), (RegReduction.MEAN, 14 / 2)]
)
def test_l2_by_hand(reduction: RegReduction, want: float) -> None:
    """The mean is over modules, not over singular values."""
    modules = [of([[0.0], [0.0]], [[0.0, 0.0]], [1.0, -2.0]), of([[0.0]], [[0.0]], [3.0])]
    assert singular_value_loss(modules, reduction).item() == want


@pytest.mark.parametrize(
    ("form", "want"),
    [
        (OrthoForm.GRAM_R, 3 + 1),  # |4 - 1| + |0 - 1|
        (OrthoForm.GRAM_R_SQ, 9 + 1),
        (OrthoForm.GRAM_N, math.sqrt(9 + 2) + math.sqrt(1 + 1)),  # A^T A is 3 x 3, B B^T 2 x 2
        (OrthoForm.QR, 0),
        (OrthoForm.NONE, 0),
    ],
)
def test_l3_by_hand(form: OrthoForm, want: float) -> None:
    """A = (2, 0, 0), so A A^T = 4; B = 0."""
    module = of([[2.0, 0.0, 0.0]], [[0.0], [0.0]], [1.0])
    for reduction in RegReduction:
        assert orthogonality_loss([module], form, reduction).item() == pytest.approx(want)
    assert orthogonality_loss([module] * 3, form, RegReduction.SUM).item() == pytest.approx(
        3 * want
    )
    assert orthogonality_loss([module] * 3, form, RegReduction.MEAN).item() == pytest.approx(want)


@pytest.mark.parametrize("reduction", list(RegReduction))
def test_l2_is_the_sum_of_squared_singular_values(
    modules: list[Module], reduction: RegReduction
) -> None:
    want = reduced([(module.lora_diag**2).sum() for module in modules], reduction)
    torch.testing.assert_close(singular_value_loss(modules, reduction), want)


@pytest.mark.parametrize("reduction", list(RegReduction))
@pytest.mark.parametrize("form", FORMS)
def test_l3_equals_its_formula(
    modules: list[Module], form: OrthoForm, reduction: RegReduction
) -> None:
    want = reduced([written_out(module, form) for module in modules], reduction)
    torch.testing.assert_close(orthogonality_loss(modules, form, reduction), want)


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
def test_l3_and_its_gradient_equal_the_formula_at_any_shapes(
    shapes: list[tuple[int, int]], form: OrthoForm, seed: int
) -> None:
    torch.manual_seed(seed)
    modules = [
        made(out, into, 1 + seed % min(out, into), dtype=torch.float64) for out, into in shapes
    ]
    factors = [p for m in modules for p in (m.lora_A, m.lora_B)]
    want = reduced([written_out(module, form) for module in modules], RegReduction.MEAN)
    got = orthogonality_loss(modules, form)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, factors), torch.autograd.grad(want, factors)
    )


def test_defects_are_in_the_order_of_the_modules(modules: list[Module]) -> None:
    """Although those of one shape are measured together."""
    measured = defects(modules)
    for index, module in enumerate(modules):
        alone = defects([module])
        torch.testing.assert_close(measured.a[index], alone.a[0])
        torch.testing.assert_close(measured.b[index], alone.b[0])


def test_n_x_n_form_is_never_built() -> None:
    """Its matrices would have 10^12 entries."""
    module = made(1_000_000, 1_000_000, 2)
    loss = orthogonality_loss([module], OrthoForm.GRAM_N)
    loss.backward()
    assert loss.isfinite() and module.lora_A.grad.isfinite().all()


def orthonormal_module() -> Module:
    """Exactly so, to the last bit."""
    return Module(nn.Parameter(torch.eye(3, 8)), nn.Parameter(torch.eye(6, 3)), None)


@pytest.mark.parametrize(
    ("form", "floor"),
    [
        (OrthoForm.GRAM_R, 0),
        (OrthoForm.GRAM_R_SQ, 0),
        (OrthoForm.GRAM_N, math.sqrt(8 - 3) + math.sqrt(6 - 3)),
    ],
)
def test_orthonormal_factors_have_the_least_loss_and_no_gradient(
    form: OrthoForm, floor: float
) -> None:
    """`gram_r` has a cusp there; any other way to write it gives NaN."""
    module = orthonormal_module()
    loss = orthogonality_loss([module], form)
    loss.backward()
    assert loss.item() == pytest.approx(floor)
    assert not module.lora_A.grad.any() and not module.lora_B.grad.any()


def test_cusp_of_one_module_leaves_the_gradient_of_another() -> None:
    module, other = orthonormal_module(), made(6, 8, 3)
    orthogonality_loss([module, other]).backward()
    assert not module.lora_A.grad.any()
    assert other.lora_A.grad.abs().sum() > 0 and other.lora_A.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_l3_gives_no_gradient_to_a_zero_factor(form: OrthoForm) -> None:
    """At the start B = 0: only the task can move it, and the norm must not make it NaN."""
    module = made(16, 24, 4)
    nn.init.zeros_(module.lora_B)
    orthogonality_loss([module], form).backward()
    assert torch.equal(module.lora_B.grad, torch.zeros_like(module.lora_B))
    assert module.lora_A.grad.abs().sum() > 0


def test_gradient_of_the_n_x_n_form_is_that_of_the_small_one_but_smaller() -> None:
    """By p / sqrt(p^2 + n - r), p the norm of the small form."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 30, dtype=torch.float64) / 10)
    zero = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    small, large = (
        torch.autograd.grad(orthogonality_loss([Module(a, zero, None)], form), a)[0]
        for form in (OrthoForm.GRAM_R, OrthoForm.GRAM_N)
    )
    p = torch.linalg.norm(a @ a.T - torch.eye(4).double())
    torch.testing.assert_close(large, small * p / torch.sqrt(p**2 + 30 - 4))


def test_modules_without_a_diagonal_count_in_no_mean_of_l2() -> None:
    with_diagonal = of([[0.0]], [[0.0]], [3.0])
    assert singular_value_loss([orthonormal_module(), with_diagonal]).item() == 9
    assert singular_value_loss([orthonormal_module()]).item() == 0


@pytest.mark.parametrize("form", list(OrthoForm))
def test_penalties_of_bfloat16_factors_are_float32(form: OrthoForm) -> None:
    module = made(16, 24, 4, dtype=torch.bfloat16)
    assert orthogonality_loss([module], form).dtype is torch.float32
    assert singular_value_loss([module]).dtype is torch.float32


@pytest.mark.parametrize("reduction", list(RegReduction))
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_l3(form: OrthoForm, reduction: RegReduction) -> None:
    def loss(*factors: Tensor) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return orthogonality_loss([Module(a, b, None) for a, b in pairs], form, reduction)

    check_gradients(loss, [(3, 7), (5, 3), (2, 4), (4, 2), (3, 7), (5, 3)])


@pytest.mark.parametrize("reduction", list(RegReduction))
def test_gradients_of_l2(reduction: RegReduction) -> None:
    factor = nn.Parameter(torch.zeros(1, 1))

    def loss(*diagonals: Tensor) -> Tensor:
        return singular_value_loss([Module(factor, factor, d) for d in diagonals], reduction)

    check_gradients(loss, [(3,), (1,), (4,)])


def check_gradients(loss: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(loss, inputs)
