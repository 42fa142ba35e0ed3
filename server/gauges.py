"""Metrics that are read from the runtime when Prometheus asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kasa_runtime import __version__
from kasa_runtime.types import BASE, AdapterInfo, AdapterState, ModelInfo, RuntimeStats
from server.metrics import OTHER_LABEL


class StatsSource(Protocol):
    """What of a runtime the gauges are read from."""

    @property
    def model(self) -> ModelInfo: ...
    def stats(self) -> RuntimeStats: ...
    def list_adapters(self) -> list[AdapterInfo]: ...


class Gauges(Collector):
    """Event loop only. `label` gives the bounded label value of an adapter's name."""

    def __init__(self, source: StatsSource, label: Callable[[str], str]) -> None:
        self._source = source
        self._label = label

    def collect(self) -> Iterator[Metric]:
        stats, adapters = self._source.stats(), self._source.list_adapters()
        for name, help, value in (
            ("kasa_num_requests_running", "Requests in the batch", stats.num_requests_running),
            ("kasa_num_requests_waiting", "Requests in the queue", stats.num_requests_waiting),
            (
                "kasa_kv_cache_usage_ratio",
                "Share of the KV cache in use, 0 to 1",
                stats.kv_cache_usage,
            ),
            ("kasa_adapter_slots", "Places for adapters in the engine", stats.num_slots),
            (
                "kasa_adapter_host_cache_bytes",
                "Weights of adapters in memory that are in no slot",
                stats.host_tier_bytes,
            ),
        ):
            yield GaugeMetricFamily(name, help, value)
        for name, help, value in (
            (
                "kasa_prefix_cache_queries",
                "Prompt tokens looked for in the KV cache",
                stats.prefix_cache_queries,
            ),
            (
                "kasa_prefix_cache_hits",
                "Prompt tokens found in the KV cache",
                stats.prefix_cache_hits,
            ),
            ("kasa_engine_steps", "Steps of the engine, each one batch", stats.num_steps),
            (
                "kasa_num_preemptions",
                "Requests that gave their place in the KV cache to others, to be computed again",
                stats.num_preemptions,
            ),
        ):
            yield CounterMetricFamily(name, help, value)
        yield self._requests(
            "kasa_adapter_requests_running",
            "Requests in the engine",
            stats.running_adapters,
            adapters,
        )
        yield self._requests(
            "kasa_adapter_requests_waiting",
            "Requests that wait in front of the engine",
            stats.waiting_adapters,
            adapters,
        )
        yield self._resident(stats)
        yield self._merged(stats)
        yield self._shares(stats)
        yield self._states(adapters)
        yield self._info(adapters)
        yield self._model()

    def _requests(
        self, name: str, help: str, counts: Mapping[str, int], adapters: list[AdapterInfo]
    ) -> Metric:
        metric = GaugeMetricFamily(name, help, labels=["adapter"])
        # Those without requests have series too: one that comes and goes leaves gaps in a graph.
        by_label = Counter(dict.fromkeys(map(self._label, [BASE, *(a.name for a in adapters)]), 0))
        for adapter, count in counts.items():
            by_label[self._label(adapter)] += count
        for label, count in by_label.items():
            metric.add_metric([label], count)
        return metric

    def _states(self, adapters: list[AdapterInfo]) -> Metric:
        metric = GaugeMetricFamily("kasa_adapters", "Adapters, by state", labels=["state"])
        counts = Counter(info.state for info in adapters)
        for state in AdapterState:
            metric.add_metric([state.value], counts[state])
        return metric

    def _model(self) -> Metric:
        """What is served, and by what."""
        model = self._source.model
        values = {
            "version": __version__,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "engine": model.engine,
            "executor": model.executor,
            "dtype": model.dtype,
        }
        return InfoMetricFamily("kasa_build", "The server and its base model, always 1", values)

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
