"""Our cross-entropy against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kasa_runtime.training import cross_entropy as module
from kasa_runtime.training.cross_entropy import cross_entropy


def random(rows: int, classes: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    logits = (torch.randn(rows, classes) * 3).to(dtype).requires_grad_()
    return logits, torch.randint(0, classes, (rows,))


def test_loss_by_hand() -> None:
    """Softmax of (0, log 3) is (1/4, 3/4)."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([0, 1]))
    (losses[0] + 2 * losses[1]).backward()
    torch.testing.assert_close(losses, torch.tensor([4, 4 / 3]).log())
    want = torch.tensor([[-0.75, 0.75], [0.5, -0.5]])
    torch.testing.assert_close(logits.grad, want)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 40), classes=st.integers(1, 30), chunk=st.integers(1, 200))
def test_loss_and_gradient_equal_torchs_at_any_shape(rows: int, classes: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        logits, targets = random(rows, classes)
        got, weights = cross_entropy(logits, targets), torch.randn(rows)
        (gradient,) = torch.autograd.grad(got, logits, weights)
    want = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logits, weights)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_narrow_logits_are_float32(dtype: torch.dtype) -> None:
    logits, targets = random(50, 300, dtype=dtype)
    got = cross_entropy(logits, targets)
    want = functional.cross_entropy(logits.float(), targets, reduction="none")
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want)
    scale = 1024.0  # as a gradient scaler's
    (gradient,), (expected,) = (torch.autograd.grad(x.sum() * scale, logits) for x in (got, want))
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-6)


def test_small_probabilities_survive_in_float16() -> None:
    logits = torch.tensor([[0.0, -18.0]], dtype=torch.float16, requires_grad=True)
    (cross_entropy(logits, torch.tensor([0])) * 65536).backward()
    assert logits.grad[0, 1].item() == pytest.approx(65536 * math.exp(-18), rel=0.01)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    logits, targets = random(5, 7)
    with torch.inference_mode():
        got = cross_entropy(logits.detach(), targets)
    assert not got.requires_grad
    torch.testing.assert_close(got, functional.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gradient_of_a_mean_equals_torchs(rows: int) -> None:
    """The same factor for every row, which takes a shorter way."""
    logits, targets = random(rows, 7)
    got = cross_entropy(logits, targets).sum() / 3
    want = functional.cross_entropy(logits, targets, reduction="sum") / 3
    (gradient,), (expected,) = (torch.autograd.grad(x, logits) for x in (got, want))
    torch.testing.assert_close(gradient, expected)


def test_logits_are_not_changed() -> None:
    logits, targets = random(5, 7)
    before = logits.detach().clone()
    cross_entropy(logits, targets).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_certain_and_impossible_classes_have_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.tolist() == [0, 2e4]
    assert logits.grad.isfinite().all()
