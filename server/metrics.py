"""Prometheus metrics: the runtime's events counted as they come. What is read when it is scraped
is in `gauges.py`, RPCs are in `grpc_metrics.py`.

Latencies that a client feels are taken where its bytes are written (`Delivery`); where the time
went is told by the runtime. Observations of a traced call carry its trace id, as exemplars.

The label `adapter` is bounded. The base model is `_base`; of the adapters that exist, the first
`max_adapters` have their own name; all else, names that clients make up included, is `_other`.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from kasa_runtime.errors import KasaError, Overloaded
from kasa_runtime.errors import reason as reason_of
from kasa_runtime.types import AdapterInfo, FinishReason, Mode, Observer, TokenChunk
from server.recent import Recent, Series
from server.trace_context import exemplar

BASE_LABEL, OTHER_LABEL = "_base", "_other"
MAX_REASONS = 32

# Seconds. From a model of millions of weights on a GPU to one of billions on a CPU.
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LOAD_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


M = TypeVar("M", Counter, Histogram)


class AdapterLabels:
    """Which adapters have their own label value."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._named: dict[str, None] = {}  # in the order in which they came

    def __call__(self, adapter: str) -> str:
        """The label value of an adapter."""
        if not adapter:
            return BASE_LABEL
        return adapter if adapter in self._named else OTHER_LABEL

    def update(self, adapters: Sequence[AdapterInfo]) -> list[str]:
        """These are all adapters. Returns the label values that are no longer used."""
        existing = dict.fromkeys(info.name for info in adapters)
        gone = [name for name in self._named if name not in existing]
        for name in gone:
            del self._named[name]
        free = [name for name in existing if name not in self._named]
        self._named |= dict.fromkeys(free[: self._max_adapters - len(self._named)])
        return gone


