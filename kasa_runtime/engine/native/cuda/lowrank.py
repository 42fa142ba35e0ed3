"""The deltas of a step by Triton kernels, in the place of `StepMasks` on CUDA.

The stacked factors are the same. What differs is when the choice of columns is made: a table with a
line per adapter slot is made with the factors, and a step only says which line each row has. All
that a kernel reads lies at fixed addresses, so that captured graphs outlive changes of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from kasa_runtime.engine.native.adapted_linear import Factors, LinearGroup
from kasa_runtime.engine.native.cuda.kernels import expand, num_splits, shrink
from kasa_runtime.engine.native.executor import NO_SLOT, Commit


class TritonDeltas:
    """See `Deltas`."""

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device) -> None:
        self.merged_slot = NO_SLOT
        self.active = False
        self._num_lines = max_slots + 1
        self._max_tokens = max_tokens
        self._device = device
        self._tokens = _Rows(max_tokens, device)
        self._logits = _Rows(max_tokens, device)
        self._merged_line = torch.zeros(1, dtype=torch.int32, device=device)
        self._scratch = torch.empty(0, device=device)  # x A^T of the group that is computed
        self._scratch_address = torch.zeros(1, dtype=torch.int64, device=device)
        self._factors: dict[LinearGroup, Tensor] = {}
        self._tables: dict[LinearGroup, Tensor] = {}

    def register(self, group: LinearGroup) -> None:
        shape = (1 + len(group.sizes), 3)
        self._factors[group] = torch.zeros(shape, dtype=torch.int64, device=self._device)

    def prepare(self, changes: Sequence[tuple[LinearGroup, Factors | None]]) -> Commit:
        factors = [None if value is None else _along_out(value) for _, value in changes]
        tables = [None if value is None else self._table(value) for value in factors]
        described = [
            _describe(value, table, self._factors[group])
            for (group, _), value, table in zip(changes, factors, tables, strict=True)
        ]
        needed = max((self._scratch_size(value) for value in factors if value), default=0)
        scratch = self._scratch
        if needed > len(scratch):
            scratch = torch.empty(needed, device=self._device)

        def commit() -> None:
            for (group, _), value, table, description in zip(
                changes, factors, tables, described, strict=True
            ):
                self._factors[group].copy_(description)
                group.factors = value
                self._tables.pop(group, None)
                if table is not None:
                    self._tables[group] = table
            self._scratch = scratch
            self._scratch_address.fill_(scratch.data_ptr())

        return commit

    def set_merged(self, slot: int) -> None:
        self.merged_slot = slot
        self._merged_line.fill_(slot + 1)

    def begin(
        self, slots: Sequence[int], num_tokens: Sequence[int], logit_rows: Tensor | None = None
    ) -> None:
        self.active = any(slot != self.merged_slot for slot in slots)
        self._tokens.num = sum(num_tokens)
        if not self.active:
            return
        lines = torch.tensor(slots, dtype=torch.int32).add_(1)
        lines = lines.repeat_interleave(torch.tensor(num_tokens))
        self._tokens.fill(lines)
        if logit_rows is not None:
            self._logits.fill(lines[logit_rows])

    def add(self, y: Tensor, x: Tensor, group: LinearGroup) -> Tensor:
        n, in_features = x.shape[-2:]
        if not self.active or n == 0:
            return y
        rows = self._tokens if n == self._tokens.num else self._logits
        step = (
            self._factors[group],
            self._scratch_address,
            rows.order[:n],
            rows.lines[:n],
            self._merged_line,
        )
        shrink(x.reshape(n, in_features), *step)
        for layer, part in enumerate(y.view(n, -1).split(group.sizes, 1)):
            expand(part, layer, num_splits(in_features), *step)
        return y

    def _scratch_size(self, factors: Factors) -> int:
        in_features, columns = factors.a_t.shape
        return num_splits(in_features) * self._max_tokens * columns

    def _table(self, factors: Factors) -> Tensor:
        """1 where a slot, plus one, has a column (lines, all columns) int8."""
        table = torch.zeros(self._num_lines, sum(factors.columns), dtype=torch.int8)
        parts = table.split(factors.columns, 1)
        for layout, part in zip(factors.layouts, parts, strict=True):
            for slot, *_ in layout.slots:
                columns = layout.columns(slot)
                assert columns is not None
                part[slot + 1] = columns
        return table.to(self._device)


class _Rows:
    """Rows of activations by adapter: their order and, in that order, the table's line of each."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.num = 0
        self.order = torch.zeros(most, dtype=torch.int32, device=device)
        self.lines = torch.zeros(most, dtype=torch.int32, device=device)

    def fill(self, lines: Tensor) -> None:
        """`lines` (num,) int32 on the CPU, row by row."""
        self.num = len(lines)
        order = lines.argsort(stable=True)
        self.order[: self.num].copy_(order)
        self.lines[: self.num].copy_(lines[order])


def _along_out(factors: Factors) -> Factors:
    """Every B^T in rows, so that a GPU reads neighbouring outputs together."""
    return replace(factors, b_t=tuple(b.contiguous() for b in factors.b_t))


def _describe(factors: Factors | None, table: Tensor | None, like: Tensor) -> Tensor:
    """What `shrink` calls factors; zeros, which are no columns, for none."""
    if factors is None or table is None:
        return torch.zeros_like(like)
    firsts = accumulate(factors.columns, initial=0)
    layers = zip(factors.b_t, firsts, factors.columns, strict=False)
    lines = [(factors.a_t.data_ptr(), table.data_ptr(), sum(factors.columns))]
    lines += [(b_t.data_ptr(), first, columns) for b_t, first, columns in layers]
    return torch.tensor(lines, dtype=torch.int64, device=like.device)
