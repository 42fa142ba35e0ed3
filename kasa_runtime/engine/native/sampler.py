"""From logits to the next token of every sequence, vectorised over the batch.

Every draw is a pure function of the logits, the parameters, the seed and the position in the
output: neither the rest of the batch nor a preemption changes it. Greedy rows never sort the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.types import SamplingParams, TokenLogprobs

NUCLEUS_GUESS = 1024
"""Tokens looked at first for top_p; only a row whose nucleus is larger sorts the vocabulary."""


def sample(
    logits: Tensor, rows: Rows[Sequence], eos_ids: frozenset[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each row and, where asked for, its log-probabilities.

    `logits` (len(rows), vocab) float32 may be changed in place. Order: penalties, temperature,
    top_k, top_p, min_p."""
    raw = _rows_for_logprobs(logits, rows)
    _forbid_early_end(logits, rows, eos_ids)
    _apply_penalties(logits, rows)
    tokens = logits.argmax(dim=-1).tolist()
    for i, seq in enumerate(rows):
        if seq.request.sampling.temperature > 0:
            tokens[i] = _draw(logits[i], seq.request.sampling, _uniform(seq))
    return tokens, _logprobs(raw, rows, tokens)


def _uniform(seq: Sequence) -> float:
    """A number in [0, 1) from the seed and the output position (Philox, a counter-based
    generator)."""
    generator = np.random.Generator(np.random.Philox(key=seq.seed, counter=seq.num_output_tokens))
    return float(generator.random())


def _draw(logits: Tensor, params: SamplingParams, u: float) -> int:
    """One token from the filtered distribution: inverse cumulative distribution at `u`. `logits`
    (vocab,)."""
    below_max = (logits - logits.max()).double()  # so that no temperature, however small, overflows
    probs = torch.softmax(below_max / params.temperature, dim=-1)
    if params.top_k or params.top_p < 1:
        candidates, ids = _nucleus(probs, params)
    else:
        candidates, ids = probs, None
    if params.min_p:
        candidates = torch.where(candidates >= params.min_p * candidates.max(), candidates, 0.0)
    cumulative = candidates.cumsum(0)
    target = torch.tensor([u * float(cumulative[-1])], dtype=torch.float64, device=probs.device)
    chosen = int(torch.searchsorted(cumulative, target, right=True).clamp_(max=len(candidates) - 1))
    return chosen if ids is None else int(ids[chosen])


def _nucleus(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The top_k most likely tokens, then the fewest of those whose share reaches top_p; most likely
    first."""
    vocab = probs.shape[0]
    k = min(params.top_k or NUCLEUS_GUESS, vocab)
    top, ids = probs.topk(k)
    if not params.top_k and k < vocab and float(top.sum()) < params.top_p:
        top, ids = probs.sort(descending=True)
    if params.top_p < 1:
        before = top.cumsum(0) - top  # what lies above each candidate
        mass = float(top.sum()) if params.top_k else 1.0
        keep = before < params.top_p * mass
        keep[0] = True
        top, ids = top[keep], ids[keep]
    return top, ids


def _forbid_early_end(logits: Tensor, rows: Rows[Sequence], eos_ids: frozenset[int]) -> None:
    early = [i for i, s in enumerate(rows) if s.num_output_tokens < s.request.sampling.min_tokens]
    if early and eos_ids:
        rows_index = torch.tensor(early, device=logits.device)[:, None]
        logits[rows_index, torch.tensor(sorted(eos_ids), device=logits.device)] = -torch.inf


def _apply_penalties(logits: Tensor, rows: Rows[Sequence]) -> None:
    for i, seq in enumerate(rows):
        p = seq.request.sampling
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(seq.token_ids)), device=logits.device)
            values = logits[i, seen]
            factor = p.repetition_penalty
            logits[i, seen] = torch.where(values > 0, values / factor, values * factor)
        if (p.presence_penalty or p.frequency_penalty) and seq.num_output_tokens:
            output = torch.tensor(seq.output_ids, device=logits.device)
            ids, counts = output.unique(return_counts=True)
            logits[i, ids] -= p.presence_penalty + p.frequency_penalty * counts.to(logits.dtype)


def _rows_for_logprobs(logits: Tensor, rows: Rows[Sequence]) -> dict[int, Tensor]:
    """Log-probabilities (vocab,) of the model's own distribution, for the rows that want them."""
    wanted = [i for i, s in enumerate(rows) if s.request.sampling.logprobs is not None]
    if not wanted:
        return {}
    values = torch.log_softmax(logits[wanted], dim=-1)
    return dict(zip(wanted, values, strict=True))


def _logprobs(
    raw: dict[int, Tensor], rows: Rows[Sequence], tokens: list[int]
) -> list[TokenLogprobs | None]:
    results: list[TokenLogprobs | None] = [None] * len(rows)
    for i, values in raw.items():
        top: tuple[tuple[int, float], ...] = ()
        if count := rows[i].request.sampling.logprobs:
            best, ids = values.topk(min(count, values.shape[0]))
            top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
        results[i] = TokenLogprobs(tokens[i], float(values[tokens[i]]), top)
    return results
