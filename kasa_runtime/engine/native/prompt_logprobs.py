"""From logits to the log-probabilities of prompts' tokens.

A prompt's token is scored by the logits of the one before it, in the step that computes that one:
once, whatever chunks the prompt is computed in, and not again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from kasa_runtime.engine.native.scheduler import ScheduledBatch
from kasa_runtime.types import TokenLogprobs

SLAB, SLAB_ON_GPU = 2**18, 2**24
"""Logits that are looked at together: so many fit the processor's cache, or keep a GPU busy, and
what is made of them is small beside them all."""


def score_prompts(logits: Tensor, batch: ScheduledBatch) -> Tensor:
    """Give sequences of the batch, which is not counted as computed yet, the log-probabilities of
    their prompts' tokens. Of `logits` (num_logits, vocab) returns the rows to sample from."""
    sampling: list[int] = []
    row = 0
    for seq, num_tokens in batch.entries:
        if wanted := seq.scoring(num_tokens):
            own = logits[row : row + len(wanted)]
            following = seq.token_ids[wanted.start + 1 : wanted.stop + 1]
            seq.prompt_logprobs += _logprobs(own, following, seq.request.prompt_logprobs or 0)
            row += len(wanted)
        if num_tokens == seq.num_pending:
            sampling.append(row)
            row += 1
    return logits if len(sampling) == row else logits[sampling]


def _logprobs(logits: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """Of each row of `logits` (rows, vocab) that of its token, and the `num_top` highest."""
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    vocab = logits.shape[1]
    num_top = min(num_top, vocab)
    slab = max(1, (SLAB if logits.is_cpu else SLAB_ON_GPU) // vocab)
    parts = []
    for rows, row_ids in zip(logits.split(slab), ids.split(slab), strict=True):
        values = torch.log_softmax(rows, dim=-1)  # (slab, vocab)
        parts.append((values.gather(1, row_ids), *values.topk(num_top)))
    own, best, best_ids = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
    return [
        TokenLogprobs(token_id, value, tuple(zip(top_ids, top, strict=True)))
        for token_id, [value], top, top_ids in zip(token_ids, own, best, best_ids, strict=True)
    ]
