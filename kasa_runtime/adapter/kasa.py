"""The mathematics of KaSA (arXiv 2412.06071), in one file.

Legend: W (out, in) a frozen base weight; k = min(out, in); r adapter rank; t truncation rank; P
(out, t) and Q (t, in) the tail, P Q = U_t S_t V_t^T; A (r, in), d (r,), B (out, r) the learned
update; s the scaling.

    W' = W - P Q + s * B diag(d) A                                (paper, Eqs. 6-8)

The base is never truncated in place: P Q is a low-rank factor like any other, so W' - W is an exact
LoRA of rank r + t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

NARROW_SPECTRUM = 1e-7
"""Below this s_min / |W|_F the Gram matrix, whose eigenvalues are squares, no longer resolves the
tail in float64."""


class TruncationRule(StrEnum):
    """Which components the training cut off the base. An adapter must be served with the rule it
    was trained with."""

    MIN_DIM = "min_dim"  # keep min(out, in) - t: the paper and PEFT
    IN_FEATURES = (
        "in_features"  # keep in - t: the authors' code, which cuts nothing where out <= in - t
    )
    NONE = "none"  # cut nothing: plain LoRA, or KaSA's update on the whole base


def truncation_count(rule: TruncationRule, t: int, out_features: int, in_features: int) -> int:
    """How many of the smallest components `rule` cuts from an (out, in) weight at truncation rank
    `t`.

    Raises ValueError unless 0 <= t < min(out, in), or always 0 for `none`."""
    if rule is TruncationRule.NONE:
        return 0
    k = _smaller_side(t, out_features, in_features)
    if rule is TruncationRule.MIN_DIM:
        return t
    return max(0, k - (in_features - t))


def scaling(alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


@dataclass(frozen=True)
class Tail:
    """The t smallest singular components of a weight, largest first, so that a smaller t is the
    last columns.

    The factor on the smaller side of W is orthonormal and the other one carries the singular
    values: out <= in: P = U_t, Q = S_t V_t^T; otherwise P = U_t S_t, Q = V_t^T. Nothing is divided
    by a singular value, so zeros are harmless."""

    p: Tensor  # (out, t) float32
    q: Tensor  # (t, in) float32
    singular_values: Tensor  # (t,) float64, descending
    gap: float  # 1 - s_{k-t+1} / s_{k-t}; below 1e-5 the tail is not reproducible

    @property
    def rank(self) -> int:
        return self.q.shape[0]

    def last(self, t: int) -> Tail:
        """The tail of rank `t`, as views. Raises ValueError if this one is shorter."""
        if not 0 <= t <= self.rank:
            raise ValueError(f"want a tail of rank {t}, this one has {self.rank}")
        if t == self.rank:
            return self
        cut = self.rank - t
        s = self.singular_values
        gap = _relative_gap(float(s[cut - 1]), float(s[cut])) if t else 1.0
        return Tail(self.p[:, cut:], self.q[cut:], s[cut:], gap)


def compute_tail(weight: Tensor, t: int) -> Tail:
    """The tail of rank `t` of `weight` (out, in), any floating dtype; exact to float32 rounding.

    By the eigenvectors of the float64 Gram matrix of the smaller side; where the spectrum is too
    wide for its squares, by a full float64 SVD. float32 would lose the smallest components, which
    are the ones that we cut. Raises ValueError unless 0 <= t < min(out, in)."""
    out_features, in_features = weight.shape
    _smaller_side(t, out_features, in_features)
    if t == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        return Tail(torch.zeros(out_features, 0), torch.zeros(0, in_features), empty, 1.0)
    w = weight.detach().to("cpu", torch.float64).numpy()
    small = w if out_features <= in_features else w.T  # (k, n): the smaller side first
    basis, s = _smallest_directions(small, t)  # (k, t), (t + 1,)
    rest = basis.T @ small  # (t, k) @ (k, n) -> (t, n) = S_t times the other side's vectors
    p, q = (basis, rest) if out_features <= in_features else (rest.T, basis.T)
    gap = _relative_gap(float(s[0]), float(s[1]))
    return Tail(_float32(p), _float32(q), torch.from_numpy(s[1:].copy()), gap)


def _smaller_side(t: int, out_features: int, in_features: int) -> int:
    """k = min(out, in). Raises ValueError unless 0 <= t < k."""
    k = min(out_features, in_features)
    if not 0 <= t < k:
        shape = (out_features, in_features)
        raise ValueError(f"truncation rank must be from 0 to {k - 1} for a {shape} weight, got {t}")
    return k


def _smallest_directions(small: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (k, t) of the t smallest singular values, and the t + 1 smallest
    values, descending."""
    import scipy.linalg  # here: a server whose tails are cached does without

    gram = small @ small.T  # (k, k)
    values, vectors = scipy.linalg.eigh(
        gram, subset_by_index=[0, t], driver="evr", check_finite=False
    )
    s_min = math.sqrt(max(float(values[0]), 0.0))
    if s_min > NARROW_SPECTRUM * float(np.linalg.norm(small)):
        return vectors[:, t - 1 :: -1], np.sqrt(values[::-1])
    u, s, _ = scipy.linalg.svd(small, full_matrices=False, check_finite=False)
    return u[:, -t:], s[-t - 1 :]


def _relative_gap(above: float, below: float) -> float:
    return 1.0 - below / above if above > 0 else 1.0


def _float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, tail: Tail) -> Tensor:
    """W - P Q + b a, in float32, rounded once to the weight's dtype.

    `a` (r, in) and `b` (out, r) are folded: b already holds s * diag(d). `weight` is not
    changed."""
    total = weight.to(torch.float32)
    if tail.rank:
        p, q = tail.p.to(weight.device), tail.q.to(weight.device)
        total = torch.addmm(total, p, q, alpha=-1.0)  # (out, t) @ (t, in)
    total = torch.addmm(total, b.to(total), a.to(total))  # (out, r) @ (r, in)
    return total.to(weight.dtype)


def merge_into(weight: Tensor, a: Tensor, b: Tensor, tail: Tail) -> None:
    """`merged_weight`, written over `weight`; in float32 by one product, without another copy."""
    if weight.dtype != torch.float32:
        weight.copy_(merged_weight(weight, a, b, tail))
        return
    left = torch.cat([b.to(weight), -tail.p.to(weight)], dim=1)
    right = torch.cat([a.to(weight), tail.q.to(weight)])
    weight.addmm_(left, right)  # (out, r + t) @ (r + t, in)
