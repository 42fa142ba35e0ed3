"""The KaSA objective: L = L1 + beta * L2 + gamma * L3 (arXiv 2412.06071, Eq. 9-12).

Legend, per adapted module: A (r, in), d (r,), B (out, r). L1 is the task loss and is the trainer's.
All of this file is float32, whatever the dtype of the base.

    L2 = sum_j d_j^2                             its singular values, were A and B orthonormal
    L3 = ||B^T B - I||_F + ||A A^T - I||_F       how far A and B are from that

Two deviations among the published implementations are options: `OrthoForm` and `RegReduction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Protocol

import torch


class OrthoForm(StrEnum):
    """The form of L3."""

    GRAM_R = "gram_r"  # Frobenius norm of the (r, r) Gram matrices: PEFT
    GRAM_N = "gram_n"  # of A^T A - I_in and B B^T - I_out: the authors' code
    GRAM_R_SQ = "gram_r_sq"  # gram_r, squared


class RegReduction(StrEnum):
    """How L2 and L3 of the adapted modules become one number."""

    MEAN = "mean"  # the authors' code; coefficients carry over between model sizes
    SUM = "sum"  # PEFT


class Factors(Protocol):
    """What a trained module shows: `lora_A` (r, in), `lora_B` (out, r), `lora_diag` (r,)."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_diag: torch.nn.Parameter | None


def singular_value_loss(
    modules: Iterable[Factors], reduction: RegReduction = RegReduction.MEAN
) -> torch.Tensor:
    """L2 over `modules`, a scalar. All modules have the same r."""
    diagonals: list[torch.Tensor] = [m.lora_diag for m in modules if m.lora_diag is not None]
    squared = torch.stack(diagonals).float().square()  # (N, r)
    return _reduce(squared.sum(dim=1), reduction)


def orthogonality_loss(
    modules: Sequence[Factors],
    form: OrthoForm = OrthoForm.GRAM_R,
    reduction: RegReduction = RegReduction.MEAN,
) -> torch.Tensor:
    """L3 over `modules`, a scalar. All modules have the same r."""
    left = [module.lora_B.float().T for module in modules]  # (r, out) each
    right = [module.lora_A.float() for module in modules]  # (r, in) each
    return _reduce(_distances(left, form) + _distances(right, form), reduction)


def _distances(factors: Sequence[torch.Tensor], form: OrthoForm) -> torch.Tensor:
    """Per factor F (r, n): the distance of its rows from orthonormal ones. Returns (N,).

    ||F^T F - I_n||_F^2 = ||F F^T - I_r||_F^2 + (n - r), so the n x n form never needs an n x n
    matrix.
    """
    grams = torch.stack([factor @ factor.T for factor in factors])  # (N, r, r)
    r = grams.shape[-1]
    residual = grams - torch.eye(r, device=grams.device)
    if form is OrthoForm.GRAM_R:
        norms: torch.Tensor = torch.linalg.matrix_norm(residual)
        return norms
    squared = residual.square().sum(dim=(1, 2))
    if form is OrthoForm.GRAM_R_SQ:
        return squared
    excess = torch.tensor([factor.shape[1] - r for factor in factors], device=grams.device)
    return torch.sqrt(squared + excess)


def _reduce(values: torch.Tensor, reduction: RegReduction) -> torch.Tensor:
    return values.mean() if reduction is RegReduction.MEAN else values.sum()
