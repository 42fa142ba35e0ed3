# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of y += ((x A^T) * mask) B^T for rows that carry different adapters.

The same product as `add_deltas`, without the blocks of it that the mask makes zero. Rows are taken
in the order of their adapters, BLOCK_ROWS at a time; a block of columns that no row of such a tile
has is neither computed nor read. `mask = table[row's adapter] - table[merged adapter]`, so an
adapter that is merged, the shared tail and the base need no case of their own.

    x (rows, in)   A (columns, in)   table (adapters + 1, columns): 0 or 1, line 0 is the base's
    y (rows, out)  B^T (columns of the layer, out)   hidden (splits, rows, columns) float32

What changes when adapters come and go is read from device memory: the addresses and sizes in
`factors`, the merged adapter and the rows'. So a captured CUDA graph stays valid through all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16  # the least that tensor cores take, and few rows are read for others' sake
BLOCK_COLUMNS = 16  # of the usual ranks, none shares a block with another adapter
BLOCK_IN = 128
BLOCK_OUT = 64
SPLIT_IN = 1024
"""Inputs that one program sums over: enough programs for a GPU even where columns are few."""
COLUMN_PROGRAMS = 64
"""Programs that share a tile's columns, whose number a captured graph does not know."""


def num_splits(in_features: int) -> int:
    return int(triton.cdiv(in_features, SPLIT_IN))


def shrink(
    x: Tensor, factors: Tensor, hidden: Tensor, order: Tensor, adapters: Tensor, merged: Tensor
) -> None:
    """hidden = x A^T where the mask is not zero; elsewhere hidden keeps what it held.

    x (rows, in) contiguous; factors (1 + layers, 3) int64: the addresses of A and table and the
    number of columns, then for each layer of the group the address of B^T, its first column and its
    number of columns; hidden (1,) int64, the address; order (rows,) int32, the rows by adapter;
    adapters (rows,) int32, the table's line of each, in that order; merged (1,) int32, a line."""
    num_rows, in_features = x.shape
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), COLUMN_PROGRAMS, num_splits(in_features))
    _shrink[grid](
        x,
        factors,
        hidden,
        order,
        adapters,
        merged,
        num_rows,
        in_features,
        SPLIT_IN=SPLIT_IN,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_IN=BLOCK_IN,
    )


def expand(
    y: Tensor,
    layer: int,
    splits: int,
    factors: Tensor,
    hidden: Tensor,
    order: Tensor,
    adapters: Tensor,
    merged: Tensor,
) -> None:
    """y += (hidden * mask) B^T, in place; y (rows, out) is the part of one layer of the group, its
    rows may be apart. The other arguments are those of `shrink`."""
    num_rows, out_features = y.shape
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(out_features, BLOCK_OUT))
    _expand[grid](
        y,
        y.stride(0),
        factors,
        layer,
        hidden,
        order,
        adapters,
        merged,
        num_rows,
        out_features,
        splits,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_OUT=BLOCK_OUT,
    )


@triton.jit
def _masks(table, adapter, merged, columns, end, num_columns, live):
    """(tile's rows, block's columns) int32: 1, -1, or 0 for what needs no product. Columns from
    `end` on are another layer's."""
    inside = columns < end
    own = tl.load(
        table + adapter[:, None] * num_columns + columns[None, :],
        mask=live[:, None] & inside[None, :],
        other=0,
    ).to(tl.int32)
    merged_row = tl.load(table + tl.load(merged) * num_columns + columns, mask=inside, other=0).to(
        tl.int32
    )
    return tl.where(live[:, None], own - merged_row[None, :], 0)


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(
    x,
    factors,
    hidden,
    order,
    adapters,
    merged,
    num_rows,
    in_features,
    SPLIT_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    a = tl.multiple_of(tl.load(factors).to(tl.pointer_type(x.dtype.element_ty)), 16)
    table = tl.load(factors + 1).to(tl.pointer_type(tl.int8))
    num_columns = tl.load(factors + 2).to(tl.int32)
    out = tl.load(hidden).to(tl.pointer_type(tl.float32))
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = at < num_rows
    row = tl.load(order + at, mask=live, other=0)
    adapter = tl.load(adapters + at, mask=live, other=0)
    split = tl.program_id(2)
    first_in = split * SPLIT_IN
    for block in range(tl.program_id(1), tl.cdiv(num_columns, BLOCK_COLUMNS), tl.num_programs(1)):
        columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = _masks(table, adapter, merged, columns, num_columns, num_columns, live)
        if tl.sum(tl.sum(tl.abs(mask), 1), 0) > 0:
            sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for start in range(first_in, tl.minimum(first_in + SPLIT_IN, in_features), BLOCK_IN):
                inputs = start + tl.arange(0, BLOCK_IN)
                inside = inputs < in_features
                x_tile = tl.load(
                    x + row[:, None] * in_features + inputs[None, :],
                    mask=live[:, None] & inside[None, :],
                    other=0,
                )
                a_tile = tl.load(
                    a + columns[None, :] * in_features + inputs[:, None],
                    mask=(columns < num_columns)[None, :] & inside[:, None],
                    other=0,
                )
                sums = tl.dot(x_tile, a_tile, sums, input_precision="ieee")  # (rows, columns)
            tl.store(
                out + (split * num_rows + at)[:, None] * num_columns + columns[None, :],
                sums,
                mask=live[:, None] & (columns < num_columns)[None, :],
            )


@triton.jit(do_not_specialize=["num_rows", "splits", "layer"])
def _expand(
    y,
    y_stride,
    factors,
    layer,
    hidden,
    order,
    adapters,
    merged,
    num_rows,
    out_features,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    table = tl.load(factors + 1).to(tl.pointer_type(tl.int8))
    num_columns = tl.load(factors + 2).to(tl.int32)
    own_factors = factors + 3 * (layer + 1)
    b_t = tl.multiple_of(tl.load(own_factors).to(tl.pointer_type(y.dtype.element_ty)), 16)
    first_column = tl.load(own_factors + 1).to(tl.int32)
    layer_columns = tl.load(own_factors + 2).to(tl.int32)
    hidden_rows = tl.load(hidden).to(tl.pointer_type(tl.float32))
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = at < num_rows
    row = tl.load(order + at, mask=live, other=0)
    adapter = tl.load(adapters + at, mask=live, other=0)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outputs < out_features
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    num_active = 0
    for block in range(tl.cdiv(layer_columns, BLOCK_COLUMNS)):
        own = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        columns = first_column + own
        end = first_column + layer_columns
        mask = _masks(table, adapter, merged, columns, end, num_columns, live)
        active = tl.sum(tl.sum(tl.abs(mask), 1), 0)
        num_active += active
        if active > 0:
            part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for split in range(splits):
                part += tl.load(
                    hidden_rows + (split * num_rows + at)[:, None] * num_columns + columns[None, :],
                    mask=mask != 0,  # what the mask makes zero may never have been written
                    other=0,
                )
            b_tile = tl.load(
                b_t + own[:, None] * out_features + outputs[None, :],
                mask=(own < layer_columns)[:, None] & inside[None, :],
                other=0,
            )
            part = (part * mask.to(tl.float32)).to(b_tile.dtype)
            sums = tl.dot(part, b_tile, sums, input_precision="ieee")  # (rows, out)
    if num_active > 0:
        place = y + row[:, None] * y_stride + outputs[None, :]
        inside_y = live[:, None] & inside[None, :]
        old = tl.load(place, mask=inside_y, other=0).to(tl.float32)
        tl.store(place, (old + sums).to(y.dtype.element_ty), mask=inside_y)
