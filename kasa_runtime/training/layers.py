"""The layer that training puts in place of a linear one, and how a model gets them.

Legend: W (out, in) the frozen base weight, P Q its tail of rank t, A (r, in), d (r,), B (out, r), s
the scaling.

    y = W_world x + bias + s * B (d * (A dropout(x)))          W_world = W - P Q

Training holds W_world as its own tensor, made once from the pristine weight: the truncation then
costs nothing per token. The base on disk is not touched, and the exported adapter holds no weight
of it; a server subtracts the same tail as factors. A, d and B are float32 and their products have
the base's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kasa_runtime.adapter.kasa import Tail, scaling, truncation_count
from kasa_runtime.errors import ConfigError, TrainingError
from kasa_runtime.training.config import ALL_LINEAR, MethodSection
from kasa_runtime.types import AdapterMethod

TailSource = Callable[[str, int], Tail]
"""The tail of rank t of the module at a path: `TailCache.get`."""


class KasaLinear(nn.Module):
    """A frozen linear layer, truncated, with a trained update. `lora_diag` is None for plain LoRA.

    Takes over the weight of `linear`: it makes the truncated copy in float32, rounds it once to the
    weight's dtype, and keeps no reference to the untruncated one."""

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        scale: float,
        *,
        tail: Tail | None,
        diag: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.r, self.scaling, self.dropout = r, scale, dropout
        self.truncation_rank = tail.rank if tail else 0
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", truncated(linear.weight.detach(), tail), persistent=False)
        self.register_buffer(
            "bias", None if linear.bias is None else linear.bias.detach(), persistent=False
        )
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
        self.lora_diag = nn.Parameter(torch.ones(r, device=device)) if diag else None

    def reset(self, generator: torch.Generator) -> None:
        """A uniform in ±1/sqrt(in), d normal, B zero, as PEFT does: training starts at W_world. The
        draws are made on the CPU, so a seed gives the same start on every device."""
        out_of, into = self.lora_A.shape
        bound = 1.0 / math.sqrt(into)  # kaiming_uniform with a = sqrt(5)
        with torch.no_grad():
            self.lora_A.copy_((torch.rand(out_of, into, generator=generator) * 2 - 1) * bound)
            self.lora_B.zero_()
            if self.lora_diag is not None:
                self.lora_diag.copy_(torch.randn(self.r, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        base = functional.linear(x, self.weight, self.bias)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        # s diag(d) goes into B: r * out products here instead of one per token, and in float32.
        up = self.lora_B * (
            self.scaling if self.lora_diag is None else self.scaling * self.lora_diag
        )
        hidden = functional.linear(x, self.lora_A.to(x.dtype))  # (..., in) -> (..., r)
        return base + functional.linear(hidden, up.to(x.dtype))  # (..., r) -> (..., out)


def truncated(weight: Tensor, tail: Tail | None) -> Tensor:
    """W - P Q in float32, rounded once to the weight's dtype; the weight itself where there is no
    tail."""
    if tail is None or not tail.rank:
        return weight
    p, q = tail.p.to(weight.device), tail.q.to(weight.device)
    return torch.addmm(weight.float(), p, q, alpha=-1.0).to(weight.dtype)  # (out, t) @ (t, in)


def attach(
    model: nn.Module, method: MethodSection, *, tails: TailSource, seed: int
) -> dict[str, KasaLinear]:
    """Replace the targeted linear layers of `model`, freeze all else, and return the new layers by
    path.

    Raises ConfigError where nothing matches or a rank does not fit, TrainingError for a layer that
    is no nn.Linear."""
    kasa = method.kind is AdapterMethod.KASA
    generator = torch.Generator().manual_seed(seed)
    scale = scaling(method.alpha, method.r, method.use_rslora)
    model.requires_grad_(False)
    layers = {}
    for path in select(model, method.target_modules):
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise TrainingError(f"{path}: want a linear layer, found {type(linear).__name__}")
        _check_rank(path, linear, max(method.r, method.t if kasa else 0))
        tail = None
        if kasa:
            shape = linear.out_features, linear.in_features
            tail = tails(path, truncation_count(method.truncation_rule, method.t, *shape))
        layer = KasaLinear(linear, method.r, scale, tail=tail, diag=kasa, dropout=method.dropout)
        layer.reset(generator)
        model.set_submodule(path, layer)
        layers[path] = layer
    return layers


def select(model: nn.Module, target_modules: tuple[str, ...]) -> list[str]:
    """Paths of the layers that `target_modules` names: suffixes of whole path parts, or
    "all-linear", which leaves out the output embeddings. Raises ConfigError for a name that matches
    none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if target_modules == (ALL_LINEAR,):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name in linears if model.get_submodule(name) is not head]
    chosen = set()
    for target in target_modules:
        matches = {name for name in linears if f".{name}".endswith(f".{target}")}
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ConfigError(
                f"[method] target_modules: no linear layer ends in {target!r}; known: {known}"
            )
        chosen |= matches
    return [name for name in linears if name in chosen]


def _check_rank(path: str, linear: nn.Linear, rank: int) -> None:
    smaller = min(linear.out_features, linear.in_features)
    if rank >= smaller:
        raise ConfigError(
            f"[method] r and truncation_rank must be below {smaller}, the smaller side of {path}, "
            f"got {rank}"
        )
