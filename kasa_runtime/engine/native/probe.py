"""A few tokens through a fresh executor, before it serves: an architecture that would come out
wrong fails here and not, without a word, in every request."""

from __future__ import annotations

import torch
from torch import Tensor

from kasa_runtime.engine.native.executor import NO_SLOT, Executor, PackedBatch, SequenceSlice
from kasa_runtime.errors import ModelError

PROBE_TOKENS = 8


def probe(executor: Executor, token_ids: list[int], num_computed: int) -> Tensor:
    """Logits (tokens, vocab) of all these tokens of one sequence, which has the first blocks."""
    num_blocks = -(-(num_computed + len(token_ids)) // executor.block_size)
    seq = SequenceSlice(len(token_ids), num_computed, range(num_blocks), NO_SLOT)
    return executor.run(PackedBatch.pack(token_ids, [seq], list(range(len(token_ids))))).clone()


def require_split_prompts(
    executor: Executor, architecture: str, tolerance: float, num_last: int = PROBE_TOKENS // 2
) -> None:
    """A few tokens in one step, then again in two, the second with `num_last`: the logits agree
    unless the architecture keeps a state, or counts positions, beside what an executor hands it.
    Raises ModelError."""
    length = min(PROBE_TOKENS, executor.context_length, executor.num_blocks * executor.block_size)
    token_ids = [i % executor.vocab_size for i in range(length)]
    first = max(1, length - num_last)
    whole = probe(executor, token_ids, 0)[first:]
    probe(executor, token_ids[:first], 0)
    if first == length:
        return
    error = torch.dist(probe(executor, token_ids[first:], first), whole)
    if not error <= tolerance * torch.dist(whole, whole.mean()):
        raise ModelError(
            f"{architecture} gives other logits when a prompt is split over two steps, so this "
            "engine cannot serve it; try another engine"
        )
