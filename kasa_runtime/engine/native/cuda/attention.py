"""Attention of a decode step by torch's flex_attention, which reads the paged cache where it lies.

One token of each sequence. All that changes between steps lies at fixed addresses, so that a
captured graph attends to whatever the tables say when it is replayed.

flex_attention is compiled by torch for the shapes of the first call; it knows no page tables but
skips blocks of keys that a BlockMask does not list, and a mask says of a slot, not of a position,
whether it is visible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kasa_runtime.engine.native.paged_attention import KvCache

BLOCK_SIZE = 128
"""Tokens per block of the KV cache: a multiple of every tile that flex_attention may choose."""

ABSENT = 2**30
"""Position of a slot that is not a sequence's; later than any token."""


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class DecodePlan:
    """One token of each of n sequences."""

    cache: KvCache
    new_slots: Tensor
    positions: Tensor  # (n,) int64 of the tokens
    block_tables: Tensor  # (n, blocks of the cache) int32; a sequence's own are its first
    num_blocks: Tensor  # (n,) int32: how many these are; 0 for a row that only fills the batch up
    first_positions: Tensor  # (n, blocks of the cache) int64, of each block in each sequence
    flex_attention: Callable[..., Any]
    _masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        kv: KvCache,
        new_slots: Tensor,
        positions: Tensor,
        block_tables: Tensor,
        num_blocks: Tensor,
        *,
        flex_attention: Callable[..., Any],
    ) -> DecodePlan:
        """Reads its tensors on their device only."""
        columns = torch.arange(block_tables.shape[1], device=positions.device)
        own = columns < num_blocks[:, None]
        tables = torch.where(own, block_tables, block_tables.shape[1] - 1)  # the last is nobody's
        firsts = torch.where(own, columns * kv.block_size, ABSENT)
        first_positions = torch.full_like(firsts, ABSENT).scatter_(1, tables.long(), firsts)
        return cls(kv, new_slots, positions, tables, num_blocks, first_positions, flex_attention)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        heads, n, head_dim = query.shape
        kv_heads = keys.shape[1]
        # Heads that share a key head become queries of it: flex_attention's kernel for few queries
        # takes no number of them that is not a power of two.
        q = query.view(kv_heads, heads // kv_heads, n, head_dim).permute(2, 0, 1, 3)
        output = self.flex_attention(
            q.contiguous(),  # (n, kv_heads, share, head_dim)
            keys.transpose(0, 1)[None],  # (1, kv_heads, slots, head_dim)
            values.transpose(0, 1)[None],
            score_mod=_soft_capping(softcap) if softcap else None,
            block_mask=self._mask(sliding_window, heads // kv_heads),
            scale=scaling,
        )
        return output.reshape(n, heads, values.shape[2])  # type: ignore[no-any-return]

    def _mask(self, sliding_window: int | None, num_queries: int) -> BlockMask:
        if sliding_window not in self._masks:
            self._masks[sliding_window] = BlockMask.from_kv_blocks(
                self.num_blocks[:, None, None],
                self.block_tables[:, None, None],
                BLOCK_SIZE=(BLOCK_SIZE, self.cache.block_size),
                mask_mod=self._visible(sliding_window or ABSENT),
                seq_lengths=(num_queries, self.cache.keys[0].shape[0]),
                compute_q_blocks=False,  # for backward
            )
        return self._masks[sliding_window]

    def _visible(self, window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        block_size, positions, firsts = self.cache.block_size, self.positions, self.first_positions

        def visible(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            position = firsts[row, slot // block_size] + slot % block_size
            return (position <= positions[row]) & (position > positions[row] - window)

        return visible


def _soft_capping(cap: float) -> Callable[..., Tensor]:
    def soft_capped(
        score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor
    ) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft_capped
