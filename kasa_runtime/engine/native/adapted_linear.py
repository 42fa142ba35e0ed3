"""A linear layer whose rows may each carry another adapter.

    y = x W^T + bias + ((x A^T) * mask) B^T

A (columns, in) stacks the factors of all resident adapters and the shared tail, B (out, columns)
likewise with -P for the tail; `mask` (tokens, columns) gives every row its own adapter's columns:
+1 for the row's adapter, -1 for an adapter that is merged into W, 0 elsewhere. Rows without any
delta, and steps without such rows, cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import ModuleDelta
from kasa_runtime.engine.native.executor import NO_SLOT, Commit

PACK_ROWS = 16
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
    """The stacked factors of layers that share their input.

    Plain tensors: oneDNN's packed products cost 20 us a call, more than these whole products
    take."""

    layouts: tuple[Layout, ...]  # one per layer
    columns: tuple[int, ...]  # their numbers of columns
    a_t: Tensor  # (in, all columns), the transpose of a contiguous A
    b_t: tuple[Tensor, ...]  # (columns, out) per layer, the transposes of contiguous ones


def stack(
    layers: Sequence[tuple[Mapping[int, ModuleDelta], Tail | None]],
    like: Tensor,
    interned: dict[tuple[Layout, ...], tuple[Layout, ...]],
) -> Factors | None:
    """The factors of layers that share their input, each with its deltas by slot and its tail, in
    the dtype and on the device of `like`; None if there are no deltas. `interned` collects layouts,
    so that equal ones are one object."""
    if not any(deltas for deltas, _ in layers):
        return None
    layouts, rows, columns = [], [], []
    for deltas, tail in layers:
        layouts.append(_layout(deltas, tail))
        own = [delta for _, delta in sorted(deltas.items())]
        rows += [delta.a for delta in own] + ([tail.q] if tail else [])
        columns.append([delta.b for delta in own] + ([-tail.p] if tail else []))
    known = interned.setdefault(tuple(layouts), tuple(layouts))
    return Factors(
        known,
        tuple(layout.num_columns for layout in known),
        torch.cat(rows).to(like.device, like.dtype).T,
        tuple(torch.cat(b, 1).to(like.device, like.dtype).T if b else like for b in columns),
    )


def _layout(deltas: Mapping[int, ModuleDelta], tail: Tail | None) -> Layout:
    slots, first = [], 0
    for slot, delta in sorted(deltas.items()):
        slots.append((slot, first, delta.rank, delta.t))
        first += delta.rank
    return Layout(tuple(slots), tail.rank if tail else 0)


class Deltas(Protocol):
    """How the rows of a step get their own adapters' deltas. Step thread; `prepare`: any other."""

    merged_slot: int
    """The adapter that is in the weights, or NO_SLOT."""
    active: bool
    """Whether a row of the step has a delta."""

    def register(self, group: LinearGroup) -> None:
        """Get to know a group before it has factors."""

    def prepare(self, changes: Sequence[tuple[LinearGroup, Factors | None]]) -> Commit:
        """Make these factors of these groups ready; the commit makes them current."""

    def set_merged(self, slot: int) -> None:
        """The weights have the adapter in `slot` in them now; NO_SLOT: they are pristine."""

    def begin(
        self, slots: Sequence[int], num_tokens: Sequence[int], logit_rows: Tensor | None = None
    ) -> None:
        """Start a step whose sequences have these adapter slots (NO_SLOT: base) and numbers of
        tokens. `logit_rows` (num_logits,) int64: the tokens that the last layer is asked about, in
        their order; None: all."""

    def add(self, y: Tensor, x: Tensor, group: LinearGroup) -> Tensor:
        """y (1, n, sum of sizes) plus the deltas of x (1, n, in), in place. n is the number of
        tokens or, in the last layer, of logits."""


class StepMasks:
    """Deltas as plain products under the masks of the current step, one per combination of layouts,
    made when the first layer asks for it."""

    def __init__(self) -> None:
        self.merged_slot = NO_SLOT
        self.active = False
        self._rows: Tensor
        self._logit_rows: Tensor | None = None
        self._slots: list[int] = []
        self._masks: dict[tuple[int, int], Tensor | None] = {}

    def register(self, group: LinearGroup) -> None:
        return None

    def prepare(self, changes: Sequence[tuple[LinearGroup, Factors | None]]) -> Commit:
        def commit() -> None:
            for group, factors in changes:
                group.factors = factors

        return commit

    def set_merged(self, slot: int) -> None:
        self.merged_slot = slot

    def begin(
        self, slots: Sequence[int], num_tokens: Sequence[int], logit_rows: Tensor | None = None
    ) -> None:
        self._masks.clear()
        self.active = any(slot != self.merged_slot for slot in slots)
        if not self.active:  # every row is what the weights already are
            return
        self._slots = sorted(set(slots))
        index = torch.tensor([self._slots.index(slot) for slot in slots])
        self._rows = index.repeat_interleave(torch.tensor(num_tokens))
        self._logit_rows = logit_rows

    def add(self, y: Tensor, x: Tensor, group: LinearGroup) -> Tensor:
        if not self.active or group.factors is None:
            return y
        mask = self._mask(group.factors.layouts, like=y)
        return y if mask is None else add_deltas(y, x, group.factors, mask, group.sizes)

    def _mask(self, layouts: tuple[Layout, ...], *, like: Tensor) -> Tensor | None:
        """(n, all columns), or None when no row of the step has a delta in such layers."""
        n = like.shape[-2]
        key = id(layouts), n  # equal ones are the same object (see `stack`); hashing costs more
        if key not in self._masks:
            rows = self._rows
            if self._logit_rows is not None and n != len(rows):
                rows = rows[self._logit_rows]
            table = torch.cat([self._table(layout) for layout in layouts], dim=1)
            mask = table[rows].to(like.device, like.dtype)
            self._masks[key] = mask if table.any() else None
        return self._masks[key]

    def _table(self, layout: Layout) -> Tensor:
        """One row per slot of the step (slots, columns)."""
        table = torch.zeros(len(self._slots), layout.num_columns)
        merged = layout.columns(self.merged_slot)
        for i, slot in enumerate(self._slots):
            own = layout.columns(slot)
            if own is not None:
                table[i] += own
            if merged is not None:
                table[i] -= merged
        return table


