"""The requests of a case."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.cases import FIRST_TOKEN_ID, Case, Mix, cases, zipf_choice


@given(st.integers(0, 50), st.integers(1, 64), st.integers())
def test_zipf_chooses_among_the_adapters(count: int, num_adapters: int, seed: int) -> None:
    chosen = zipf_choice(count, num_adapters, random.Random(seed))
    assert len(chosen) == count
    assert all(0 <= i < num_adapters for i in chosen)


def test_zipf_prefers_the_first() -> None:
    counts = Counter(zipf_choice(100_000, 64, random.Random(0)))
    assert set(counts) == set(range(64))
    for k in (1, 3, 7):
        assert counts[0] / counts[k] == pytest.approx(k + 1, rel=0.1)


@pytest.mark.parametrize(
    ("mix", "want", "num_held"),
    [
        (Mix.BASE, [""] * 10, 0),
        (Mix.IDLE, [""] * 10, 8),
        (Mix.MERGED, ["a0"] * 10, 1),
        (Mix.ONE, ["a0"] * 10, 1),
        (Mix.MIXED, ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a0", "a1"], 8),
    ],
)
def test_a_mix_says_who_uses_what(mix: Mix, want: list[str], num_held: int) -> None:
    case = Case(mix, 10, 32)
    assert case.adapters(0) == want
    assert case.num_held == num_held


def test_many_adapters_are_drawn_anew_in_every_round() -> None:
    case = Case(Mix.MANY, 32, 32)
    assert case.adapters(0) == case.adapters(0) != case.adapters(1)
    assert len(set(case.adapters(0))) > 8


def test_prompts_are_the_same_for_everybody_and_new_in_every_round() -> None:
    case = Case(Mix.BASE, 4, 16)
    prompts = case.prompts(0, 1000)
    assert prompts == case.prompts(0, 1000)
    assert [len(ids) for ids in prompts] == [16] * 4
    assert all(FIRST_TOKEN_ID <= i < 1000 for ids in prompts for i in ids)
    seen = [*prompts, *case.prompts(1, 1000), *Case(Mix.IDLE, 4, 16).prompts(0, 1000)]
    assert len({tuple(ids) for ids in seen}) == 12


def test_a_batch_that_is_too_small_has_no_many_adapters() -> None:
    found = cases(list(Mix), [8, 32], [32])
    assert Case(Mix.MANY, 32, 32) in found
    assert Case(Mix.MANY, 8, 32) not in found
    assert len(found) == 2 * len(Mix) - 1
