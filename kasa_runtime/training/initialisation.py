"""Where training starts: the first values of A, d and B.

Legend: A (r, in), d (r,), B (out, r), all float32. The update s * B diag(d) A is zero at the start,
by B = 0, or by d = 0 with a random B. All draws are made on the CPU from one generator, so a seed
gives the same start on every device.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from kasa_runtime.adapter.kasa import Tail


class DiagInit(StrEnum):
    """The first values of d, the learnable singular values."""

    NORMAL = "normal"  # N(0, 1): paper, authors' code and PEFT
    ONES = "ones"
    ABS_NORMAL = "abs_normal"  # |N(0, 1)|
    UNIFORM = "uniform"  # U(0, 1)
    ZEROS = "zeros"  # with a random B, or nothing would ever have a gradient
    TAIL = "tail"  # the r smallest singular values of the layer, scaled to mean 1
    KAIMING = "kaiming"  # U(-1/sqrt(r), 1/sqrt(r)): A's rule for a matrix with r inputs
    XAVIER = "xavier"  # U(-sqrt(3/r), sqrt(3/r)): Glorot's rule for an (r, r) matrix


def kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) of U(-1/sqrt(columns), 1/sqrt(columns)): torch's rule for a linear layer."""
    bound = 1.0 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound


def orthonormal_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns), rows <= columns, with orthonormal rows, uniformly distributed."""
    return retract(torch.randn(rows, columns, generator=generator))


def retract(factor: Tensor) -> Tensor:
    """The orthonormal rows of the QR factorisation of `factor` (r, n), with the signs that keep
    them where they were: what is orthonormal already does not change."""
    q, upper = torch.linalg.qr(factor.T)  # (n, r), (r, r)
    signs = torch.where(torch.diagonal(upper) < 0, -1.0, 1.0).to(q)
    rows: Tensor = (q * signs).T
    return rows


def first_diagonal(
    how: DiagInit, r: int, generator: torch.Generator, tail: Tail | None = None
) -> Tensor:
    """d (r,). `tail` (rank r) is what `DiagInit.TAIL` takes its values of."""
    if how is DiagInit.NORMAL:
        return torch.randn(r, generator=generator)
    if how is DiagInit.ABS_NORMAL:
        return torch.randn(r, generator=generator).abs()
    if how is DiagInit.UNIFORM:
        return torch.rand(r, generator=generator)
    if how is DiagInit.KAIMING:
        return (torch.rand(r, generator=generator) * 2 - 1) / math.sqrt(r)
    if how is DiagInit.XAVIER:
        return (torch.rand(r, generator=generator) * 2 - 1) * math.sqrt(3 / r)
    if how is DiagInit.ZEROS:
        return torch.zeros(r)
    if how is DiagInit.ONES or tail is None:
        return torch.ones(r)
    values = tail.singular_values.float()
    mean = values.mean()
    return values / mean if mean > 0 else torch.ones(r)
