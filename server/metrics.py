"""Prometheus metrics: the runtime's events counted as they come, gauges read when they are scraped.

The label `adapter` is bounded. The base model is `_base`; of the adapters that exist, the first
`max_adapters` have their own name; all else, names that clients make up included, is `_other`.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kasa_runtime.errors import Overloaded
from kasa_runtime.errors import reason as reason_of
from kasa_runtime.types import AdapterInfo, FinishReason, Mode, Observer, RuntimeStats

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
        self._reasons: set[str] = set()
        self._ttft = self._histogram(
            "kasa_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "kasa_inter_token_latency_seconds", "Between two tokens of a request", TOKEN_BUCKETS
        )
        self._e2e = self._histogram(
            "kasa_e2e_request_latency_seconds",
            "From the arrival of a request to its end",
            REQUEST_BUCKETS,
        )
        self._queue = self._histogram(
            "kasa_request_queue_time_seconds",
            "From the arrival of a request to when it is first scheduled",
            FIRST_TOKEN_BUCKETS,
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
        return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def first_token(
        self, adapter: str, *, queue_s: float, ttft_s: float, prompt_tokens: int
    ) -> None:
        label = self.label(adapter)
        self._queue.labels(label).observe(queue_s)
        self._ttft.labels(label).observe(ttft_s)
        self._prompt_tokens.labels(label).inc(prompt_tokens)

    def tokens(self, adapter: str, *, count: int, gap_s: float | None) -> None:
        label = self.label(adapter)
        self._generated.labels(label).inc(count)
        if gap_s is not None:
            gaps = self._inter_token.labels(label)
            for _ in range(count):
                gaps.observe(gap_s / count)

    def finished(self, adapter: str, mode: Mode, reason: FinishReason, *, total_s: float) -> None:
        label = self.label(adapter)
        self._requests.labels(label, mode.value, reason.value).inc()
        self._e2e.labels(label).observe(total_s)

    def failed(self, adapter: str, error: BaseException) -> None:
        reason = FinishReason.CANCELLED.value if isinstance(error, CancelledError) else "error"
        label = self.label(adapter)
        self._requests.labels(label, "unknown", reason).inc()
        if isinstance(error, Overloaded):
            self._refused.labels(label, reason_of(type(error)).lower()).inc()

    def adapter_loaded(self, adapter: str, *, stage: str, seconds: float) -> None:
        self._load.labels(stage).observe(seconds)

    def merged(self, adapter: str, *, seconds: float) -> None:
        self._merge.observe(seconds)

    def merge_decided(self, adapter: str) -> None:
        self._decisions.labels("merge" if adapter else "unmerge").inc()

    def upload_rejected(self, reason: str) -> None:
        if len(self._reasons) < MAX_REASONS:
            self._reasons.add(reason)
        self._rejected.labels(reason if reason in self._reasons else OTHER_LABEL).inc()

    def adapters_changed(self, adapters: Sequence[AdapterInfo]) -> None:
        by_adapter = (self._ttft, self._inter_token, self._e2e, self._queue)
        counters = (self._prompt_tokens, self._generated, self._requests, self._refused)
        for name in self.label.update(adapters):
            for metric in (*by_adapter, *counters):
                metric.remove_by_labels({"adapter": name})


class StatsSource(Protocol):
    """What of a runtime the gauges are read from."""

    def stats(self) -> RuntimeStats: ...
    def list_adapters(self) -> list[AdapterInfo]: ...


class Gauges(Collector):
    """Asks the runtime when Prometheus asks us."""

    def __init__(self, source: StatsSource, label: AdapterLabels) -> None:
        self._source = source
        self._label = label

    def collect(self) -> Iterator[Metric]:
        stats = self._source.stats()
        yield GaugeMetricFamily(
            "kasa_num_requests_running", "Requests in the batch", stats.num_requests_running
        )
        yield GaugeMetricFamily(
            "kasa_num_requests_waiting", "Requests in the queue", stats.num_requests_waiting
        )
        yield GaugeMetricFamily(
            "kasa_kv_cache_usage_ratio",
            "Share of the KV cache in use, 0 to 1",
            stats.kv_cache_usage,
        )
        yield CounterMetricFamily(
            "kasa_prefix_cache_queries",
            "Prompt tokens looked for in the KV cache",
            stats.prefix_cache_queries,
        )
        yield CounterMetricFamily(
            "kasa_prefix_cache_hits",
            "Prompt tokens found in the KV cache",
            stats.prefix_cache_hits,
        )
        yield self._resident(stats)
        yield GaugeMetricFamily(
            "kasa_adapter_host_cache_bytes",
            "Weights of adapters in memory that are in no slot",
            stats.host_tier_bytes,
        )
        yield self._merged(stats)
        yield self._shares(stats)
        yield self._info(self._source.list_adapters())

    def _resident(self, stats: RuntimeStats) -> Metric:
        metric = GaugeMetricFamily(
            "kasa_adapter_resident",
            "Adapters in memory, by where: slot, or host for those in no slot",
            labels=["adapter", "tier"],
        )
        counts: dict[tuple[str, str], int] = {}
        for name, tier in stats.resident_adapters.items():
            key = (self._label(name), tier)
            counts[key] = counts.get(key, 0) + 1
        for labels, count in counts.items():
            metric.add_metric(labels, count)
        return metric

    def _merged(self, stats: RuntimeStats) -> Metric:
        metric = GaugeMetricFamily(
            "kasa_adapter_merged", "The adapter that is inside the weights, 1", labels=["adapter"]
        )
        if stats.merged_adapter:
            metric.add_metric([self._label(stats.merged_adapter.partition("@")[0])], 1)
        return metric

    def _shares(self, stats: RuntimeStats) -> Metric:
        metric = GaugeMetricFamily(
            "kasa_adapter_token_share_ratio",
            "Share of the latest tokens, by which auto mode decides, 0 to 1",
            labels=["adapter"],
        )
        shares: dict[str, float] = {}
        for key, share in stats.token_shares.items():
            label = self._label(key.partition("@")[0])
            shares[label] = shares.get(label, 0.0) + share
        for label, share in shares.items():
            metric.add_metric([label], share)
        return metric

    def _info(self, adapters: list[AdapterInfo]) -> Metric:
        labels = ["adapter", "version", "method", "rank", "rule", "state"]
        metric = GaugeMetricFamily("kasa_adapter_info", "Adapters, always 1", labels=labels)
        for info in adapters:
            if self._label(info.name) == OTHER_LABEL:
                continue
            rank = str(info.rank)
            values = [info.name, info.version, info.method, rank, info.truncation_rule, info.state]
            metric.add_metric(values, 1)
        return metric
