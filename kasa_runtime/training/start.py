"""The adapter that a run goes on from: `[method] init_from`, any directory that the reader of
adapters reads, of PEFT, of the authors' code or our own.

It says what is trained: layers, ranks, scaling and truncation. `[method]` may repeat that, and a
repetition that says something else is an error rather than ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import Adapter
from kasa_runtime.errors import AdapterError, ConfigError
from kasa_runtime.training.config import MethodSection
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.targets import adapter_config


def read_start(
    method: MethodSection, base: BaseModel, model: nn.Module, *, trained_whole: Collection[str]
) -> Adapter | None:
    """The adapter in `method.init_from`, None where there is none. `trained_whole`: the modules of
    `model` that the run trains whole. Raises ConfigError where it cannot be read, is of another
    base, or is not what the run trains."""
    if method.init_from is None:
        return None
    try:
        start = checkpoint.read(method.init_from, base)
        _check_method(method, start, base)
    except AdapterError as error:
        raise ConfigError(f"[method] init_from: {method.init_from}: {error}") from error
    _check_whole(method, start, model, trained_whole)
    return start


def _check_method(method: MethodSection, start: Adapter, base: BaseModel) -> None:
    """Whatever `[method]` sets to other than its default has to be the adapter's."""
    default = MethodSection()
    for key, found in _shape(start).items():
        wanted = getattr(method, key)
        if wanted not in (getattr(default, key), found):
            raise _contradiction(method, f"{key} = {wanted}", str(found))
    if method.ortho_form is OrthoForm.QR and start.meta.ortho_form != OrthoForm.QR:
        raise _contradiction(method, "ortho_form = qr", "A and B that are not orthonormal")
    if method.truncation_rank is not None:
        ranks = {
            start.meta.truncation_rank_of(name, start.config.rank_of(name))
            for name in start.modules
        }
        if ranks != {method.truncation_rank}:
            shown = ", ".join(map(str, sorted(ranks)))
            raise _contradiction(method, f"truncation_rank = {method.truncation_rank}", shown)
    if method.target_modules != default.target_modules:
        config = adapter_config(method)
        wanted_layers = {name for name in base.modules if config.targets(name)}
        if other := sorted(wanted_layers ^ start.modules.keys()):
            which = "has" if other[0] in start.modules else "lacks"
            raise ConfigError(
                f"[method] target_modules names other layers than the adapter in init_from = "
                f"{method.init_from}, which {which} {other[0]}; leave it out"
            )


def _shape(start: Adapter) -> Mapping[str, Any]:
    config = start.config
    return {
        "kind": start.method,
        "r": config.r,
        "alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "truncation_rule": start.meta.truncation_rule,
    }


def _contradiction(method: MethodSection, wanted: str, found: str) -> ConfigError:
    return ConfigError(
        f"[method] {wanted}, but the adapter in init_from = {method.init_from} has {found}; leave "
        "it out, training goes on with what the adapter has"
    )


def _check_whole(
    method: MethodSection, start: Adapter, model: nn.Module, trained_whole: Collection[str]
) -> None:
    """The adapter's whole modules are those that the run trains, and have the model's shapes. One
    without any starts with a new head."""
    where, tensors = f"[method] init_from: {method.init_from}", model.state_dict()
    for name, tensor in start.saved.items():
        if not any(name.startswith(f"{module}.") for module in trained_whole):
            raise ConfigError(
                f"{where}: holds {name}, which [data] task does not train; want an adapter of the "
                "same kind of task"
            )
        if tensor.shape != tensors[name].shape:
            raise ConfigError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, want "
                f"{tuple(tensors[name].shape)}; was it trained for other labels?"
            )
