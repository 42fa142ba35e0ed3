"""The few series of a vLLM server that gateways route by, read from the runtime when it is scraped.

Names and meanings are those of vLLM, so that routers made for it need not know us: an adapter is
listed in `vllm:lora_requests_info` while requests for it run or wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kasa_runtime.types import BASE
from server.gauges import StatsSource


class VllmMetrics(Collector):
    """Event loop only."""

    def __init__(self, source: StatsSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        stats, model = self._source.stats(), self._source.model.name
        usage = "Share of the KV cache in use, 0 to 1"
        for name, help, value in (
            ("num_requests_running", "Requests in the batch", stats.num_requests_running),
            ("num_requests_waiting", "Requests in the queue", stats.num_requests_waiting),
            ("kv_cache_usage_perc", usage, stats.kv_cache_usage),
            ("gpu_cache_usage_perc", f"{usage}; an older name", stats.kv_cache_usage),
        ):
            metric = GaugeMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            metric.add_metric([model], value)
            yield metric
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with requests, separated by commas; the value is the time, in Unix seconds",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = _names(stats.running_adapters), _names(stats.waiting_adapters)
        adapters.add_metric([str(stats.num_slots), running, waiting], time.time())
        yield adapters


def _names(adapters: Mapping[str, int]) -> str:
    return ",".join(sorted(name for name in adapters if name != BASE))
