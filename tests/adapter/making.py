"""Adapters for tests: ours, made directly, and PEFT's, made by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule, merged_weight, truncation_count
from kasa_runtime.adapter.lora import Adapter, ModuleWeights, fold
from kasa_runtime.adapter.tails import TailCache

LAYER = "model.layers.0.self_attn.q_proj"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(3, 35).reshape(2, 16)


@dataclass(frozen=True)
class PeftAdapter:
    """What PEFT saved, and the logits that PEFT computes with it for TOKENS."""

    directory: Path
    logits: Tensor


def make_adapter(
    base: BaseModel,
    targets: str | tuple[str, ...] = (LAYER,),
    *,
    r: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    kasa: bool = True,
    rule: TruncationRule = TruncationRule.MIN_DIM,
    truncation_rank: int | None = None,
    base_fingerprint: str = "",
    **config: Any,
) -> Adapter:
    """An adapter with random tensors on the layers that `targets` names."""
    wanted = AdapterConfig(
        r,
        alpha,
        targets if isinstance(targets, str) else tuple(sorted(targets)),
        method=checkpoint.AdapterMethod.KASA if kasa else checkpoint.AdapterMethod.LORA,
        **config,
    )
    meta = AdapterMeta(
        rule if kasa else TruncationRule.NONE, truncation_rank, base_fingerprint=base_fingerprint
    )
    draw = torch.Generator().manual_seed(seed)
    modules, truncation = {}, {}
    for name, shape in base.modules.items():
        if not wanted.targets(name):
            continue
        rank = wanted.rank_of(name)
        modules[name] = ModuleWeights(
            0.2 * torch.randn(rank, shape.in_features, generator=draw),
            0.2 * torch.randn(shape.out_features, rank, generator=draw),
            torch.randn(rank, generator=draw) if kasa else None,
        )
        t = meta.truncation_rank_of(name, rank)
        truncation[name] = truncation_count(
            meta.truncation_rule, t, shape.out_features, shape.in_features
        )
    return Adapter(wanted, meta, modules, truncation)


def write_adapter(directory: Path, base: BaseModel, *args: Any, **kwargs: Any) -> Path:
    """`make_adapter`, written to `directory`."""
    checkpoint.write(directory, make_adapter(base, *args, **kwargs))
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` edit the adapter's tensors in place."""
    path = directory / checkpoint.WEIGHTS_FILE
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def load_base(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(TOKENS).logits


def logits_by_merging(model_dir: Path, adapter: Adapter, tails: TailCache) -> Tensor:
    """The logits of a fresh copy of the model whose weights are W0 + the adapter's delta."""
    model = load_base(model_dir)
    for name, delta in fold(adapter, "test@0").modules.items():
        layer = model.get_submodule(name)
        layer.weight.data = merged_weight(
            layer.weight.data, delta.a, delta.b, tails.get(name, delta.t)
        )
    return logits_of(model)


def make_with_peft(model_dir: Path, directory: Path, options: Mapping[str, Any]) -> PeftAdapter:
    """Train nothing: let PEFT build an adapter, give all its parameters random values, save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    model = get_peft_model(load_base(model_dir), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return PeftAdapter(directory, logits_of(model.eval()))
