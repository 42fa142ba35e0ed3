"""From logits to the next token of every sequence, vectorised over the batch.

Every draw is a pure function of the logits, the parameters, the seed and the position in the
output: neither the rest of the batch nor a preemption changes it. Greedy rows are never more than
an argmax, and only rows with top_k or top_p look for the most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.types import SamplingParams, TokenLogprobs

SPAN = 256
"""Neighbouring tokens that are summed up before a token is drawn from the sums."""

SMALLEST = torch.finfo(torch.float32).tiny
BELOW_ONE = 1.0 - 2.0**-52


def sample(
    logits: Tensor, rows: Rows[Sequence], eos_ids: frozenset[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each row and, where asked for, its log-probabilities.

    `logits` (len(rows), vocab) float32 may be changed in place. Order: constraints, penalties,
    temperature, top_k, top_p, min_p. Tokens as likely as the last one that a filter keeps are kept
    too."""
    raw = _rows_for_logprobs(logits, rows)
    _apply_constraints(logits, rows)
    _forbid_early_end(logits, rows, eos_ids)
    _apply_penalties(logits, rows)
    drawn = [i for i, seq in enumerate(rows) if seq.request.sampling.temperature > 0]
    tokens = _argmax(logits) if len(drawn) < len(rows) else [0] * len(rows)
    if drawn:
        own = logits if len(drawn) == len(rows) else logits[drawn]
        for i, token in zip(drawn, _draw(own, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens, _logprobs(raw, rows, tokens)


def _argmax(logits: Tensor) -> list[int]:
    if logits.is_cpu:  # numpy's is vectorised, torch's is not
        return logits.numpy().argmax(axis=-1).tolist()  # type: ignore[no-any-return]
    return logits.argmax(dim=-1).tolist()


def _draw(logits: Tensor, rows: Rows[Sequence]) -> list[int]:
    """One token of each row's filtered distribution. Changes `logits` (rows, vocab)."""
    params = [seq.request.sampling for seq in rows]
    temperatures = torch.tensor([max(p.temperature, SMALLEST) for p in params])
    # The most likely token weighs 1, so no temperature, however small, overflows.
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights.div_(temperatures.to(weights.device)[:, None]).exp_()
    _filter(weights, params)
    uniforms = torch.from_numpy(uniform(rows)).to(weights.device)
    return _inverse_cdf(weights, uniforms).tolist()


def uniform(rows: Rows[Sequence]) -> NDArray[np.float64]:
    """A number in [0, 1) for each row, from its seed and output position: SplitMix64, whose steps
    can be taken in any order."""
    seeds = np.array([seq.seed for seq in rows], np.uint64)
    positions = np.array([seq.num_output_tokens for seq in rows], np.uint64)
    bits = _mix(_mix(seeds) + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _filter(weights: Tensor, params: Rows[SamplingParams]) -> None:
    """Take the weight from all tokens that top_k, top_p or min_p leave out."""
    if not any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        return
    if not weights.is_cpu:
        weights.masked_fill_(weights < _least_weights(weights, params), 0.0)
        return
    # A row at a time, since it fits the processor's cache; and less than the vocabulary is sorted.
    for row, p in zip(weights.numpy(), params, strict=True):
        if least := _least_weight(row, p):
            np.multiply(row, row >= least, out=row)


def _least_weights(weights: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """The least weight in each row that is kept: of the top_k most likely tokens, the fewest whose
    share reaches top_p, and of these, min_p. `weights` (rows, vocab) -> (rows, 1)."""
    vocab, device = weights.shape[1], weights.device
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    ordered = weights.sort(dim=-1, descending=True).values
    least = ordered.gather(1, top_k - 1)
    shares = ordered.masked_fill_(ordered < least, 0.0).cumsum(dim=-1, dtype=torch.float64)
    last = (shares < top_p * shares[:, -1:]).sum(dim=-1, keepdim=True)
    least = torch.where(top_p < 1, ordered.gather(1, last), least)
    return torch.maximum(least, min_p)


def _least_weight(row: NDArray[np.float32], p: SamplingParams) -> float:
    """The same of one row (vocab,) on the CPU."""
    vocab = len(row)
    least = np.float32(0)
    if 0 < p.top_k < vocab:
        least = np.partition(row, vocab - p.top_k)[vocab - p.top_k]
    if p.top_p < 1:
        kept = np.compress(row >= least, row) if least else row
        total = float(kept.sum())
        # All that weigh less than this weigh less than 1 - top_p together.
        kept = np.compress(kept >= (1 - p.top_p) * total / len(kept), kept)
        kept = np.sort(kept)[::-1]
        last = np.searchsorted(kept.cumsum(dtype=np.float64), p.top_p * total)
        least = kept[min(int(last), len(kept) - 1)]
    return max(float(least), p.min_p)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row at which the sum of weights (rows, vocab) passes that share of the
    total: (rows,). First the span of tokens, then the token in it."""
    vocab = weights.shape[1]
    whole = vocab - vocab % SPAN
    spans = weights[:, :whole].unflatten(1, (-1, SPAN)).sum(dim=-1)  # (rows, whole / SPAN)
    spans = torch.cat([spans, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1).double()
    ends = spans.cumsum(dim=-1)
    target = uniforms[:, None] * ends[:, -1:]  # (rows, 1)
    span = torch.searchsorted(ends, target, right=True)
    weight = spans.gather(1, span)
    share = (target - ends.gather(1, span) + weight) / weight  # of the span that lies before it
    tokens = span * SPAN + torch.arange(SPAN, device=weights.device)  # (rows, SPAN)
    inside = weights.gather(1, tokens.clamp(max=vocab - 1)).double()
    ends = inside.masked_fill_(tokens >= vocab, 0.0).cumsum(dim=-1)
    target = share.clamp(0.0, BELOW_ONE) * ends[:, -1:]
    return (span * SPAN + torch.searchsorted(ends, target, right=True))[:, 0]


def _apply_constraints(logits: Tensor, rows: Rows[Sequence]) -> None:
    """Leave each row the tokens that its constraint lets follow, at least one."""
    bound = [(i, seq, seq.constraint) for i, seq in enumerate(rows) if seq.constraint is not None]
    if not bound:
        return
    words = np.empty((len(bound), bound[0][2].num_words), np.int32)
    for own, (_, seq, constraint) in zip(words, bound, strict=True):
        constraint.fill(own, go_on=seq.request.sampling.ignore_eos or _is_early(seq))
    vocab = logits.shape[1]
    allowed = np.unpackbits(words.view(np.uint8), axis=1, count=vocab, bitorder="little")
    forbidden = allowed == 0  # (len(bound), vocab)
    index = [i for i, _, _ in bound]
    if logits.is_cpu:  # numpy's is faster, a row at a time
        for i, where in zip(index, forbidden, strict=True):
            np.copyto(logits[i].numpy(), -np.inf, where=where)
    else:
        where_on_device = torch.from_numpy(forbidden).to(logits.device)
        logits[index] = logits[index].masked_fill(where_on_device, -torch.inf)


def _is_early(seq: Sequence) -> bool:
    return seq.num_output_tokens < seq.request.sampling.min_tokens


def _forbid_early_end(logits: Tensor, rows: Rows[Sequence], eos_ids: frozenset[int]) -> None:
    early = [i for i, seq in enumerate(rows) if _is_early(seq) and seq.constraint is None]
    if early and eos_ids:
        rows_index = torch.tensor(early, device=logits.device)[:, None]
        logits[rows_index, torch.tensor(sorted(eos_ids), device=logits.device)] = -torch.inf


def _apply_penalties(logits: Tensor, rows: Rows[Sequence]) -> None:
    penalised = [i for i, seq in enumerate(rows) if _is_penalised(seq.request.sampling)]
    if not penalised:
        return
    params = [rows[i].request.sampling for i in penalised]
    tokens = [rows[i].token_counts() for i in penalised]
    lengths = [len(own.ids) for own in tokens]

    def of_rows(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, np.float32), lengths)

    counts = np.concatenate([own.counts for own in tokens])
    subtracted = of_rows([p.presence_penalty for p in params]) * (counts > 0)
    subtracted += of_rows([p.frequency_penalty for p in params]) * counts
    row, ids, repetition, less = (
        torch.from_numpy(values).to(logits.device)
        for values in (
            np.repeat(penalised, lengths),
            np.concatenate([own.ids for own in tokens]),
            of_rows([p.repetition_penalty for p in params]),
            subtracted,
        )
    )
    values = logits[row, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[row, ids] = values - less


def _is_penalised(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


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
