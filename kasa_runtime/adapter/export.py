"""Adapters in forms that other engines serve: a plain LoRA of rank r + t, or a whole merged model.
Both are exact."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterMeta
from kasa_runtime.adapter.fingerprint import weight_files
from kasa_runtime.adapter.kasa import TruncationRule, merged_weight
from kasa_runtime.adapter.lora import Adapter, ModuleWeights, fold, plain_lora
from kasa_runtime.adapter.saved import num_labels
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def as_plain_lora(adapter: Adapter, tails: TailCache) -> Adapter:
    """The same update as a plain LoRA on the untouched base: rank r + t, scaling 1, no diagonal.
    Modules that were trained whole stay as they are."""
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
    return Adapter(config, meta, modules, saved=adapter.saved)


def export_lora(source: Path, target: Path, tails: TailCache, dtype: torch.dtype) -> None:
    """Write the adapter in `source` as a plain LoRA that PEFT and every multi-LoRA engine serves.

    Raises AdapterInvalid, BaseMismatch."""
    adapter = checkpoint.read(source, tails.base)
    checkpoint.write(target, as_plain_lora(adapter, tails), dtype=dtype)


def export_merged(source: Path, target: Path, tails: TailCache) -> None:
    """Write the whole model with the adapter in `source` merged, in the base's dtypes, for any
    engine. A classifier gets its architecture, number of labels and head.

    Raises AdapterInvalid (also where the adapter changes a matrix that the input embeddings share),
    BaseMismatch."""
    adapter, base = checkpoint.read(source, tails.base), tails.base
    merged = {}
    for name, delta in fold(adapter, "export").modules.items():
        if base.shares_tensor(name):
            shared = base.tensor_key(name)
            raise AdapterInvalid(
                f"{name} shares {shared}, merging would change both; export as lora"
            )
        weight = merged_weight(base.weight(name), delta.a, delta.b, tails.get(name, delta.t))
        merged[name] = weight.T if base.modules[name].transposed else weight
    if adapter.saved:
        weights = {f"{name}.weight": weight for name, weight in merged.items()}
        _write_model(target, base, weights | dict(adapter.saved))
    else:
        _write_files(target, base, {base.tensor_key(k): w for k, w in merged.items()})


def _write_files(target: Path, base: BaseModel, changed: Mapping[str, Tensor]) -> None:
    """A copy of the base's files with the `changed` tensors."""
    weights = weight_files(base.directory)
    _copy_but(base.directory, target, {file.name for file in weights})
    for file in weights:
        tensors = load_file(file)
        tensors.update({k: changed[k].contiguous() for k in tensors.keys() & changed.keys()})
        save_file(tensors, target / file.name, {"format": "pt"})


def _write_model(target: Path, base: BaseModel, changed: Mapping[str, Tensor]) -> None:
    """The base's model with the `changed` tensors, by their names in it, as transformers writes it:
    its files may be of a class without the head."""
    model = _load(base, num_labels(changed, base), given=changed.keys())
    state = model.state_dict()
    owners = Counter(tensor.data_ptr() for tensor in state.values())
    for name, tensor in changed.items():
        if owners[state[name].data_ptr()] > 1:
            raise AdapterInvalid(
                f"{name} shares its matrix with another layer, which would change too; export as "
                "lora"
            )
        state[name].copy_(tensor)
    weights = {path.name for path in base.directory.glob("*.safetensors*")}
    _copy_but(base.directory, target, weights | {"config.json"})
    with _quiet():
        model.save_pretrained(target)


def _load(base: BaseModel, labels: int, *, given: Collection[str]) -> PreTrainedModel:
    """The base in the class of `base`, in its own dtype. Raises AdapterInvalid where neither its
    files nor `given` have a tensor, which transformers would fill with random numbers."""
    untyped: Any = base.model_class
    with _quiet():
        model, info = untyped.from_pretrained(
            base.directory, num_labels=labels, dtype="auto", output_loading_info=True
        )
    if missing := sorted(set(info["missing_keys"]) - set(given)):
        raise AdapterInvalid(
            f"neither the base nor the adapter has {missing[0]}, so there is no whole model to "
            "write; export as lora"
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its words about a head drawn at random: it is replaced."""
    from transformers.utils import logging

    logs: Any = logging
    before, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(before)
        if bars:
            logs.enable_progress_bar()


def _copy_but(source: Path, target: Path, names: Collection[str]) -> None:
    shutil.copytree(source, target, ignore=lambda _, found: set(found) & set(names))
