"""A linear layer whose rows may each carry another adapter.

    y = x W^T + bias + ((x A^T) * mask) B^T

A (columns, in) stacks the factors of all resident adapters and the shared tail, B (out, columns)
likewise with -P for the tail; `mask` (tokens, columns) gives every row its own adapter's columns:
+1 for the row's adapter, -1 for an adapter that is merged into W, 0 elsewhere. Rows without any
delta, and steps without such rows, cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import ModuleDelta

PACK_ROWS = 32
"""Rows of activations that oneDNN's weight layout is chosen for: a decode batch."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a layer's stacked factors are whose. Layers with equal layouts share one
    mask.

    `slots`: (slot, first column, rank, t) of each adapter in this layer; `tail`: rank of the shared
    tail, which is last."""

    slots: tuple[tuple[int, int, int, int], ...]
    tail: int

    @property
    def num_columns(self) -> int:
        return sum(rank for _, _, rank, _ in self.slots) + self.tail

    def columns(self, slot: int) -> Tensor | None:
        """1 in the columns of an adapter and of its share of the tail (num_columns,); None if it
        has none here."""
        for found, first, rank, t in self.slots:
            if found == slot:
                row = torch.zeros(self.num_columns)
                row[first : first + rank] = 1
                row[self.num_columns - t :] = 1
                return row
        return None


@dataclass(frozen=True, slots=True)
class Factors:
    """The stacked factors of one layer.

    Plain tensors: oneDNN's packed products cost 20 us a call, more than these whole products
    take."""

    layout: Layout
    a_t: Tensor  # (in, columns), the transpose of a contiguous A
    b_t: Tensor  # (columns, out), the transpose of a contiguous B


def stack(deltas: Mapping[int, ModuleDelta], tail: Tail | None, like: Tensor) -> Factors:
    """The factors of the adapters `deltas` (by slot) over one layer, in the dtype and on the device
    of `like`."""
    slots, first = [], 0
    for slot, delta in sorted(deltas.items()):
        slots.append((slot, first, delta.rank, delta.t))
        first += delta.rank
    a = [delta.a for _, delta in sorted(deltas.items())]
    b = [delta.b for _, delta in sorted(deltas.items())]
    if tail is not None:
        a.append(tail.q)
        b.append(-tail.p)
    layout = Layout(tuple(slots), tail.rank if tail else 0)
    return Factors(
        layout,
        torch.cat(a).to(like.device, like.dtype).T,
        torch.cat(b, dim=1).to(like.device, like.dtype).T,
    )


class StepMasks:
    """The masks of the current step, one per layout, made when the first layer asks for it. Step
    thread only."""

    def __init__(self) -> None:
        self.merged_slot = -1
        self._rows: Tensor | None = None
        self._slots: list[int] = []
        self._masks: dict[Layout, Tensor | None] = {}

    def begin(self, slots: list[int], num_tokens: list[int], like: Tensor) -> None:
        """Start a step whose sequences have these adapter slots (-1: base) and numbers of
        tokens."""
        self._masks.clear()
        self._like = like
        if all(slot == self.merged_slot for slot in slots):
            self._rows = None  # every row is what the weights already are
            return
        self._slots = sorted(set(slots))
        index = torch.tensor([self._slots.index(slot) for slot in slots])
        self._rows = index.repeat_interleave(torch.tensor(num_tokens))

    def get(self, layout: Layout) -> Tensor | None:
        """(tokens, columns), or None when no row of the step has a delta in such a layer."""
        if self._rows is None:
            return None
        if layout not in self._masks:
            self._masks[layout] = self._make(layout)
        return self._masks[layout]

    def _make(self, layout: Layout) -> Tensor | None:
        table = torch.zeros(len(self._slots), layout.num_columns)
        merged = layout.columns(self.merged_slot)
        for i, slot in enumerate(self._slots):
            own = layout.columns(slot)
            if own is not None:
                table[i] += own
            if merged is not None:
                table[i] -= merged
        if not table.any():
            return None
        assert self._rows is not None
        return table[self._rows].to(self._like.device, self._like.dtype)


class AdaptedLinear(nn.Module):
    """Stands in for a linear layer of the model. `weight` is what is served now; `pristine` is the
    base's own while an adapter is merged, kept untouched, so that unmerging cannot drift."""

    def __init__(self, weight: Tensor, bias: Tensor | None, masks: StepMasks) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.weight = pack_weight(weight)
        self.factors: Factors | None = None
        self.masks = masks
        self._pristine: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """An empty tensor of the weight's dtype and device."""
        return torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)

    def pristine_weight(self) -> Tensor:
        """A dense copy of the base's weight (out, in)."""
        return unpack_weight(self.weight if self._pristine is None else self._pristine)

    def set_merged(self, packed: Tensor) -> None:
        """Serve `packed` from now on. Step thread, between steps."""
        if self._pristine is None:
            self._pristine = self.weight
        self.weight = packed

    def set_pristine(self) -> None:
        """Serve the base's own weight again, the very tensor that was loaded. Step thread, between
        steps."""
        if self._pristine is not None:
            self.weight, self._pristine = self._pristine, None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        if self.factors is None:
            return y
        mask = self.masks.get(self.factors.layout)
        return y if mask is None else add_delta(y, x, self.factors, mask)


def pack_weight(weight: Tensor) -> Tensor:
    """`weight` (out, in) in the layout in which it multiplies fastest: oneDNN's blocked one on CPU,
    else itself."""
    if weight.device.type != "cpu" or not _can_pack(weight):
        return weight.contiguous()
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return packed


def unpack_weight(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight.clone()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out)"""
    if weight.is_mkldnn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def add_delta(y: Tensor, x: Tensor, factors: Factors, mask: Tensor) -> Tensor:
    """y += ((x A^T) * mask) B^T, in place.

    y (1, n, out), x (1, n, in), A (columns, in), mask (n, columns), B (out, columns)."""
    hidden = torch.mm(x.reshape(-1, x.shape[-1]), factors.a_t).mul_(mask)  # (n, columns)
    y.view(-1, y.shape[-1]).addmm_(hidden, factors.b_t)  # (n, columns) @ (columns, out)
    return y


def _can_pack(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or weight.dtype is not torch.float32:
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
