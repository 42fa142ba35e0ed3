"""Cross-entropy over a large vocabulary in little memory.

Legend: Z (tokens, vocabulary) logits, y (tokens,) the right classes, l (tokens,) the losses.

    l_i = logsumexp_j Z_ij - Z_i,y_i          dl_i/dZ_i = softmax(Z_i) - onehot(y_i)

torch's own holds three float32 matrices of Z's size at once: log-probabilities, their gradient and
Z's. Here the gradient is made together with the losses, some rows at a time while they are in the
processor's cache, and it alone is kept, in the dtype of Z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22
"""Logits that are in float32 at a time."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row: (tokens,) float32. `logits` (tokens, vocabulary)
    of any floating dtype, `targets` (tokens,) int64. One backward pass at most."""
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        # float16 has no room for small probabilities before the loss is scaled up.
        dtype = torch.float32 if logits.dtype is torch.float16 else logits.dtype
        ctx.gradient = torch.empty_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.dtype = logits.dtype
        losses = torch.empty(len(logits), device=logits.device)
        for start in range(0, len(logits), rows := max(1, CHUNK // logits.shape[1])):
            part, target = slice(start, start + rows), targets[start : start + rows, None]
            log_p = torch.log_softmax(logits[part], dim=1, dtype=torch.float32)
            losses[part] = -log_p.gather(1, target)[:, 0]
            if ctx.gradient is not None:
                p = torch.exp(log_p, out=ctx.gradient[part])
                p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "one backward pass at most"
        # The gradient of a sum is one number; times bfloat16, it is four times as fast as many.
        same = len(scale) > 0 and scale.stride() == (0,)
        return gradient.mul_(scale[0] if same else scale[:, None]).to(ctx.dtype), None
