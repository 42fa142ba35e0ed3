"""Which layers of a model are adapted, and how: the names, patterns and ranks of `[method]` against
the model's own modules. Nothing here changes a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.config import AdapterConfig
from kasa_runtime.adapter.kasa import truncation_count
from kasa_runtime.adapter.lora import Adapter
from kasa_runtime.errors import AdapterInvalid, ConfigError
from kasa_runtime.training.config import ALL_LINEAR, MethodSection
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.types import AdapterMethod


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer becomes."""

    path: str
    r: int
    scaling: float
    t: int  # components that are cut off, the rule already applied to the layer's shape
    diag: bool  # whether it has learnable singular values


def plan(
    model: nn.Module,
    method: MethodSection,
    *,
    exclude: Collection[str] = (),
    start: Adapter | None = None,
) -> list[LayerPlan]:
    """The layers that training will adapt, in the model's order. `exclude`: paths of modules that
    are never adapted, nor what is in them, such as a trained head. `start`: the adapter to go on
    from, which then says the layers' shape instead of `method`.

    Raises ConfigError where nothing matches or a rank does not fit."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not any(f"{name}.".startswith(f"{path}.") for path in exclude)
    }
    if start:
        return _plan_of(start, linears, diag=method.diag)
    _check_retraction(method)
    config = adapter_config(method)
    try:
        paths = select(model, linears, method.target_modules)
        _check_patterns(method, paths)
        return [_plan_layer(path, linears[path], method, config) for path in paths]
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
    if isinstance(target_modules, str):
        return _matching(target_modules, target_modules, names)
    chosen = {name for end in target_modules for name in _matching(end, (end,), names)}
    return [name for name in names if name in chosen]


def _matching(target: str, config_value: str | tuple[str], names: list[str]) -> list[str]:
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=config_value)
    if found := [name for name in names if config.targets(name)]:
        return found
    raise ConfigError(
        f"[method] target_modules: no linear layer matches {target!r}{_near(target, names)}"
    )


def _near(target: str, names: Iterable[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in names})
    if near := difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.5):
        return f"; near it: {', '.join(near)}; all names: {', '.join(known)}"
    return f"; names of linear layers: {', '.join(known)}"


def _check_patterns(method: MethodSection, paths: list[str]) -> None:
    """A pattern for no layer is a slip of the pen; PEFT only warns of it."""
    patterns = {"rank_pattern": method.rank_pattern, "alpha_pattern": method.alpha_pattern}
    for key, values in patterns.items():
        for pattern in values:
            ranks = AdapterConfig(1, 1, ALL_LINEAR, rank_pattern={pattern: 2})
            if all(ranks.rank_of(path) == 1 for path in paths):
                raise ConfigError(
                    f"[method] {key}: no adapted layer matches {pattern!r}{_near(pattern, paths)}"
                )


def _check_retraction(method: MethodSection) -> None:
    if not method.is_kasa or method.ortho_form is not OrthoForm.QR:
        return
    if not method.diag or method.diag_init is not DiagInit.ZEROS:
        raise ConfigError(
            "[method] ortho_form = qr needs diag = true and diag_init = zeros: B is orthonormal "
            "from the start on, so training starts at the base only where d is 0"
        )


def _plan_of(start: Adapter, linears: Mapping[str, nn.Module], *, diag: bool) -> list[LayerPlan]:
    if missing := sorted(start.modules.keys() - linears.keys()):
        raise ConfigError(f"[method] init_from: the model has no linear layer {missing[0]}")
    return [
        LayerPlan(
            path,
            r=start.modules[path].a.shape[0],
            scaling=start.config.scaling_of(path),
            t=start.truncation.get(path, 0),
            diag=diag and start.modules[path].diag is not None,
        )
        for path in linears
        if path in start.modules
    ]


def _plan_layer(
    path: str, linear: nn.Module, method: MethodSection, config: AdapterConfig
) -> LayerPlan:
    shape, r, t = layer_shape(linear), config.rank_of(path), 0
    if method.is_kasa:
        t = r if method.truncation_rank is None else method.truncation_rank
    if max(r, t) >= min(shape):
        raise ConfigError(
            f"[method] r and truncation_rank must be below {min(shape)}, the smaller side of "
            f"{path}, got {max(r, t)}; lower it, or give this layer another r in rank_pattern"
        )
    return LayerPlan(
        path,
        r=r,
        scaling=config.scaling_of(path),
        t=truncation_count(method.truncation_rule, t, *shape),
        diag=method.is_kasa and method.diag,
    )


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
