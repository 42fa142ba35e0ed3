"""From arrival times to figures and ratios, against closed forms."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.cases import Case, Mix
from benchmarks.peers.measures import (
    Measures,
    Pair,
    Record,
    Side,
    Spread,
    agreement,
    measures,
    ratios,
    spreads,
)
from benchmarks.peers.systems import pairs

BASE = Case(Mix.BASE, 8, 32)
NO_MEMORY = {"peak_rss_bytes": 0, "resident_bytes": 0}
OURS, OTHER = Side("ours", Mix.BASE), Side("other", Mix.BASE)

arrival_times = st.lists(
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6), min_size=1, max_size=5
).map(lambda gaps: [[sum(row[: i + 1]) for i in range(len(row))] for row in gaps])


def record(
    system: str,
    rate: float,
    round_: int = 0,
    case: Case = BASE,
    token_ids: list[list[int]] | None = None,
) -> Record:
    found = Measures(rate, ttft_s=0.5, itl_p50_s=0.1, itl_p99_s=0.2, **NO_MEMORY)
    return Record(system, case, round_, found, token_ids or [[1, 2, 3]])


def test_decoding_counts_from_the_moment_when_all_have_their_first_token() -> None:
    # The first request's tokens at 1 and 2 came while the second one still waited.
    found = measures(
        [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]], peak_rss_bytes=7, resident_bytes=6
    )
    assert found.decode_tokens_per_s == pytest.approx(5 / 3)
    assert found.ttft_s == pytest.approx(1.5)
    assert (found.peak_rss_bytes, found.resident_bytes) == (7, 6)


def test_inter_token_latency_is_of_single_requests() -> None:
    found = measures([[0.0, 0.1, 0.2], [5.0, 5.1, 5.5]], **NO_MEMORY)
    assert found.itl_p50_s == pytest.approx(0.1)
    assert found.itl_p99_s == pytest.approx(0.1 + 0.97 * 0.3)  # between the 3rd and 4th of 4 gaps


@given(arrival_times, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_a_slower_clock_scales_all_times_alike(token_s: list[list[float]], factor: float) -> None:
    before = measures(token_s, **NO_MEMORY)
    after = measures([[factor * s for s in times] for times in token_s], **NO_MEMORY)
    assert after.decode_tokens_per_s == pytest.approx(before.decode_tokens_per_s / factor)
    for name in ("ttft_s", "itl_p50_s", "itl_p99_s"):
        assert getattr(after, name) == pytest.approx(factor * getattr(before, name))


@given(arrival_times)
def test_the_order_of_requests_is_of_no_account(token_s: list[list[float]]) -> None:
    assert measures(token_s, **NO_MEMORY) == pytest.approx(measures(token_s[::-1], **NO_MEMORY))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_the_median_lies_within_the_spread(values: list[float]) -> None:
    found = Spread.of(values)
    assert (found.low, found.high) == (min(values), max(values))
    assert found.low <= found.median <= found.high


def test_a_ratio_is_taken_within_a_round() -> None:
    """Noise that doubles both sides of a round must not show: the medians' ratio would be 1."""
    records = [
        *(record("ours", rate, i) for i, rate in enumerate([20.0, 40.0, 10.0])),
        *(record("other", rate, i) for i, rate in enumerate([10.0, 20.0, 20.0])),
    ]
    [found] = ratios(records, [Pair(OURS, OTHER)])
    assert found.spread == Spread(2.0, 0.5, 2.0)
    assert (found.num_rounds, found.concurrency, found.prompt_tokens) == (3, 8, 32)


def test_a_round_that_one_side_lacks_does_not_count() -> None:
    records = [record("ours", 20.0, 0), record("ours", 99.0, 1), record("other", 10.0, 0)]
    [found] = ratios(records, [Pair(OURS, OTHER)])
    assert (found.spread.median, found.num_rounds) == (2.0, 1)


def test_only_batches_of_one_size_are_compared() -> None:
    records = [record("ours", 20.0, case=BASE), record("other", 10.0, case=Case(Mix.BASE, 8, 256))]
    assert ratios(records, [Pair(OURS, OTHER)]) == []


def test_a_pair_is_compared_where_it_says() -> None:
    sizes = [Case(Mix.BASE, n, length) for n in (1, 8) for length in (32, 256)]
    records = [record(system, 1.0, case=case) for system in ("ours", "other") for case in sizes]
    pair = Pair(OURS, OTHER, concurrencies=(1,), prompt_tokens=(256,), measure="ttft_s")
    [found] = ratios(records, [pair])
    assert (found.concurrency, found.prompt_tokens) == (1, 256)


def test_spreads_are_by_system_and_case() -> None:
    one, other = BASE, Case(Mix.MIXED, 8, 32)
    records = [record("ours", 1.0), record("ours", 3.0, 1), record("ours", 7.0, case=other)]
    assert spreads(records, "decode_tokens_per_s") == {
        ("ours", one): Spread(2.0, 1.0, 3.0),
        ("ours", other): Spread(7.0, 7.0, 7.0),
    }


def test_agreement_ends_at_the_first_difference() -> None:
    records = [
        record("transformers", 1.0, token_ids=[[1, 2, 3, 4], [5, 6, 7, 8]]),
        record("ours", 1.0, token_ids=[[1, 2, 3, 4], [5, 0, 7, 8]]),
        record("ours", 1.0, round_=1, token_ids=[[0, 0, 0, 0], [0, 0, 0, 0]]),  # nothing to compare
    ]
    assert agreement(records, "transformers") == {"ours": pytest.approx((1 + 0.25) / 2)}


def test_a_record_survives_its_line_of_json() -> None:
    before = record("ours", 12.5, 3, Case(Mix.MANY, 32, 256))
    assert Record.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_a_variant_of_ours_is_compared_with_its_peers_and_with_ours() -> None:
    found = pairs(["transformers", "ours-int8"])
    assert {pair.ours.system for pair in found} == {"ours-int8"}
    assert Pair(Side("ours-int8", Mix.MIXED), Side("ours", Mix.MIXED)) in found
    assert Pair(Side("ours-int8", Mix.MIXED), Side("vllm-lora", Mix.MIXED)) in found
