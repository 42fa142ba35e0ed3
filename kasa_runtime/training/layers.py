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

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.config import AdapterConfig
from kasa_runtime.adapter.kasa import Tail, truncation_count
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.errors import AdapterInvalid, ConfigError
from kasa_runtime.training.config import ALL_LINEAR, MethodSection
from kasa_runtime.training.initialisation import (
    DiagInit,
    first_diagonal,
    kaiming_uniform,
    orthonormal_rows,
)
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.types import AdapterMethod

TailSource = Callable[[str, int], Tail]
"""The tail of rank t of the module at a path: `TailCache.get`."""


class KasaLinear(nn.Module):
    """A frozen linear layer, truncated, with a trained update. `lora_diag` is None for plain LoRA.

    Takes over the weight of `linear` (an nn.Linear, transformers' Conv1D, or a quantised linear
    layer): it makes the truncated copy in float32, rounds it once to the weight's dtype, and keeps
    no reference to the untruncated one. A quantised layer stays as it is, beside its tail."""

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
        out_features, in_features = layer_shape(linear)
        device = next(linear.parameters()).device
        quantised = is_quantised(linear)
        self.quantised = linear if quantised else None
        # W_world (out, in) and the bias; or, beside a quantised layer, the tail (out, t), (t, in).
        self.weight = self._frozen_tensor("weight", None if quantised else _world(linear, tail))
        self.bias = self._frozen_tensor("bias", None if quantised else _bias(linear))
        beside = tail if quantised and tail and tail.rank else None
        self.tail_p = self._frozen_tensor("tail_p", beside.p.to(device) if beside else None)
        self.tail_q = self._frozen_tensor("tail_q", beside.q.to(device) if beside else None)
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.lora_diag = nn.Parameter(torch.ones(r, device=device)) if diag else None

    def _frozen_tensor(self, name: str, tensor: Tensor | None) -> Tensor | None:
        self.register_buffer(name, tensor, persistent=False)
        return tensor

    def reset(
        self,
        generator: torch.Generator,
        *,
        diag_init: DiagInit = DiagInit.NORMAL,
        orthonormal: bool = False,
        tail: Tail | None = None,
    ) -> None:
        """The first values. A uniform in ±1/sqrt(in), d by `diag_init`, B zero, so training starts
        at W_world; where d is zero, B is random like A. `orthonormal`: A and B start so instead.
        `tail` (rank r) is for `DiagInit.TAIL`."""
        (r, into), out_of = self.lora_A.shape, self.lora_B.shape[0]
        draw = orthonormal_rows if orthonormal else kaiming_uniform
        with torch.no_grad():
            self.lora_A.copy_(draw(r, into, generator))
            self.lora_B.zero_()
            if self.lora_diag is None:
                return
            self.lora_diag.copy_(first_diagonal(diag_init, r, generator, tail))
            if diag_init is DiagInit.ZEROS:
                self.lora_B.copy_(draw(r, out_of, generator).T)

    def load(self, weights: ModuleWeights) -> None:
        """Take the values of a stored adapter's layer of the same r."""
        with torch.no_grad():
            self.lora_A.copy_(weights.a)
            self.lora_B.copy_(weights.b)
            if self.lora_diag is not None and weights.diag is not None:
                self.lora_diag.copy_(weights.diag)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y = self._frozen(x)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        # s diag(d) goes into B: r * out products here instead of one per token, and in float32.
        up = self.lora_B * (
            self.scaling if self.lora_diag is None else self.scaling * self.lora_diag
        )
        hidden = functional.linear(x, self.lora_A.to(x.dtype))  # (..., in) -> (..., r)
        rows = torch.addmm(
            y.reshape(-1, y.shape[-1]),
            hidden.reshape(-1, self.r).to(y.dtype),
            up.to(y.dtype).T,  # (tokens, r) @ (r, out), added to y in one pass
        )
        return rows.view(y.shape)

    def _frozen(self, x: Tensor) -> Tensor:
        """W_world x + bias"""
        if self.quantised is None:
            assert self.weight is not None
            return functional.linear(x, self.weight, self.bias)
        y: Tensor = self.quantised(x)
        if self.tail_p is None or self.tail_q is None:
            return y
        return y - functional.linear(
            functional.linear(x, self.tail_q.to(x.dtype)), self.tail_p.to(x.dtype)
        )


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer becomes."""

    path: str
    r: int
    scaling: float
    t: int  # components that are cut off, the rule already applied to the layer's shape


def attach(
    model: nn.Module,
    method: MethodSection,
    *,
    tails: TailSource,
    seed: int,
    exclude: Collection[str] = (),
    start: Adapter | None = None,
) -> dict[str, KasaLinear]:
    """Replace the targeted linear layers of `model`, freeze all else, and return the new layers by
    path. `exclude`: paths that are never adapted, such as a trained head. `start`: the adapter to
    go on from, which then says the layers' shape instead of `method`.

    Raises ConfigError where nothing matches or a rank does not fit."""
    plans = plan(model, method, exclude=exclude, start=start)
    generator = torch.Generator().manual_seed(seed)
    qr = method.ortho_form is OrthoForm.QR
    model.requires_grad_(False)
    layers = {}
    for item in plans:
        linear = model.get_submodule(item.path)
        tail = tails(item.path, item.t) if item.t else None
        diag = start.modules[item.path].diag is not None if start else has_diagonal(method)
        layer = KasaLinear(
            linear, item.r, item.scaling, tail=tail, diag=diag, dropout=method.dropout
        )
        if start:
            layer.load(start.modules[item.path])
        else:
            of = tails(item.path, item.r) if method.diag_init is DiagInit.TAIL else None
            layer.reset(generator, diag_init=method.diag_init, orthonormal=qr, tail=of)
        model.set_submodule(item.path, layer)
        layers[item.path] = layer
    return layers


def has_diagonal(method: MethodSection) -> bool:
    return method.is_kasa and method.diag


def plan(
    model: nn.Module,
    method: MethodSection,
    *,
    exclude: Collection[str] = (),
    start: Adapter | None = None,
) -> list[LayerPlan]:
    """The layers that training will adapt, in the model's order. Changes nothing; raises
    ConfigError."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and name not in exclude
    }
    if start:
        return _plan_of(start, linears)
    config = adapter_config(method)
    try:
        return [
            _plan_layer(path, linears[path], method, config)
            for path in select(model, linears, method.target_modules)
        ]
    except AdapterInvalid as error:  # a pattern that is no regular expression
        raise ConfigError(f"[method] {str(error).removeprefix('adapter_config.json: ')}") from error


