"""The KaSA objective: L = L1 + beta * L2 + gamma * L3 (arXiv 2412.06071, Eq. 9-12).

Legend, per adapted module: A (r, in), d (r,), B (out, r). L1 is the task loss and is the task's.
All of this file is float32, whatever the dtype of the base (float64 where the factors are).

    L2 = sum_j d_j^2                             its singular values, were A and B orthonormal
    L3 = ||B^T B - I||_F + ||A A^T - I||_F       how far A and B are from that

Where the published implementations differ, the forms are options: `OrthoForm`, `RegReduction`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor


class OrthoForm(StrEnum):
    """How A and B are kept near orthonormal rows and columns: the form of L3, or none."""

    GRAM_R = "gram_r"  # Frobenius norm of the (r, r) Gram matrices less I: paper, PEFT
    GRAM_N = "gram_n"  # of A^T A - I_in and B B^T - I_out: the authors' code
    GRAM_R_SQ = "gram_r_sq"  # gram_r, squared
    QR = "qr"  # no L3: made orthonormal again after each step, by QR
    NONE = "none"


class RegReduction(StrEnum):
    """How L2 and L3 of the adapted modules become one number."""

    MEAN = "mean"  # the authors' code; coefficients carry over between model sizes
    SUM = "sum"  # PEFT


class Factors(Protocol):
    """What a trained module shows: `lora_A` (r, in), `lora_B` (out, r), `lora_diag` (r,)."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_diag: torch.nn.Parameter | None


@dataclass(frozen=True, slots=True)
class Defects:
    """||F F^T - I_r||_F^2 of the factors of each module, F = A and F = B^T: (num_modules,) each.
    Zero for orthonormal ones."""

    a: Tensor
    b: Tensor
    a_excess: tuple[int, ...]  # in - r of each module, for the n x n form
    b_excess: tuple[int, ...]  # out - r

    def loss(self, form: OrthoForm, reduction: RegReduction) -> Tensor:
        """L3, a scalar; 0 for a form that has no L3."""
        if form in (OrthoForm.NONE, OrthoForm.QR):
            return self.a.new_zeros(())
        parts = _distance(self.a, self.a_excess, form) + _distance(self.b, self.b_excess, form)
        return _reduce(parts, reduction)


def singular_value_loss(
    modules: Iterable[Factors], reduction: RegReduction = RegReduction.MEAN
) -> Tensor:
    """L2 over those of `modules` that have a diagonal, a scalar. r may differ between modules."""
    diagonals: list[Tensor] = [m.lora_diag for m in modules if m.lora_diag is not None]
    if not diagonals:
        return torch.zeros(())
    values = torch.cat(diagonals)  # (sum of r,)
    total = _wide(values).square().sum()
    return total / len(diagonals) if reduction is RegReduction.MEAN else total


def orthogonality_loss(
    modules: Sequence[Factors],
    form: OrthoForm = OrthoForm.GRAM_R,
    reduction: RegReduction = RegReduction.MEAN,
) -> Tensor:
    """L3 over `modules`, a scalar. r may differ between modules."""
    return defects(modules).loss(form, reduction)


def defects(modules: Sequence[Factors]) -> Defects:
    """How far the factors of each module are from orthonormal; differentiable."""
    left = [module.lora_B.T for module in modules]  # (r, out) each
    right = [module.lora_A for module in modules]  # (r, in) each
    return Defects(_defects(right), _defects(left), _excess(right), _excess(left))


def _defects(factors: Sequence[Tensor]) -> Tensor:
    """||F F^T - I||_F^2 of each F (r, n): (len(factors),). Never an n x n matrix; factors of one
    shape share one batched product."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, factor in enumerate(factors):
        groups[tuple(factor.shape)].append(index)
    order = [index for group in groups.values() for index in group]
    squared = torch.cat([_group_defects([factors[i] for i in g]) for g in groups.values()])
    return squared[torch.tensor(order, device=squared.device).argsort()]


def _group_defects(factors: list[Tensor]) -> Tensor:
    f = _wide(torch.stack(factors))  # (N, r, n)
    gram = f @ f.mT  # (N, r, n) @ (N, n, r) -> (N, r, r)
    return (gram - torch.eye(gram.shape[-1]).to(gram)).square().sum(dim=(1, 2))


def _excess(factors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[1] - f.shape[0] for f in factors)


def _distance(squared: Tensor, excess: Sequence[int], form: OrthoForm) -> Tensor:
    """||F^T F - I_n||_F^2 = ||F F^T - I_r||_F^2 + (n - r) gives the n x n form."""
    if form is OrthoForm.GRAM_R_SQ:
        return squared
    if form is OrthoForm.GRAM_N:
        return torch.sqrt(squared + squared.new_tensor(excess))
    # The norm has a cusp at orthonormality, where a gradient of 0 is as good as any.
    cusp = squared == 0
    return torch.where(cusp, 0.0, torch.sqrt(torch.where(cusp, 1.0, squared)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _reduce(values: Tensor, reduction: RegReduction) -> Tensor:
    return values.mean() if reduction is RegReduction.MEAN else values.sum()
