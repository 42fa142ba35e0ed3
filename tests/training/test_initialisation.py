"""First values against their distributions, and the retraction against what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kasa_runtime.adapter.kasa import compute_tail
from kasa_runtime.training.initialisation import (
    DiagInit,
    first_diagonal,
    kaiming_uniform,
    orthonormal_rows,
    retract,
)

MANY = 4000


def drawn(how: DiagInit, r: int = MANY, *, seed: int = 0) -> Tensor:
    return first_diagonal(how, r, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("how", "low", "high", "mean", "std"),
    [
        (DiagInit.NORMAL, -6, 6, 0, 1),
        (DiagInit.ABS_NORMAL, 0, 6, math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)),
        (DiagInit.UNIFORM, 0, 1, 0.5, 1 / math.sqrt(12)),
        (DiagInit.KAIMING, -(MANY**-0.5), MANY**-0.5, 0, (3 * MANY) ** -0.5),
        (DiagInit.XAVIER, -math.sqrt(3 / MANY), math.sqrt(3 / MANY), 0, MANY**-0.5),
        (DiagInit.ONES, 1, 1, 1, 0),
        (DiagInit.ZEROS, 0, 0, 0, 0),
    ],
)
def test_diagonal_follows_its_distribution(
    how: DiagInit, low: float, high: float, mean: float, std: float
) -> None:
    d = drawn(how)
    assert d.shape == (MANY,) and d.dtype is torch.float32
    assert low <= d.min() and d.max() <= high
    assert d.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(MANY) + 1e-9)
    assert d.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    "how", sorted(set(DiagInit) - {DiagInit.ONES, DiagInit.ZEROS, DiagInit.TAIL})
)
def test_diagonal_depends_on_the_seed_alone(how: DiagInit) -> None:
    assert torch.equal(drawn(how), drawn(how))
    assert not torch.equal(drawn(how), drawn(how, seed=1))


def test_diagonal_of_the_tail_has_its_proportions_and_mean_one() -> None:
    weight = torch.diag(torch.tensor([9.0, 8.0, 4.0, 1.0, 1.0]))
    d = first_diagonal(DiagInit.TAIL, 3, torch.Generator(), compute_tail(weight, 3))
    torch.testing.assert_close(d, torch.tensor([2.0, 0.5, 0.5]))


def test_diagonal_of_a_tail_of_zeros_is_ones() -> None:
    tail = compute_tail(torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0])), 2)
    d = first_diagonal(DiagInit.TAIL, 2, torch.Generator(), tail)
    assert torch.equal(d, torch.ones(2))


@pytest.mark.parametrize(("rows", "columns"), [(4, 1000), (1000, 4)])
def test_kaiming_uniform_is_bounded_by_its_inputs(rows: int, columns: int) -> None:
    """torch's own rule for a linear layer, and PEFT's for A."""
    values = kaiming_uniform(rows, columns, torch.Generator().manual_seed(0))
    assert values.shape == (rows, columns)
    bound = columns**-0.5
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


shapes = st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@settings(deadline=None, max_examples=50)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_retracted_rows_are_orthonormal(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(shape, generator=generator)
    assert_orthonormal(retract(factor))
    assert_orthonormal(orthonormal_rows(*shape, generator))


@settings(deadline=None, max_examples=50)
@given(shape=shapes, seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_orthonormal_rows_stay_where_they_are(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    rows = orthonormal_rows(*shape, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(retract(rows), rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(retract(rows * scale), rows, atol=1e-5, rtol=0)


def test_retraction_spans_the_same_rows() -> None:
    factor = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    rows = retract(factor)
    torch.testing.assert_close(factor @ rows.T @ rows, factor)


@pytest.mark.parametrize(
    "factor",
    [
        torch.zeros(3, 7),
        torch.ones(3, 7),
        torch.eye(3, 7)[[0, 0, 1]],
        torch.full((2, 5), 1e-30),
        torch.full((2, 5), 1e18),
    ],
    ids=["zeros", "equal rows", "two equal rows", "tiny", "huge"],
)
def test_retraction_of_dependent_rows_is_orthonormal_too(factor: Tensor) -> None:
    assert_orthonormal(retract(factor))


def assert_orthonormal(rows: Tensor) -> None:
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
