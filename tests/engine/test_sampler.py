"""The sampler against a straightforward one in numpy, and its draws against the distribution."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.native.sampler import _least_weight, _least_weights, sample, uniform
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.engine.native.token_counts import TokenCounts
from kasa_runtime.types import SamplingParams

VOCAB = 24
EOS = frozenset({0, 5})
PROMPT = (1, 2, 2, 3)
LOGITS = 2.0 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(7)).flip(0)


def row(output: Rows[int] = (), **params: Any) -> Sequence:
    seq = Sequence(EngineRequest("a", PROMPT, SamplingParams(**params)))
    seq.token_ids += output
    return seq


def draw(logits: Tensor, rows: Rows[Sequence]) -> list[int]:
    """One token for each row, all with the same logits."""
    return sample(logits.expand(len(rows), -1).clone(), rows, EOS)[0]


def reference(logits: Tensor, seq: Sequence) -> np.ndarray:
    """Probability of each token, step by step as SamplingParams describes it."""
    p = seq.request.sampling
    x = logits.double().numpy().copy()
    output = seq.token_ids[len(PROMPT) :]
    if len(output) < p.min_tokens:
        x[list(EOS)] = -np.inf
    for token in set(seq.token_ids):
        x[token] *= p.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in set(output):
        x[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    if p.temperature == 0:
        return np.eye(len(x))[int(x.argmax())]
    x = x / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if p.top_k:
        probs[order[p.top_k :]] = 0
        probs /= probs.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass >= p.top_p:
            break
        kept.append(token)
        mass += probs[token]
    outside = np.setdiff1d(order, kept)
    if p.top_p < 1:
        probs[outside] = 0
    probs[probs < p.min_p * probs.max()] = 0
    return probs / probs.sum()


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 10, 1000]),
        "top_p": st.sampled_from([1e-6, 0.31, 0.72, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.4, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.9]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.5]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.8]),
        "min_tokens": st.integers(0, 4),
    },
)
OUTPUTS = st.lists(st.integers(0, VOCAB - 1), max_size=5)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(PARAMS, OUTPUTS, st.integers(0, 2**31))
def test_only_tokens_of_the_reference_are_drawn(
    params: dict[str, Any], output: list[int], logits_seed: int
) -> None:
    logits = 3.0 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(logits_seed))
    rows = [row(output, **params, seed=seed) for seed in range(30)]
    wanted = reference(logits, rows[0])
    drawn = draw(logits, rows)
    assert all(wanted[token] > 0 for token in drawn)
    if wanted.max() > 0.9:
        assert int(wanted.argmax()) in drawn


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.7, "top_k": 8, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.8, "min_tokens": 9},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": -0.7},
    ],
    ids=lambda p: ",".join(p),
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    rows = [row([4, 9, 9, 11], **params, seed=seed) for seed in range(4000)]
    wanted = reference(LOGITS, rows[0])
    counts = np.bincount(draw(LOGITS, rows), minlength=VOCAB)
    assert counts[wanted == 0].sum() == 0
    assert chi_square_p(counts, wanted) > 1e-3


def test_consecutive_positions_of_one_seed_follow_the_distribution() -> None:
    rows = [row([7] * position, temperature=1.0, seed=11) for position in range(4000)]
    counts = np.bincount(draw(LOGITS, rows), minlength=VOCAB)
    assert chi_square_p(counts, reference(LOGITS, row(temperature=1.0))) > 1e-3


@pytest.mark.parametrize("spread", [0.05, 3.0], ids=["flat", "peaked"])
def test_top_p_over_a_large_vocabulary(spread: float) -> None:
    logits = spread * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    rows = [row(temperature=1.0, top_p=0.9, seed=seed) for seed in range(3000)]
    wanted = reference(logits, rows[0])
    counts = np.bincount(draw(logits, rows), minlength=3000)
    assert counts[wanted == 0].sum() == 0
    bins = np.arange(3000) % 20
    assert chi_square_p(np.bincount(bins, counts), np.bincount(bins, wanted)) > 1e-3


def chi_square_p(counts: np.ndarray, wanted: np.ndarray) -> float:
    """The p-value of these counts; bins that expect fewer than five are put together."""
    expected = wanted * counts.sum()
    rare = expected < 5
    found, want = counts[~rare].astype(float), expected[~rare]
    if expected[rare].sum() > 0:
        found, want = np.append(found, counts[rare].sum()), np.append(want, expected[rare].sum())
    return float(chisquare(found, want).pvalue)


# --- rows do not see each other ------------------------------------------------------------------


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 4, "min_tokens": 3},
        {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 2.0},
        {"temperature": 1.0, "presence_penalty": 3.0, "logprobs": 2},
    ]
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(3))
    rows = [row([i % 7] * (i % 4), **kinds[i % 5], seed=i) for i in range(40)]
    together, _ = sample(logits.clone(), rows, EOS)
    alone = [sample(logits[i : i + 1].clone(), rows[i : i + 1], EOS)[0][0] for i in range(40)]
    backwards, _ = sample(logits.flip(0), rows[::-1], EOS)
    assert together == alone == backwards[::-1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(PARAMS, OUTPUTS), min_size=2, max_size=9),
    st.sampled_from([1, 24, 256, 700, 1024]),
    st.sampled_from([0.0, 0.1, 4.0]),
    st.integers(0, 2**31),
)
def test_rows_of_any_kind_do_not_see_each_other(
    kinds: list[tuple[dict[str, Any], list[int]]], vocab: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(kinds), max(vocab, VOCAB), generator=generator)
    logits = logits.round(decimals=1)  # so that some are equally likely
    rows = [row(output, **params, seed=seed + i) for i, (params, output) in enumerate(kinds)]
    together, _ = sample(logits.clone(), rows, EOS)
    alone = [
        sample(logits[i : i + 1].clone(), rows[i : i + 1], EOS)[0][0] for i in range(len(rows))
    ]
    assert together == alone


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(PARAMS, min_size=1, max_size=5), st.integers(1, 700), st.integers(0, 2**31))
def test_a_device_leaves_out_what_the_cpu_leaves_out(
    kinds: list[dict[str, Any]], vocab: int, seed: int
) -> None:
    weights = torch.randn(len(kinds), vocab, generator=torch.Generator().manual_seed(seed)).exp()
    weights /= weights.amax(dim=-1, keepdim=True)
    params = [SamplingParams(**kind) for kind in kinds]
    on_cpu = [_least_weight(w.numpy(), p) for w, p in zip(weights, params, strict=True)]
    kept = weights >= torch.tensor(on_cpu)[:, None]
    assert torch.equal(kept, weights >= _least_weights(weights, params))


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept_too() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, -5.0])
    for params in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
        rows = [row(temperature=1.0, seed=seed, **params) for seed in range(200)]
        assert set(draw(logits, rows)) == {1, 2, 3}


def test_uniform_numbers_are_uniform_over_seeds_and_positions() -> None:
    seeds = [row([7] * position, seed=seed) for seed in range(100) for position in range(40)]
    found = uniform(seeds)
    assert len(set(found)) == 4000 and found.min() >= 0 and found.max() < 1
    by_seed = found.reshape(100, 40)
    for values in (found, by_seed[:, 0], by_seed[0], (by_seed[:, 1:] - by_seed[:, :-1]) % 1):
        assert chisquare(np.histogram(values, 10, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(by_seed[:-1, 0], by_seed[1:, 0])[0, 1]) < 0.3


def test_the_seed_alone_decides_the_draw() -> None:
    first = [row([1] * i, temperature=1.5, seed=99) for i in range(50)]
    again = [row([1] * i, temperature=1.5, seed=99) for i in range(50)]
    other = [row([1] * i, temperature=1.5, seed=100) for i in range(50)]
    assert draw(LOGITS, first) == draw(LOGITS, again) != draw(LOGITS, other)


def test_the_largest_seed_is_taken() -> None:
    assert 0 <= draw(LOGITS, [row(temperature=1.0, seed=2**63 - 1)])[0] < VOCAB


# --- greedy and its edges ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1e-3},
        {"temperature": 1e-30},
        {"temperature": 5e-324},
    ],
    ids=str,
)
def test_the_most_likely_token_is_taken(params: dict[str, Any]) -> None:
    rows = [row(**params, seed=seed) for seed in range(50)]
    assert set(draw(LOGITS, rows)) == {int(LOGITS.argmax())}


def test_greedy_ignores_the_filters_of_sampling() -> None:
    assert draw(LOGITS, [row(top_k=3, top_p=0.1, min_p=0.9)]) == [int(LOGITS.argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_sequence_is_impossible_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(VOCAB)
    logits[[0, 5]] = 30.0
    early = [row([3] * 2, temperature=temperature, min_tokens=3, seed=s) for s in range(20)]
    due = [row([3] * 3, temperature=temperature, min_tokens=3, seed=s) for s in range(20)]
    assert not EOS & set(draw(logits, early))
    assert set(draw(logits, due)) <= EOS


def test_repetition_penalty_counts_the_prompt_and_the_others_do_not() -> None:
    logits = torch.full((VOCAB,), -1.0)
    logits[2], logits[6], logits[9] = 2.0, 1.9, 1.8  # 2 is in the prompt
    assert draw(logits, [row(presence_penalty=5.0, frequency_penalty=5.0)]) == [2]
    assert draw(logits, [row(repetition_penalty=1.5)]) == [6]
    assert draw(logits, [row([6], repetition_penalty=1.5)]) == [9]
    assert draw(logits, [row([2], presence_penalty=0.15)]) == [6]
    assert draw(logits, [row([2, 6, 6], frequency_penalty=0.12)]) == [2]


def test_tokens_are_counted_as_they_come() -> None:
    token_ids = [3, 1, 3]
    counts = TokenCounts(token_ids)
    draw_token = np.random.default_rng(0)
    for length in (1, 0, 7, 300, 40):
        token_ids += draw_token.integers(0, 200, length).tolist()
        counts.read(token_ids)
        found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
        assert found == {token: token_ids[3:].count(token) for token in token_ids}


# --- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_before_penalties_temperature_and_bans() -> None:
    kinds: list[dict[str, Any]] = [
        {"logprobs": 0},
        {"logprobs": 20, "temperature": 2.0, "repetition_penalty": 3.0, "min_tokens": 9},
        {},
        {"logprobs": 3, "presence_penalty": 9.0, "top_k": 1, "temperature": 0.1},
    ]
    logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5))
    tokens, found = sample(logits.clone(), [row([1, 1], **k, seed=1) for k in kinds], EOS)
    want = torch.log_softmax(logits.double(), dim=-1)
    for i, kind in enumerate(kinds):
        entry = found[i]
        if "logprobs" not in kind:
            assert entry is None
            continue
        assert entry is not None and entry.token_id == tokens[i]
        assert entry.logprob == pytest.approx(float(want[i, tokens[i]]), abs=1e-5)
        best, ids = want[i].topk(kind["logprobs"])
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_gives_all() -> None:
    _, [entry] = sample(torch.zeros(1, 6), [row(logprobs=20)], frozenset())
    assert entry is not None and len(entry.top) == 6


def test_nothing_to_sample() -> None:
    assert sample(torch.zeros(0, VOCAB), [], EOS) == ([], [])
