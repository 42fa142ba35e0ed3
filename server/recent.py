"""What clients felt in the last minutes, by adapter: for people who look at it now. Prometheus has
the history (`metrics.py`)."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

WINDOW_S = 120.0
SLOT_S = 10.0
GROWTH = 1.05
"""Of the bounds of buckets: a quantile is at most 2.5 % off."""

SHORTEST_S, LONGEST_S = 1e-5, 1e4
"""Durations are told apart between these; so there are at most 425 buckets."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of the last WINDOW_S seconds. Quantiles are in seconds, None where nothing was measured."""

    requests: int  # that got their first token
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    tokens_per_s: float


@dataclass(slots=True)
class _Slot:
    """What was counted within SLOT_S seconds: durations by bucket."""

    number: int
    first: Counter[int] = field(default_factory=Counter)
    gaps: Counter[int] = field(default_factory=Counter)
    num_tokens: int = 0


class Series:
    """One adapter's. It takes the same memory whatever its load. Event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slots: deque[_Slot] = deque(maxlen=round(WINDOW_S / SLOT_S))

    def first_token(self, seconds: float, count: int) -> None:
        """The first `count` tokens of a request were written `seconds` after its arrival."""
        slot = self._slot()
        slot.first[_bucket(seconds)] += 1
        slot.num_tokens += count

    def tokens(self, seconds: float, count: int) -> None:
        """The next `count`, each `seconds` after the one before."""
        slot = self._slot()
        slot.gaps[_bucket(seconds)] += count
        slot.num_tokens += count

    def latency(self) -> Latency:
        first, gaps, num_tokens = Counter[int](), Counter[int](), 0
        for slot in self._recent():
            first.update(slot.first)
            gaps.update(slot.gaps)
            num_tokens += slot.num_tokens
        return Latency(
            requests=first.total(),
            ttft_p50_s=_quantile(first, 0.5),
            ttft_p95_s=_quantile(first, 0.95),
            inter_token_p50_s=_quantile(gaps, 0.5),
            inter_token_p95_s=_quantile(gaps, 0.95),
            tokens_per_s=num_tokens / WINDOW_S,
        )

    def _slot(self) -> _Slot:
        number = int(self._clock() // SLOT_S)
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(_Slot(number))
        return self._slots[-1]

    def _recent(self) -> Iterator[_Slot]:
        oldest = int((self._clock() - WINDOW_S) // SLOT_S)
        return (slot for slot in self._slots if slot.number > oldest)


class Recent:
    """The series of all adapters, by their label in the metrics. Event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._series: dict[str, Series] = {}

    def series(self, label: str) -> Series:
        """Where to count; made at the first call."""
        return self._series.setdefault(label, Series(self._clock))

    def latency(self, label: str) -> Latency:
        return self._series.get(label, _NONE).latency()

    def forget(self, label: str) -> None:
        self._series.pop(label, None)


_NONE = Series()


def _bucket(seconds: float) -> int:
    within = min(max(seconds, SHORTEST_S), LONGEST_S)
    return round(math.log(within, GROWTH))


def _quantile(counts: Counter[int], q: float) -> float | None:
    """The middle of the bucket with the value that `q` of all are not above."""
    rank = math.ceil(q * counts.total())
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return float(GROWTH**bucket)
    return None
