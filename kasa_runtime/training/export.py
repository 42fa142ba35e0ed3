"""From trained layers to an adapter directory, and back into the layers.

The files are written and read by `adapter.checkpoint`, as a server reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.training.config import ALL_LINEAR, RunConfig
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.types import AdapterMethod


def to_adapter(
    config: RunConfig,
    layers: Mapping[str, KasaLinear],
    *,
    base_fingerprint: str,
    summary: Mapping[str, Any],
) -> Adapter:
    """The adapter that `layers` are, with `summary` as the account of its training."""
    method = config.method
    kasa = method.kind is AdapterMethod.KASA
    modules = {
        path: ModuleWeights(
            layer.lora_A.detach().cpu(),
            layer.lora_B.detach().cpu(),
            None if layer.lora_diag is None else layer.lora_diag.detach().cpu(),
        )
        for path, layer in layers.items()
    }
    adapter_config = AdapterConfig(
        r=method.r,
        lora_alpha=method.alpha,
        target_modules=_target_modules(method.target_modules),
        method=method.kind,
        use_rslora=method.use_rslora,
        beta=method.beta,
        gamma=method.gamma,
        lora_dropout=method.dropout,
        base_model_name=base_name(config),
    )
    meta = AdapterMeta(
        truncation_rule=method.truncation_rule if kasa else TruncationRule.NONE,
        truncation_rank=method.t if kasa else None,
        ortho_form=method.ortho_form.value,
        reg_reduction=method.reg_reduction.value,
        base_fingerprint=base_fingerprint,
        training=dict(summary),
    )
    truncation = {path: layer.truncation_rank for path, layer in layers.items()}
    return Adapter(adapter_config, meta, modules, truncation)


def load_into(layers: Mapping[str, KasaLinear], adapter: Adapter) -> None:
    """Give `layers` the weights of `adapter`, made for the same modules and r."""
    if layers.keys() != adapter.modules.keys():
        raise AdapterInvalid("the adapter was made for other modules than the ones to load it into")
    with torch.no_grad():
        for path, layer in layers.items():
            weights = adapter.modules[path]
            layer.lora_A.copy_(weights.a)
            layer.lora_B.copy_(weights.b)
            if layer.lora_diag is not None and weights.diag is not None:
                layer.lora_diag.copy_(weights.diag)


def base_name(config: RunConfig) -> str:
    """The base model's name; of a local directory only the last part, which names no machine."""
    name = config.model.name
    return Path(name).name if Path(name).expanduser().exists() else name


def _target_modules(names: tuple[str, ...]) -> str | tuple[str, ...]:
    return ALL_LINEAR if names == (ALL_LINEAR,) else names
