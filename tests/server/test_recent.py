from __future__ import annotations

import pytest

from kasa_runtime.types import AdapterInfo, AdapterState, TokenChunk
from server.metrics import Metrics
from server.recent import SLOT_S, WINDOW_S, Recent


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> Recent:
    return Recent(clock)


def test_quantiles_are_within_their_buckets(recent):
    series = recent.series("one")
    for milliseconds in range(1, 101):
        series.first_token(milliseconds / 1000, 1)
        series.tokens(milliseconds / 10_000, 2)
    found = recent.latency("one")
    assert found.requests == 100
    assert found.ttft_p50_s == pytest.approx(0.050, rel=0.026)
    assert found.ttft_p95_s == pytest.approx(0.095, rel=0.026)
    assert found.inter_token_p50_s == pytest.approx(0.0050, rel=0.026)
    assert found.inter_token_p95_s == pytest.approx(0.0095, rel=0.026)
    assert found.tokens_per_s == pytest.approx(300 / WINDOW_S)


def test_what_is_old_is_forgotten(recent, clock):
    recent.series("one").first_token(1.0, 1)
    clock.now_s += WINDOW_S / 2
    recent.series("one").first_token(2.0, 1)
    assert recent.latency("one").requests == 2
    clock.now_s += WINDOW_S / 2 + SLOT_S
    assert recent.latency("one").requests == 1
    clock.now_s += WINDOW_S
    found = recent.latency("one")
    assert (found.requests, found.ttft_p50_s, found.tokens_per_s) == (0, None, 0.0)


def test_memory_does_not_grow_with_load_or_time(recent, clock):
    series = recent.series("one")
    for number in range(5000):
        clock.now_s += 1.0
        series.tokens(number / 1000, 1)
        series.tokens(1e-9, 1)
        series.tokens(1e9, 1)
    assert len(series._slots) == WINDOW_S / SLOT_S
    assert all(len(slot.gaps) <= 425 for slot in series._slots)


def test_nothing_is_known_of_what_was_never_asked(recent):
    assert recent.latency("one").requests == 0


def test_a_delivery_counts_for_its_adapter_until_that_is_gone():
    metrics = Metrics()
    one = AdapterInfo("one", "abc", AdapterState.READY)
    metrics.adapters_changed([one])
    delivery = metrics.delivery("one@abc", arrival_s=0.0)
    delivery.wrote(TokenChunk("a", (1, 2)))
    delivery.wrote(TokenChunk("b", (3,)))
    metrics.delivery("", arrival_s=0.0).wrote(TokenChunk("a", (1,)))
    found = metrics.recent.latency("one")
    assert found.requests == metrics.recent.latency("_base").requests == 1
    assert found.tokens_per_s == 3 / WINDOW_S
    assert found.inter_token_p50_s is not None
    metrics.adapters_changed([])
    delivery.wrote(TokenChunk("c", (4,)))
    assert metrics.recent.latency("one").requests == 0
