"""Attention over a packed batch and a paged KV cache, as an attention function of transformers.

transformers' own model code calls `paged_attention` in every layer through its attention interface;
the step's `AttentionPlan` travels there as a keyword argument. Queries, keys and values come as (1,
heads, tokens, head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_runtime.engine.native.executor import PackedBatch, SequenceSlice
from kasa_runtime.errors import ModelError

NAME = "kasa_paged"


@dataclass(frozen=True)
class KvCache:
    """Keys and values of all layers, (num_slots, kv_heads, head_dim) each; a block is `block_size`
    slots in a row. The last block is no sequence's: rows that only fill a batch up write there."""

    keys: list[Tensor]
    values: list[Tensor]
    block_size: int


class Plan(Protocol):
    """What all layers of a step share."""

    @property
    def cache(self) -> KvCache: ...

    @property
    def new_slots(self) -> Tensor:
        """(num_tokens,) int64: where the new keys and values go."""

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
        """query (heads, tokens, head_dim), keys and values of a layer's cache, the new ones stored
        -> (tokens, heads, head_dim)."""


@dataclass(frozen=True)
class Group:
    """Sequences whose attention is one call: all single-token ones, or one with several tokens.

    `mask` is added to the scores; keys beyond a sequence's length, or after a token, are -inf."""

    rows: slice  # of the packed tokens
    num_sequences: int
    key_slots: Tensor  # (num_sequences * longest,) slots in the cache
    positions: Tensor  # (num_sequences, queries) of the query tokens
    mask: Tensor  # (num_sequences, 1, queries, longest) in the model's dtype


@dataclass(frozen=True)
class AttentionPlan:
    """Gathers each sequence's keys and values; for any step on any device."""

    cache: KvCache
    new_slots: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def make(cls, batch: PackedBatch, cache: KvCache) -> AttentionPlan:
        like = cache.keys[0]
        slots = [_slots(s.block_table, s.context_len, cache.block_size) for s in batch.sequences]
        new = [own[s.num_computed :] for own, s in zip(slots, batch.sequences, strict=True)]
        groups = tuple(
            _group(rows, batch.sequences[first:last], slots[first:last], like)
            for rows, first, last in _runs(batch.sequences)
        )
        return cls(cache, torch.cat(new).to(like.device), groups)

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
        parts = []
        for group in self.groups:
            rows, mask = query[:, group.rows], _windowed(group, sliding_window)
            parts.append(_attend(rows, keys, values, group, mask, scaling, softcap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store the new keys and values, attend to all stored ones. Returns (1, tokens, heads,
    head_dim).

    Raises ModelError for an architecture that this function cannot serve exactly."""
    if plan is None:
        raise ModelError(
            "this architecture does not pass keyword arguments on to its attention function, so "
            "the native engine cannot serve it; try another engine"
        )
    if s_aux is not None:
        raise ModelError("attention sinks are not supported by the torch executor")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = plan.cache.keys[layer], plan.cache.values[layer]
    keys.index_copy_(0, plan.new_slots, key[0].transpose(0, 1))  # (tokens, kv_heads, head_dim)
    values.index_copy_(0, plan.new_slots, value[0].transpose(0, 1))
    output = plan.attend(
        query[0],
        keys,
        values,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output[None], None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """query (heads, n * queries, head_dim) -> (n * queries, heads, head_dim), for n sequences."""
    heads, num_rows, head_dim = query.shape
    n, kv_heads = group.num_sequences, keys.shape[1]
    queries, share = num_rows // n, heads // kv_heads
    k = keys.index_select(0, group.key_slots).view(n, -1, kv_heads, head_dim).transpose(1, 2)
    v = (
        values.index_select(0, group.key_slots)
        .view(n, -1, kv_heads, values.shape[2])
        .transpose(1, 2)
    )
    # Heads that share a key head become queries of it, so that no key is copied: (n, kv_heads,
    # share * queries, dim).
    q = query.view(kv_heads, share, n, queries, head_dim).permute(2, 0, 1, 3, 4)
    q = q.reshape(n, kv_heads, share * queries, head_dim)
    mask = mask.repeat(1, 1, share, 1) if queries > 1 else mask
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        scale = head_dim**-0.5 if scaling is None else scaling
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap) + mask
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    out = out.view(n, kv_heads, share, queries, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows, heads, -1)


def _windowed(group: Group, sliding_window: int | None) -> Tensor:
    """The group's mask, without the keys that lie `sliding_window` or more tokens back."""
    longest = group.mask.shape[-1]
    if not sliding_window or longest <= sliding_window:
        return group.mask
    key_positions = torch.arange(longest, device=group.mask.device)
    too_old = key_positions <= group.positions[:, None, :, None] - sliding_window
    return group.mask.masked_fill(too_old, -torch.inf)


def _slots(block_table: Any, length: int, block_size: int) -> Tensor:
    """Slots of a sequence's first `length` tokens."""
    blocks = torch.tensor(block_table)
    return (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)[:length]


def _runs(sequences: tuple[SequenceSlice, ...]) -> list[tuple[slice, int, int]]:
    """(rows, first, last) of the groups: neighbouring single-token sequences together, each longer
    one alone."""
    runs: list[tuple[slice, int, int]] = []
    row = 0
    for i, seq in enumerate(sequences):
        end = row + seq.num_tokens
        if runs and seq.num_tokens == 1 and sequences[i - 1].num_tokens == 1:
            rows, first, _ = runs[-1]
            runs[-1] = (slice(rows.start, end), first, i + 1)
        else:
            runs.append((slice(row, end), i, i + 1))
        row = end
    return runs


def _group(
    rows: slice, sequences: tuple[SequenceSlice, ...], slots: list[Tensor], like: Tensor
) -> Group:
    longest = max(s.context_len for s in sequences)
    queries = sequences[0].num_tokens
    key_slots = torch.zeros(len(sequences), longest, dtype=torch.int64)  # 0: any slot, masked
    for i, own in enumerate(slots):
        key_slots[i, : len(own)] = own
    first = torch.tensor([s.num_computed for s in sequences])
    positions = first[:, None] + torch.arange(queries)  # (n, queries)
    future = torch.arange(longest) > positions[:, None, :, None]
    mask = torch.zeros(future.shape).masked_fill_(future, -torch.inf)
    return Group(
        rows,
        len(sequences),
        key_slots.view(-1).to(like.device),
        positions.to(like.device),
        mask.to(like.device, like.dtype),
    )
