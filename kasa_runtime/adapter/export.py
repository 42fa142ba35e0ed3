"""Adapters in forms that other engines serve: a plain LoRA of rank r + t, or a whole merged model.
Both are exact."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.config import AdapterMeta
from kasa_runtime.adapter.fingerprint import weight_files
from kasa_runtime.adapter.kasa import TruncationRule, merged_weight
from kasa_runtime.adapter.lora import Adapter, ModuleWeights, fold, plain_lora
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod


def as_plain_lora(adapter: Adapter, tails: TailCache) -> Adapter:
    """The same update as a plain LoRA on the untouched base: rank r + t, scaling 1, no diagonal."""
    modules = {}
    for name, delta in fold(adapter, "export").modules.items():
        a, b = plain_lora(delta, tails.get(name, delta.t))
        modules[name] = ModuleWeights(a, b, None)
    ranks = {name: weights.a.shape[0] for name, weights in modules.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = replace(
        adapter.config,
        r=common,
        lora_alpha=common,  # alpha / r = 1
        rank_pattern=others,
        alpha_pattern=others,
        use_rslora=False,
        method=AdapterMethod.LORA,
    )
    meta = AdapterMeta(TruncationRule.NONE, base_fingerprint=tails.base.fingerprint)
    return Adapter(config, meta, modules)


def export_lora(source: Path, target: Path, tails: TailCache, dtype: torch.dtype) -> None:
    """Write the adapter in `source` as a plain LoRA that PEFT and every multi-LoRA engine serves.

    Raises AdapterInvalid, BaseMismatch."""
    adapter = checkpoint.read(source, tails.base)
    checkpoint.write(target, as_plain_lora(adapter, tails), dtype=dtype)


def export_merged(source: Path, target: Path, tails: TailCache) -> None:
    """Write the whole model with the adapter in `source` merged, in the base's dtypes, for any
    engine.

    Raises AdapterInvalid (also where the adapter changes a matrix that the input embeddings share),
    BaseMismatch."""
    base = tails.base
    deltas = fold(checkpoint.read(source, base), "export").modules
    merged = {}
    for name, delta in deltas.items():
        key = base.tensor_key(name)
        if not key.endswith(f"{name.removeprefix('model.')}.weight"):
            raise AdapterInvalid(f"{name} shares {key}, merging would change both; export as lora")
        weight = merged_weight(base.weight(name), delta.a, delta.b, tails.get(name, delta.t))
        merged[key] = weight.T if base.modules[name].transposed else weight
    weights = weight_files(base.directory)
    shutil.copytree(base.directory, target, ignore=lambda _, names: _weight_names(names, weights))
    for file in weights:
        tensors = load_file(file)
        tensors.update({k: merged[k].contiguous() for k in tensors.keys() & merged.keys()})
        save_file(tensors, target / file.name, {"format": "pt"})


def _weight_names(names: list[str], weights: list[Path]) -> set[str]:
    return {file.name for file in weights} & set(names)
