"""Figures of a load: percentiles per adapter and in all, throughput, errors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kasa_runtime.loadtest.load import Load, Sample
from kasa_runtime.types import ModelInfo

if TYPE_CHECKING:
    from kasa_runtime.loadtest.openai import ServedModel


@dataclass(frozen=True)
class Percentiles:
    """Of durations, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None of no values."""
        if not values:
            return None
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99))
        return cls(
            float(np.mean(values)), float(p50), float(p90), float(p95), float(p99), max(values)
        )


@dataclass(frozen=True)
class Figures:
    """Of the requests for one adapter ("": the base model), or of all (None). Times are those of
    requests that succeeded."""

    adapter: str | None
    num_requests: int
    num_failed: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None

    @classmethod
    def of(cls, adapter: str | None, samples: Sequence[Sample], duration_s: float) -> Figures:
        good = [sample for sample in samples if not sample.error]
        output_tokens = sum(sample.num_tokens for sample in samples)
        return cls(
            adapter,
            len(samples),
            len(samples) - len(good),
            output_tokens,
            output_tokens / duration_s,
            Percentiles.of([sample.ttft_s for sample in good if sample.ttft_s is not None]),
            Percentiles.of([gap for sample in good for gap in sample.itl_s]),
            Percentiles.of([sample.e2e_s for sample in good]),
        )


@dataclass(frozen=True)
class Report:
    """A whole load. `settings`: what was asked for, by flag."""

    settings: dict[str, Any]
    model: ModelInfo | ServedModel
    interrupted: bool  # what was in flight then is not counted
    duration_s: float  # until the last answer
    requests_per_s: float  # that succeeded
    cached_prompt_share: float  # of prompt tokens, those found in the KV cache, 0 to 1
    max_in_flight: int
    send_lag_s: Percentiles | None  # how much later than due requests were sent
    errors: dict[str, int]  # reason -> number
    all: Figures
    adapters: list[Figures]  # most requests first

    @classmethod
    def of(
        cls,
        load: Load,
        settings: dict[str, Any],
        model: ModelInfo | ServedModel,
        *,
        interrupted: bool,
    ) -> Report:
        """Of a load with at least one sample."""
        samples = load.samples
        duration_s = max(sample.end_s for sample in samples)
        figures = Figures.of(None, samples, duration_s)
        prompt_tokens = sum(sample.prompt_tokens for sample in samples)
        cached = sum(sample.cached_prompt_tokens for sample in samples)
        return cls(
            settings,
            model,
            interrupted,
            duration_s,
            (figures.num_requests - figures.num_failed) / duration_s,
            cached / prompt_tokens if prompt_tokens else 0.0,
            load.max_in_flight,
            Percentiles.of([sample.sent_s - sample.due_s for sample in samples]),
            dict(Counter(sample.error for sample in samples if sample.error).most_common()),
            figures,
            _by_adapter(samples, duration_s),
        )

    @property
    def summary(self) -> dict[str, str]:
        """The figures that are of all requests alone, for people."""
        lag = self.send_lag_s
        errors = ", ".join(f"{count} {error}" for error, count in self.errors.items())
        return {
            "requests": f"{self.all.num_requests}, {self.all.num_failed} failed"
            + (", interrupted" if self.interrupted else ""),
            "errors": errors or "none",
            "duration": f"{self.duration_s:.1f} s",
            "requests per second": f"{self.requests_per_s:.2f}",
            "output tokens per second": f"{self.all.output_tokens_per_s:.1f}",
            "prompt tokens from cache": f"{self.cached_prompt_share:.0%}",
            "most in flight": str(self.max_in_flight),
            "sent late by": f"{lag.p50 * 1e3:.1f} ms, p99 {lag.p99 * 1e3:.1f} ms" if lag else "",
        }


def _by_adapter(samples: Iterable[Sample], duration_s: float) -> list[Figures]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.adapter].append(sample)
    figures = [Figures.of(adapter, group, duration_s) for adapter, group in groups.items()]
    return sorted(figures, key=lambda each: (-each.num_requests, each.adapter or ""))


TIMES = {"ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "e2e"}
SHOWN = ("p50", "p95", "p99")


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for all requests and for each adapter; times in ms."""
    header = ["adapter", "requests", "failed", "tokens/s"]
    header += [f"{name} {each}" for name in TIMES.values() for each in SHOWN]
    groups = [report.all, *report.adapters]
    return header, [_row(figures) for figures in groups]


def _row(figures: Figures) -> list[str]:
    name = "all" if figures.adapter is None else figures.adapter or "(base model)"
    counts = [str(figures.num_requests), str(figures.num_failed)]
    found = [getattr(figures, field) for field in TIMES]
    times = [f"{getattr(p, each) * 1e3:.1f}" if p else "" for p in found for each in SHOWN]
    return [name, *counts, f"{figures.output_tokens_per_s:.1f}", *times]
