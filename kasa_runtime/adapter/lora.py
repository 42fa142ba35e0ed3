"""Fold: from the tensors of an adapter to the low-rank deltas that an engine applies.

Legend as in `kasa.py`. A folded layer is (a, b, t): its delta on the untouched base is b a - P Q
with the layer's tail of rank t, which all adapters share. As one plain LoRA of rank r + t it is [b
| -P] [a ; Q].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.background import give_way
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod


@dataclass(frozen=True)
class ModuleWeights:
    """One layer of an adapter as it is trained and stored."""

    a: Tensor  # (r, in) float32
    b: Tensor  # (out, r) float32
    diag: Tensor | None  # (r,) float32; None: plain LoRA


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk. `truncation` holds t of every layer, the rule already applied
    to its shape; `saved` the tensors of modules that were trained whole, such as a classifier's
    head, by their names in the model."""

    config: AdapterConfig
    meta: AdapterMeta
    modules: Mapping[str, ModuleWeights]
    truncation: Mapping[str, int] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> AdapterMethod:
        return self.config.method


@dataclass(frozen=True)
class ModuleDelta:
    """One folded layer: b (out, r) holds s * diag(d), a (r, in), and t columns of the shared tail
    are subtracted. Fold makes `b` as the transpose of a contiguous (r, out)."""

    a: Tensor
    b: Tensor
    t: int

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterWeights:
    """What an engine loads. `key` is "name@version", unique for ever; immutable."""

    key: str
    modules: Mapping[str, ModuleDelta]

    @property
    def max_rank(self) -> int:
        return max((m.rank for m in self.modules.values()), default=0)

    @property
    def max_tail(self) -> int:
        return max((m.t for m in self.modules.values()), default=0)

    @property
    def size_bytes(self) -> int:
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())


def fold(adapter: Adapter, key: str) -> AdapterWeights:
    """The deltas of `adapter`, float32. Raises AdapterInvalid where they overflow."""
    modules = {}
    for name, weights in adapter.modules.items():
        give_way()
        scaling = adapter.config.scaling_of(name)
        factor = scaling if weights.diag is None else scaling * weights.diag[:, None]
        b_t = torch.empty(weights.b.shape[::-1])  # (r, out)
        torch.mul(weights.b.T, factor, out=b_t)
        if not is_finite(b_t):
            raise AdapterInvalid(f"{name}: s * B diag(d) overflows float32; is lora_alpha right?")
        modules[name] = ModuleDelta(weights.a, b_t.T, adapter.truncation.get(name, 0))
    return AdapterWeights(key, modules)


def is_finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor an infinity in `x`, any real dtype: five times as fast as
    `torch.isfinite(x).all()`."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # NaN if there is one
    return math.isfinite(low) and math.isfinite(high)


def plain_lora(delta: ModuleDelta, tail: Tail) -> tuple[Tensor, Tensor]:
    """The layer as one plain LoRA on the untouched base, scaling 1: A (r + t, in), B (out, r +
    t)."""
    tail = tail.last(delta.t)
    return torch.cat([delta.a, tail.q]), torch.cat([delta.b, -tail.p], dim=1)


def plain_difference(
    delta: ModuleDelta | None, merged: ModuleDelta | None, tail: Tail
) -> tuple[Tensor, Tensor]:
    """What a layer into which `merged` is merged lacks of `delta`, as one plain LoRA, scaling 1: A
    (rank, in), B (out, rank). What both cut off cancels: rank is the sum of theirs and |t - t'|.

    `tail` is as long as the longer of theirs."""
    a, b = [], []
    for term, sign in ((delta, 1.0), (merged, -1.0)):
        if term is not None:
            a.append(term.a)
            b.append(sign * term.b)
    t, t_merged = delta.t if delta else 0, merged.t if merged else 0
    between = slice(tail.rank - max(t, t_merged), tail.rank - min(t, t_merged))
    a.append(tail.q[between])
    b.append(tail.p[:, between] if t < t_merged else -tail.p[:, between])
    return torch.cat(a), torch.cat(b, dim=1)
