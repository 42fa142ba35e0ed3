"""The layer that training puts in place of a linear one, and how a model gets them.

Legend: W (out, in) the frozen base weight, P Q its tail of rank t, A (r, in), d (r,), B (out, r), s
the scaling.

    y = W_world x + bias + s * B (d * (A dropout(x)))          W_world = W - P Q

Training holds W_world as its own tensor, made once from the pristine weight, and drops W and the
tail: the truncation then costs neither time per token nor memory. The base on disk is not touched,
and the exported adapter holds no weight of it; a server subtracts the same tail as factors. A, d
and B are float32 and their products have the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.training.config import MethodSection
from kasa_runtime.training.initialisation import (
    DiagInit,
    first_diagonal,
    kaiming_uniform,
    orthonormal_rows,
)
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.targets import is_quantised, layer_shape, plan

TailSource = Callable[[str, int], Tail]
"""The tail of rank t of the module at a path: `TailCache.get`."""


class KasaLinear(nn.Module):
    """A frozen linear layer, truncated, with a trained update. `lora_diag` is None for plain LoRA.

    Takes over the weight of `linear` (an nn.Linear, transformers' Conv1D, or a quantised linear
    layer): it makes the truncated copy in float32, rounds it once to the weight's dtype, and keeps
    no reference to the untruncated one. A quantised layer stays as it is, beside its tail."""

    weight: Tensor | None  # W_world (out, in); None beside a quantised layer
    bias: Tensor | None
    tail_p: Tensor | None  # P (out, t) and Q (t, in), beside a quantised layer only
    tail_q: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        r: int,
        scale: float,
        *,
        tail: Tail | None = None,
        diag: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.r, self.scaling, self.dropout = r, scale, dropout
        self.truncation_rank = tail.rank if tail else 0
        self.out_features, self.in_features = layer_shape(linear)
        device, quantised = next(linear.parameters()).device, is_quantised(linear)
        self.quantised = linear if quantised else None
        weight, bias, p, q = None, None, None, None
        if not quantised:
            weight, bias = _world(linear, tail), _bias(linear)
        elif tail and tail.rank:
            p, q = tail.p.to(device), tail.q.to(device)
        for name, frozen in {"weight": weight, "bias": bias, "tail_p": p, "tail_q": q}.items():
            self.register_buffer(name, frozen, persistent=False)
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.lora_diag = nn.Parameter(torch.ones(r, device=device)) if diag else None
        self.train(linear.training)

    def reset(
        self,
        generator: torch.Generator,
        *,
        diag_init: DiagInit = DiagInit.NORMAL,
        orthonormal: bool = False,
        tail: Tail | None = None,
    ) -> None:
        """The first values. A uniform in ±1/sqrt(in), d by `diag_init`, B zero, so training starts
        at W_world; where d is zero, B is random like A. `orthonormal`: random A and B have
        orthonormal rows and columns. `tail` (rank r) is for `DiagInit.TAIL`."""
        draw = orthonormal_rows if orthonormal else kaiming_uniform
        with torch.no_grad():
            self.lora_A.copy_(draw(self.r, self.in_features, generator))
            self.lora_B.zero_()
            if self.lora_diag is None:
                return
            self.lora_diag.copy_(first_diagonal(diag_init, self.r, generator, tail))
            if diag_init is DiagInit.ZEROS:
                self.lora_B.copy_(draw(self.r, self.out_features, generator).T)

    def load(self, weights: ModuleWeights) -> None:
        """Take the values of a stored adapter's layer of the same r. Singular values that this
        layer cannot learn go into B."""
        b, d = weights.b, weights.diag
        if self.lora_diag is None and d is not None:
            b = b * d
        with torch.no_grad():
            self.lora_A.copy_(weights.a)
            self.lora_B.copy_(b)
            if self.lora_diag is not None:
                self.lora_diag.copy_(torch.ones(self.r) if d is None else d)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.weight is None:
            return self._beside_quantised(x)
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        dropped = self._dropped(rows) if self.dropout and self.training else None
        down, up = self.lora_A.to(rows.dtype), self._up().to(rows.dtype)
        y: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            rows, dropped, self.weight, self.bias, down, up
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def _beside_quantised(self, x: Tensor) -> Tensor:
        assert self.quantised is not None
        y: Tensor = self.quantised(x)
        down, up = self.lora_A.to(x.dtype), self._up().to(x.dtype)
        y = y + functional.linear(functional.linear(self._dropped(x), down), up)
        if self.tail_p is None or self.tail_q is None:
            return y
        p, q = self.tail_p.to(x.dtype), self.tail_q.to(x.dtype)
        return y - functional.linear(functional.linear(x, q), p)

    def _up(self) -> Tensor:
        """s * B diag(d): r * out products here instead of one per token, and in float32."""
        d = self.scaling if self.lora_diag is None else self.scaling * self.lora_diag
        return self.lora_B * d

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + (z A^T) U^T with z = x or dropout(x), U (out, r) = s B diag(d), W and bias
    frozen.

    Both low-rank products are added in place, that of y here and that of dL/dx in `backward`:
    autograd alone would make tensors of their size and add them in passes of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (tokens, in)
        dropped: Tensor | None,  # z; None: x
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,  # A
        up: Tensor,  # U
    ) -> Tensor:
        z = x if dropped is None else dropped
        hidden = z @ down.T  # (tokens, in) @ (in, r) -> (tokens, r)
        ctx.save_for_backward(z, hidden, weight, down, up)
        ctx.has_dropout = dropped is not None
        y = functional.linear(x, weight, bias)  # (tokens, in) @ (in, out) -> (tokens, out)
        return y.addmm_(hidden, up.T)  # (tokens, r) @ (r, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, hidden, weight, down, up = ctx.saved_tensors
        needs_x, needs_dropped = ctx.needs_input_grad[:2]
        d_hidden = dy @ up  # (tokens, out) @ (out, r) -> (tokens, r)
        dx = dy @ weight if needs_x else None  # (tokens, out) @ (out, in) -> (tokens, in)
        dz = None
        if ctx.has_dropout:
            dz = d_hidden @ down if needs_dropped else None  # (tokens, r) @ (r, in)
        elif dx is not None:
            dx.addmm_(d_hidden, down)
        d_down = d_hidden.T @ z  # (r, tokens) @ (tokens, in)
        d_up = (hidden.T @ dy).T  # ((r, tokens) @ (tokens, out))^T: the long way round is slower
        return dx, dz, None, None, d_down, d_up


def attach(
    model: nn.Module,
    method: MethodSection,
    *,
    tails: TailSource,
    seed: int,
    exclude: Collection[str] = (),
    start: Adapter | None = None,
) -> dict[str, KasaLinear]:
    """Replace the layers of `model` that `plan` names, freeze all else, and return the new layers
    by path. They begin with the values of `start`, or else of `seed`. Raises ConfigError, with the
    model as it was."""
    plans = plan(model, method, exclude=exclude, start=start)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    layers = {}
    for item in plans:
        layer = KasaLinear(
            model.get_submodule(item.path),
            item.r,
            item.scaling,
            tail=tails(item.path, item.t) if item.t else None,
            diag=item.diag,
            dropout=method.dropout,
        )
        if start:
            layer.load(start.modules[item.path])
        else:
            by_tail = item.diag and method.diag_init is DiagInit.TAIL
            layer.reset(
                generator,
                diag_init=method.diag_init,
                orthonormal=method.is_kasa and method.ortho_form is OrthoForm.QR,
                tail=tails(item.path, item.r) if by_tail else None,
            )
        model.set_submodule(item.path, layer)
        layers[item.path] = layer
    return layers


def truncated(weight: Tensor, tail: Tail | None) -> Tensor:
    """W - P Q in float32, rounded once to the weight's dtype; the weight itself where there is no
    tail."""
    if tail is None or not tail.rank:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    wide.addmm_(tail.p.to(wide), tail.q.to(wide), alpha=-1.0)  # (out, t) @ (t, in)
    return wide.to(weight.dtype)


def _world(linear: nn.Module, tail: Tail | None) -> Tensor:
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    if isinstance(linear, Conv1D):
        weight = weight.T.contiguous()  # stored (in, out)
    return truncated(weight, tail)


def _bias(linear: nn.Module) -> Tensor | None:
    bias: Tensor | None = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()
