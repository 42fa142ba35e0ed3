"""Which columns of the stacked low-rank factors are whose.

Layers of one kind (all q_proj, all up_proj) share their columns and so their mask, though each has
factors of its own:

    y = x W^T + ((x A^T) * mask) B^T      A (columns, in), B (out, columns), mask (tokens, columns)

An adapter has as many columns as its largest rank in such layers; where a layer has less, the rest
is zero. Adapters whose tails lie in the same layers share the tail's columns, the smaller ones use
its last ones; B holds -P there. An adapter whose t differs between layers shares with its like.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import ModuleDelta
from kasa_runtime.engine.native.executor import NO_SLOT

Deltas = Mapping[int, Mapping[str, ModuleDelta]]
"""Of one kind of layers: by slot, by layer."""


@dataclass(frozen=True)
class Columns:
    """`own`: (first, rank) by slot; `tail`: (first, width of the shared tail, width used) by
    slot."""

    num: int
    own: Mapping[int, tuple[int, int]]
    tail: Mapping[int, tuple[int, int, int]]

    @classmethod
    def plan(cls, deltas: Deltas) -> Columns:
        own, num = {}, 0
        for slot, layers in sorted(deltas.items()):
            own[slot] = (num, max(delta.rank for delta in layers.values()))
            num += own[slot][1]
        tail: dict[int, tuple[int, int, int]] = {}
        for slots in _sharing(deltas):
            used = {slot: max(d.t for d in deltas[slot].values()) for slot in slots}
            width = max(used.values())
            tail |= {slot: (num, width, t) for slot, t in used.items()}
            num += width
        return cls(num, own, tail)

    def mask(self, slot: int) -> Any:
        """1 in the columns of an adapter and of its share of the tail (num,)."""
        row = np.zeros(self.num, np.float32)
        if slot in self.own:
            first, rank = self.own[slot]
            row[first : first + rank] = 1
        if slot in self.tail:
            first, width, used = self.tail[slot]
            row[first + width - used : first + width] = 1
        return row

    def table(self, slots: list[int], merged_slot: int) -> Any:
        """The mask of each of these slots, less that of the merged one (slots, num)."""
        rows = np.stack([self.mask(slot) for slot in slots])
        return rows if merged_slot == NO_SLOT else rows - self.mask(merged_slot)

    def factors(
        self, deltas: Mapping[int, ModuleDelta], tail: Tail | None, shape: tuple[int, int]
    ) -> tuple[Any, Any]:
        """A^T (in, num) and B^T (num, out) of one layer of `shape` (out, in), from its deltas by
        slot; `tail` is of the largest rank that one of them needs."""
        out_features, in_features = shape
        a_t = np.zeros((in_features, self.num), np.float32)
        b_t = np.zeros((self.num, out_features), np.float32)
        for slot, delta in deltas.items():
            first = self.own[slot][0]
            a_t[:, first : first + delta.rank] = delta.a.T
            b_t[first : first + delta.rank] = delta.b.T
            if delta.t:
                assert tail is not None
                share, end = tail.last(delta.t), sum(self.tail[slot][:2])
                a_t[:, end - delta.t : end] = share.q.T  # the same for all that share it
                b_t[end - delta.t : end] = -share.p.T
        return a_t, b_t


def _sharing(deltas: Deltas) -> list[list[int]]:
    """The slots that have tails, those together that can share their columns."""
    groups: dict[Hashable, list[int]] = {}
    for slot, layers in sorted(deltas.items()):
        ts = {name: delta.t for name, delta in layers.items() if delta.t}
        if ts:
            uniform = len(set(ts.values())) == 1
            groups.setdefault(frozenset(ts) if uniform else frozenset(ts.items()), []).append(slot)
    return list(groups.values())
