"""Adapters as files of plain LoRAs, which is how vLLM takes them. For background threads.

`${KASA_HOME}/vllm/<digest>/` is one plain LoRA on the untouched base, of rank r + t; its name says
all that it was made of, and it appears whole, by rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import Tail, TruncationRule
from kasa_runtime.adapter.lora import (
    Adapter,
    AdapterWeights,
    ModuleDelta,
    ModuleWeights,
    plain_difference,
)
from kasa_runtime.errors import CapacityExceeded
from kasa_runtime.home import kasa_home
from kasa_runtime.types import AdapterMethod

FORMAT = b"1"
"""Of what is written; another one is never mistaken for it."""


class Tails(Protocol):
    """Where P and Q come from: `adapter.tails.TailCache`."""

    base: BaseModel

    def get(self, module: str, t: int) -> Tail: ...


def difference_rank(adapter: AdapterWeights | None, merged: AdapterWeights | None) -> int:
    """The largest rank of what `write_difference` writes; r + t where nothing is merged."""
    ranks = []
    for name in _modules(adapter, merged):
        mine, other = _delta(adapter, name), _delta(merged, name)
        r = sum(delta.rank for delta in (mine, other) if delta)
        ranks.append(r + abs((mine.t if mine else 0) - (other.t if other else 0)))
    return max(ranks, default=0)


def write_difference(
    adapter: AdapterWeights | None, merged: AdapterWeights | None, tails: Tails
) -> Path:
    """The directory of the plain LoRA that makes of a base with `merged` merged (None: the
    untouched one) what `adapter` (None: nothing) makes of the untouched one. Written if it is not
    there."""
    directory = kasa_home() / "vllm" / _digest(adapter, merged, tails.base)
    if not directory.exists():
        _write_whole(directory, _factors(adapter, merged, tails))
    return directory


def _modules(*adapters: AdapterWeights | None) -> list[str]:
    return sorted({name for adapter in adapters if adapter for name in adapter.modules})


def _delta(adapter: AdapterWeights | None, module: str) -> ModuleDelta | None:
    return adapter.modules.get(module) if adapter else None


def _factors(
    adapter: AdapterWeights | None, merged: AdapterWeights | None, tails: Tails
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of every layer; of one layer zeros where there is none."""
    factors = {}
    for name in _modules(adapter, merged):
        mine, other = _delta(adapter, name), _delta(merged, name)
        tail = tails.get(name, max(delta.t for delta in (mine, other) if delta))
        factors[name] = plain_difference(mine, other, tail)
    if not factors:
        name, shape = next(iter(tails.base.modules.items()))
        factors[name] = torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1)
    return factors


def _digest(adapter: AdapterWeights | None, merged: AdapterWeights | None, base: BaseModel) -> str:
    digest = hashlib.sha256(FORMAT + base.fingerprint.encode())
    for side in (adapter, merged):
        digest.update(b"|")
        for name in _modules(side):
            delta = side.modules[name]  # type: ignore[union-attr]  # it has modules
            digest.update(f"{name} {delta.rank} {delta.t}".encode())
            for tensor in (delta.a, delta.b):
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_whole(directory: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """As PEFT's format has it: of one rank, with zeros where a layer has a smaller one."""
    rank = max(a.shape[0] for a, _ in factors.values())
    config = AdapterConfig(rank, rank, tuple(factors), AdapterMethod.LORA)  # alpha / r = 1
    modules = {}
    for name, (a, b) in factors.items():
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        modules[name] = ModuleWeights(a, torch.nn.functional.pad(b, (0, missing)), None)
    adapter = Adapter(config, AdapterMeta(TruncationRule.NONE), modules)
    staged = directory.with_name(f".{directory.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        checkpoint.write(staged, adapter)
        try:
            staged.rename(directory)
        except OSError:
            if not directory.exists():  # else another process was first
                raise
    except OSError as error:
        raise CapacityExceeded(
            f"{directory}: cannot be written ({error}), and vLLM takes adapters from files; free "
            "some space or set KASA_HOME"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