class Metrics(Observer):
    """Counts the events of one runtime, in a registry of its own."""

    def __init__(self, max_adapters: int = 100) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp beside each series
        self.registry = CollectorRegistry()
        self.label = AdapterLabels(max_adapters)
        self.recent = Recent()
        self._reasons: set[str] = set()
        self._by_adapter: list[Counter | Histogram] = []
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._ttft = self._histogram(
            "kasa_time_to_first_token_seconds",
            "From the arrival of a request to when its first token was written to the client",
            FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "kasa_inter_token_latency_seconds",
            "Between two tokens of a request, as they were written to the client",
            TOKEN_BUCKETS,
        )
        self._e2e = self._histogram(
            "kasa_e2e_request_latency_seconds",
            "From the arrival of a request to when its end was written to the client",
            REQUEST_BUCKETS,
        )
        self._queue = self._histogram(
            "kasa_request_queue_time_seconds",
            "From the arrival of a request to its first step, less the wait for its adapter",
            FIRST_TOKEN_BUCKETS,
        )
        self._load_wait = self._histogram(
            "kasa_request_adapter_load_time_seconds",
            "How long a request waited for its adapter to be in the engine",
            LOAD_BUCKETS,
        )
        self._prefill = self._histogram(
            "kasa_request_prefill_time_seconds",
            "From the first step of a request to its first token",
            FIRST_TOKEN_BUCKETS,
            None,
        )
        self._decode = self._histogram(
            "kasa_request_decode_time_seconds",
            "From the first token of a request to its last",
            REQUEST_BUCKETS,
            None,
        )
        self._prompt_tokens = self._counter("kasa_prompt_tokens", "Tokens of prompts", "adapter")
        self._generated = self._counter("kasa_generation_tokens", "Tokens generated", "adapter")
        self._requests = self._counter(
            "kasa_requests",
            "Requests that ended; finish_reason is `error` for those that failed",
            *("adapter", "mode", "finish_reason"),
        )
        self._refused = self._counter(
            "kasa_requests_refused",
            "Requests that were told to try again later: overloaded (the queue is full), "
            "limit_exceeded (of the adapter) or shutting_down",
            *("adapter", "reason"),
        )
        self._load = self._histogram(
            "kasa_adapter_load_seconds", "A stage of loading an adapter", LOAD_BUCKETS, "stage"
        )
        self._load_failed = self._counter(
            "kasa_adapter_load_failures",
            "Adapters that could not be brought into memory or into the engine",
            *("adapter", "reason"),
        )
        self._merge = self._histogram(
            "kasa_merge_seconds", "Merging an adapter, or putting the base back", LOAD_BUCKETS, None
        )
        self._decisions = self._counter(
            "kasa_merge_decisions", "Switches that auto mode decided on", "action"
        )
        self._rejected = self._counter("kasa_upload_rejected", "Uploads rejected", "reason")

    def _histogram(
        self, name: str, help: str, buckets: Sequence[float], label: str | None = "adapter"
    ) -> Histogram:
        labels = [label] if label else []
        histogram = Histogram(name, help, labels, buckets=buckets, registry=self.registry)
        return self._kept(histogram, labels)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return self._kept(Counter(name, help, labels, registry=self.registry), labels)

    def _kept(self, metric: M, labels: Sequence[str]) -> M:
        if "adapter" in labels:
            self._by_adapter.append(metric)
        return metric

    def delivery(self, adapter: str, arrival_s: float) -> Delivery:
        """Of a request for `adapter`, a name or name@version, that arrived at `arrival_s` on the
        clock of `time.monotonic`."""
        label = self.label(adapter.partition("@")[0])
        return Delivery(
            self._ttft.labels(label),
            self._inter_token.labels(label),
            self._e2e.labels(label),
            self.recent.series(label),
            arrival_s,
        )

    def first_token(
        self, adapter: str, *, queue_s: float, load_s: float, ttft_s: float, prompt_tokens: int
    ) -> None:
        label, mark = self.label(adapter), exemplar()
        self._queue.labels(label).observe(queue_s - load_s, mark)
        if adapter:
            self._load_wait.labels(label).observe(load_s, mark)
        self._prefill.observe(ttft_s - queue_s, mark)
        self._prompt_tokens.labels(label).inc(prompt_tokens)

    def tokens(self, adapter: str, *, count: int, gap_s: float | None) -> None:
        self._generated.labels(self.label(adapter)).inc(count)

    def finished(
        self, adapter: str, mode: Mode, reason: FinishReason, *, decode_s: float, total_s: float
    ) -> None:
        label, mark = self.label(adapter), exemplar()
        self._requests.labels(label, mode.value, reason.value).inc(exemplar=mark)
        if decode_s:
            self._decode.observe(decode_s, mark)

    def failed(self, adapter: str, error: BaseException) -> None:
        reason = FinishReason.CANCELLED.value if isinstance(error, CancelledError) else "error"
        label = self.label(adapter)
        self._requests.labels(label, "unknown", reason).inc(exemplar=exemplar())
        if isinstance(error, Overloaded):
            self._refused.labels(label, reason_of(type(error)).lower()).inc()

    def adapter_loaded(self, adapter: str, *, stage: str, seconds: float) -> None:
        self._load.labels(stage).observe(seconds)

    def adapter_load_failed(self, adapter: str, error: BaseException) -> None:
        reason = reason_of(type(error)).lower() if isinstance(error, KasaError) else "unknown"
        self._load_failed.labels(self.label(adapter), reason).inc()

    def merged(self, adapter: str, *, seconds: float) -> None:
        self._merge.observe(seconds)

    def merge_decided(self, adapter: str) -> None:
        self._decisions.labels("merge" if adapter else "unmerge").inc()

    def upload_rejected(self, reason: str) -> None:
        if len(self._reasons) < MAX_REASONS:
            self._reasons.add(reason)
        self._rejected.labels(reason if reason in self._reasons else OTHER_LABEL).inc()

    def adapters_changed(self, adapters: Sequence[AdapterInfo]) -> None:
        for name in self.label.update(adapters):
            self.recent.forget(name)
            for metric in self._by_adapter:
                metric.remove_by_labels({"adapter": name})


class Delivery:
    """When the tokens of one request are written to its client."""

    def __init__(
        self,
        ttft: Histogram,
        inter_token: Histogram,
        e2e: Histogram,
        recent: Series,
        arrival_s: float,
    ) -> None:
        self._ttft = ttft
        self._inter_token = inter_token
        self._e2e = e2e
        self._recent = recent
        self._arrival_s = arrival_s
        self._last_token_s: float | None = None

    def wrote(self, chunk: TokenChunk) -> None:
        """A chunk of a stream was written; or it could have been, where a call answers with all of
        them at once."""
        now_s, mark, count = time.monotonic(), exemplar(), len(chunk.token_ids)
        if count and self._last_token_s is None:
            self._ttft.observe(now_s - self._arrival_s, mark)
            self._recent.first_token(now_s - self._arrival_s, count)
        elif count and self._last_token_s is not None:
            gap_s = (now_s - self._last_token_s) / count
            for _ in range(count):
                self._inter_token.observe(gap_s, mark)
            self._recent.tokens(gap_s, count)
        if count:
            self._last_token_s = now_s
        if chunk.finish_reason is not None:
            self._e2e.observe(now_s - self._arrival_s, mark)