def adapter_config(method: MethodSection) -> AdapterConfig:
    """`[method]` as the adapter's own configuration, whose rules for names and patterns are
    PEFT's."""
    return AdapterConfig(
        r=method.r,
        lora_alpha=method.alpha,
        target_modules=method.target_modules,
        method=AdapterMethod.KASA if method.is_kasa else AdapterMethod.LORA,
        rank_pattern=method.rank_pattern,
        alpha_pattern=method.alpha_pattern,
        use_rslora=method.use_rslora,
        beta=method.beta,
        gamma=method.gamma,
        lora_dropout=method.dropout,
    )


def select(
    model: nn.Module, linears: Iterable[str], target_modules: str | tuple[str, ...]
) -> list[str]:
    """Those of `linears` that `target_modules` names; "all-linear" leaves out the output
    embeddings. Raises ConfigError for a name that matches none, with names near it."""
    names = list(linears)
    if target_modules == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name in names if model.get_submodule(name) is not head]
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    chosen: set[str] = set()
    for target in targets:
        one = target if isinstance(target_modules, str) else (target,)
        config = AdapterConfig(r=1, lora_alpha=1, target_modules=one)
        matches = {name for name in names if config.targets(name)}
        if not matches:
            raise ConfigError(
                f"[method] target_modules: no linear layer matches {target!r}{_near(target, names)}"
            )
        chosen |= matches
    return [name for name in names if name in chosen]


def _near(target: str, names: Iterable[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in names})
    if near := difflib.get_close_matches(target, known, n=3, cutoff=0.5):
        return f"; near it: {', '.join(near)}; all names: {', '.join(known)}"
    return f"; names of linear layers: {', '.join(known)}"


def _plan_of(start: Adapter, linears: Mapping[str, nn.Module]) -> list[LayerPlan]:
    if missing := sorted(start.modules.keys() - linears.keys()):
        raise ConfigError(f"[method] init_from: the model has no linear layer {missing[0]}")
    return [
        LayerPlan(
            path,
            start.modules[path].a.shape[0],
            start.config.scaling_of(path),
            start.truncation.get(path, 0),
        )
        for path in linears
        if path in start.modules
    ]


def _plan_layer(
    path: str, linear: nn.Module, method: MethodSection, config: AdapterConfig
) -> LayerPlan:
    shape = layer_shape(linear)
    r = config.rank_of(path)
    t = r if method.truncation_rank is None else method.truncation_rank
    if not method.is_kasa:
        t = 0
    if max(r, t) >= min(shape):
        raise ConfigError(
            f"[method] r and truncation_rank must be below {min(shape)}, the smaller side of "
            f"{path}, got {max(r, t)}; lower it, or give this layer another r in rank_pattern"
        )
    cut = truncation_count(method.truncation_rule, t, *shape) if method.is_kasa else 0
    return LayerPlan(path, r, config.scaling_of(path), cut)


def truncated(weight: Tensor, tail: Tail | None) -> Tensor:
    """W - P Q in float32, rounded once to the weight's dtype; the weight itself where there is no
    tail."""
    if tail is None or not tail.rank:
        return weight
    p, q = tail.p.to(weight.device), tail.q.to(weight.device)
    wide = weight if weight.dtype is torch.float64 else weight.float()
    return torch.addmm(wide, p.to(wide), q.to(wide), alpha=-1.0).to(
        weight.dtype
    )  # (out,t) @ (t,in)


def _world(linear: nn.Module, tail: Tail | None) -> Tensor:
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    if isinstance(linear, Conv1D):
        weight = weight.T.contiguous()  # stored (in, out)
    return truncated(weight, tail)


def _bias(linear: nn.Module) -> Tensor | None:
    bias: Tensor | None = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that can be adapted."""
    return isinstance(module, nn.Linear | Conv1D) or is_quantised(module)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module holds its weight as bitsandbytes' 4-bit codes."""
    return type(module).__name__ == "Linear4bit"


def layer_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer that `is_linear`."""
    if isinstance(linear, Conv1D):
        in_features, out_features = linear.weight.shape
        return out_features, in_features
    return linear.out_features, linear.in_features  # type: ignore[return-value]