class LinearGroup:
    """The weights of layers that get the same tensor one after another (q, k, v; gate, up),
    multiplied as one matrix. Most groups have one layer.

    `weight` is what is served now; `pristine` is the base's own while an adapter is merged, kept
    untouched, so that unmerging cannot drift."""

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], deltas: Deltas
    ) -> None:
        self.sizes = [weight.shape[0] for weight in weights]  # out features of each layer
        self.like = torch.empty(0, dtype=weights[0].dtype, device=weights[0].device)
        self.weight = pack_weight(torch.cat(list(weights)))  # (sum of sizes, in)
        self.bias = _joined_bias(weights, biases)
        self.factors: Factors | None = None
        self._pristine: Tensor | None = None
        self._deltas = deltas
        self._input: Tensor | None = None  # whose outputs wait for the other layers
        self._outputs: dict[int, Tensor] = {}
        deltas.register(self)

    def output(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` makes of x (1, n, in): (1, n, out). The first layer that is called
        with a tensor computes for all."""
        if len(self.sizes) == 1:
            return self._compute(x)
        if x is not self._input or index not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self._compute(x).split(self.sizes, dim=-1)))
        y = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return y

    def dense(self, *, pristine: bool) -> Tensor:
        """A dense copy of the weight (sum of out, in): the base's own, or the one served now."""
        held = self._pristine if pristine and self._pristine is not None else self.weight
        return unpack_weight(held)

    def set_merged(self, packed: Tensor) -> None:
        """Serve `packed` from now on. Step thread, between steps."""
        if self._pristine is None:
            self._pristine = self.weight.clone() if self.weight.is_cuda else self.weight
        self._serve(packed)

    def set_pristine(self) -> None:
        """Serve the base's own weight again, bit for bit what was loaded. Step thread, between
        steps."""
        if self._pristine is not None:
            self._serve(self._pristine)
            self._pristine = None

    def _serve(self, weight: Tensor) -> None:
        if self.weight.is_cuda:  # in place: captured graphs know the address
            self.weight.copy_(weight)
        else:
            self.weight = weight

    def _compute(self, x: Tensor) -> Tensor:
        return self._deltas.add(linear(x, self.weight, self.bias), x, self)


class AdaptedLinear(nn.Module):
    """Stands in for a linear layer of the model: one layer of a group."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dense: tuple[Tensor, Tensor | None] | None = (weight, bias)  # until it is grouped
        self.group: LinearGroup
        self.index = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            return F.linear(x, *self.dense)
        return self.group.output(self.index, x)


def group_layers(layers: Sequence[AdaptedLinear], deltas: Deltas) -> LinearGroup:
    """Make one group of layers that share their input; their dense weights are given up."""
    held = [layer.dense for layer in layers]
    assert all(held), "a layer is grouped once"
    group = LinearGroup([d[0] for d in held if d], [d[1] for d in held if d], deltas)
    for index, layer in enumerate(layers):
        layer.group, layer.index, layer.dense = group, index, None
    return group


def _joined_bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])


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


def add_deltas(
    y: Tensor, x: Tensor, factors: Factors, mask: Tensor, sizes: Sequence[int]
) -> Tensor:
    """y += ((x A^T) * mask) B^T, in place, layer by layer.

    y (1, n, sum of sizes), x (1, n, in), A (columns, in), mask (n, columns); per layer its own
    columns and B (size, columns)."""
    hidden = torch.mm(x.reshape(-1, x.shape[-1]), factors.a_t).mul_(mask)  # (n, columns)
    rows = y.view(-1, y.shape[-1])
    if len(sizes) == 1:
        rows.addmm_(hidden, factors.b_t[0])  # (n, columns) @ (columns, out)
        return y
    own = zip(rows.split(sizes, 1), hidden.split(factors.columns, 1), factors.b_t, strict=True)
    for out, columns, b_t in own:
        if columns.shape[1]:
            out.addmm_(columns, b_t)
    return y


def _can_pack(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or weight.dtype is not torch.float32:
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
