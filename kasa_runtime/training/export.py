"""From trained layers to an adapter directory, and back into the layers.

The files are written and read by `adapter.checkpoint`, as a server reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.targets import adapter_config


def to_adapter(
    config: RunConfig,
    layers: Mapping[str, KasaLinear],
    *,
    base: BaseModel,
    summary: Mapping[str, Any],
    task_type: str = "CAUSAL_LM",
    whole: Sequence[str] = (),
    saved: Mapping[str, Tensor] = MappingProxyType({}),
    start: Adapter | None = None,
) -> Adapter:
    """The adapter that `layers` of `base` are, with `summary` as the account of its training.
    `whole`: the modules that were trained whole, `saved`: their tensors, by their names in the
    model. `start`: the adapter that this one goes on from."""
    method = config.method
    modules = {path: _weights(layer, as_kasa=method.is_kasa) for path, layer in layers.items()}
    shape = start.config if start else adapter_config(method)
    adapter = replace(
        shape,
        beta=method.beta,
        gamma=method.gamma,
        lora_dropout=method.dropout,
        base_model_name=base_name(config),
        task_type=task_type,
        modules_to_save=tuple(sorted(whole)),
        fan_in_fan_out=any(base.modules[path].transposed for path in layers),
    )
    meta = replace(
        start.meta if start else _meta(config),
        ortho_form=method.ortho_form.value,
        reg_reduction=method.reg_reduction.value,
        base_fingerprint=base.fingerprint,
        training=dict(summary),
    )
    truncation = {path: layer.truncation_rank for path, layer in layers.items()}
    return Adapter(adapter, meta, modules, truncation, saved)


def _meta(config: RunConfig) -> AdapterMeta:
    method = config.method
    if not method.is_kasa:
        return AdapterMeta(TruncationRule.NONE)
    return AdapterMeta(method.truncation_rule, method.truncation_rank)


def _weights(layer: KasaLinear, *, as_kasa: bool) -> ModuleWeights:
    """A KaSA layer without learnable singular values has all ones, which is the same update."""
    diag: Tensor | None = layer.lora_diag
    if diag is None and as_kasa:
        diag = torch.ones(layer.r)
    return ModuleWeights(
        layer.lora_A.detach().cpu(),
        layer.lora_B.detach().cpu(),
        None if diag is None else diag.detach().cpu(),
    )


def load_into(model: nn.Module, layers: Mapping[str, KasaLinear], adapter: Adapter) -> None:
    """Give `layers` of `model` the weights of `adapter`, made for the same modules and r, and the
    modules that it saved whole theirs."""
    if layers.keys() != adapter.modules.keys():
        raise AdapterInvalid("the adapter was made for other modules than the ones to load it into")
    for path, layer in layers.items():
        layer.load(adapter.modules[path])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.saved.items():
            parameters[name].copy_(tensor)


def base_name(config: RunConfig) -> str:
    """The base model's name; of a local directory only the last part, which names no machine."""
    name = config.model.name
    return Path(name).name if Path(name).expanduser().exists() else name
