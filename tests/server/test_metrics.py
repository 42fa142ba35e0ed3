from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_runtime import STYLE, FakeRuntime
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kasa_runtime.errors import LimitExceeded, Overloaded, ShuttingDown
from kasa_runtime.types import AdapterState, AdapterTier, FinishReason, Mode
from server.metrics import Gauges, Metrics

NAMES = {
    "kasa_time_to_first_token_seconds",
    "kasa_inter_token_latency_seconds",
    "kasa_e2e_request_latency_seconds",
    "kasa_request_queue_time_seconds",
    "kasa_num_requests_running",
    "kasa_num_requests_waiting",
    "kasa_kv_cache_usage_ratio",
    "kasa_prefix_cache_queries",
    "kasa_prefix_cache_hits",
    "kasa_prompt_tokens",
    "kasa_generation_tokens",
    "kasa_requests",
    "kasa_requests_refused",
    "kasa_adapter_info",
    "kasa_adapter_resident",
    "kasa_adapter_host_cache_bytes",
    "kasa_adapter_load_seconds",
    "kasa_merge_seconds",
    "kasa_merge_decisions",
    "kasa_adapter_merged",
    "kasa_adapter_token_share_ratio",
    "kasa_upload_rejected",
}


def infos(*names):
    return [replace(STYLE, name=name) for name in names]


def samples(metrics):
    """Every sample: its name and labels, without buckets, to its value."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def one_request(metrics, adapter):
    metrics.queued(adapter)
    metrics.first_token(adapter, queue_s=0.1, ttft_s=0.2, prompt_tokens=5)
    metrics.tokens(adapter, count=1, gap_s=None)
    metrics.tokens(adapter, count=2, gap_s=0.02)
    metrics.finished(adapter, Mode.BATCHED, FinishReason.STOP, total_s=0.3)


@pytest.fixture
def metrics():
    metrics = Metrics(max_adapters=2)
    metrics.adapters_changed(infos("one", "two", "three"))
    return metrics


async def test_every_name_of_the_contract_is_there(metrics):
    metrics.registry.register(Gauges(FakeRuntime(metrics), metrics.label))
    text = generate_latest(metrics.registry).decode()
    assert {family.name for family in text_string_to_metric_families(text)} == NAMES


def test_one_request_is_counted(metrics):
    one_request(metrics, "one")
    found = samples(metrics)
    adapter = ("adapter", "one")
    assert found["kasa_prompt_tokens_total", adapter] == 5
    assert found["kasa_generation_tokens_total", adapter] == 3
    assert found["kasa_time_to_first_token_seconds_sum", adapter] == 0.2
    assert found["kasa_request_queue_time_seconds_sum", adapter] == 0.1
    assert found["kasa_inter_token_latency_seconds_count", adapter] == 2
    assert found["kasa_inter_token_latency_seconds_sum", adapter] == pytest.approx(0.02)
    assert found["kasa_e2e_request_latency_seconds_sum", adapter] == 0.3
    labels = (adapter, ("finish_reason", "stop"), ("mode", "batched"))
    assert found["kasa_requests_total", *labels] == 1


@pytest.mark.parametrize(
    ("error", "reason"), [(RuntimeError(), "error"), (asyncio.CancelledError(), "cancelled")]
)
def test_request_that_failed_or_was_cancelled_is_counted(metrics, error, reason):
    metrics.failed("one", error)
    labels = (("adapter", "one"), ("finish_reason", reason), ("mode", "unknown"))
    assert samples(metrics)["kasa_requests_total", *labels] == 1


@pytest.mark.parametrize(
    ("error_type", "reason"),
    [
        (Overloaded, "overloaded"),
        (LimitExceeded, "limit_exceeded"),
        (ShuttingDown, "shutting_down"),
    ],
)
def test_requests_that_are_to_come_again_are_counted_by_reason(metrics, error_type, reason):
    metrics.failed("one", error_type("no", retry_after_s=1.0))
    metrics.failed("one", RuntimeError())
    refused = {k: v for k, v in samples(metrics).items() if k[0] == "kasa_requests_refused_total"}
    labels = (("adapter", "one"), ("reason", reason))
    assert refused == {("kasa_requests_refused_total", *labels): 1}
    metrics.adapters_changed(infos("two"))
    assert not any(("adapter", "one") in labels for _, *labels in samples(metrics))


def test_label_is_bounded(metrics):
    for adapter in ("", "one", "two", "three", "made up", "another"):
        one_request(metrics, adapter)
    found = samples(metrics)
    label = {
        dict(labels)["adapter"]
        for name, *labels in found
        if any(key == "adapter" for key, _ in labels)
    }
    assert label == {"_base", "one", "two", "_other"}
    assert found["kasa_prompt_tokens_total", ("adapter", "_other")] == 15


def test_series_of_a_deleted_adapter_vanish_and_its_place_is_free(metrics):
    one_request(metrics, "one")
    metrics.adapters_changed(infos("two", "three"))
    assert not any(("adapter", "one") in labels for _, *labels in samples(metrics))
    one_request(metrics, "three")
    assert samples(metrics)["kasa_prompt_tokens_total", ("adapter", "three")] == 5


def test_reasons_of_rejected_uploads_are_bounded(metrics):
    for index in range(100):
        metrics.upload_rejected(f"reason {index}")
    reasons = [key for key in samples(metrics) if key[0] == "kasa_upload_rejected_total"]
    assert len(reasons) == 33


def test_load_and_merge(metrics):
    metrics.adapter_loaded("one", stage="read", seconds=0.5)
    metrics.merged("one", seconds=0.25)
    for adapter in ("one", "two", ""):
        metrics.merge_decided(adapter)
    found = samples(metrics)
    assert found["kasa_merge_decisions_total", ("action", "merge")] == 2
    assert found["kasa_merge_decisions_total", ("action", "unmerge")] == 1
    assert found["kasa_adapter_load_seconds_sum", ("stage", "read")] == 0.5
    assert found["kasa_merge_seconds_sum",] == 0.25


async def test_gauges_are_read_from_the_runtime(metrics):
    runtime = FakeRuntime(metrics)
    metrics.registry.register(Gauges(runtime, metrics.label))
    runtime.put(replace(STYLE, state=AdapterState.RESIDENT, tier=AdapterTier.SLOT))
    runtime.put(replace(STYLE, name="warm", tier=AdapterTier.HOST))
    runtime.running.add("id")
    runtime.merged = "style@abc123"
    found = samples(metrics)
    assert found["kasa_num_requests_running",] == 1
    assert found["kasa_num_requests_waiting",] == 0
    assert found["kasa_kv_cache_usage_ratio",] == 0.25
    assert found["kasa_prefix_cache_queries_total",] == 30
    assert found["kasa_prefix_cache_hits_total",] == 20
    assert found["kasa_adapter_resident", ("adapter", "style"), ("tier", "slot")] == 1
    assert found["kasa_adapter_resident", ("adapter", "_other"), ("tier", "host")] == 1
    assert found["kasa_adapter_host_cache_bytes",] == 512
    assert found["kasa_adapter_merged", ("adapter", "style")] == 1
    assert found["kasa_adapter_token_share_ratio", ("adapter", "style")] == 0.75
    assert found["kasa_adapter_token_share_ratio", ("adapter", "_base")] == 0.25
    (info,) = (dict(labels) for name, *labels in found if dict(labels).get("version") == "abc123")
    assert info["adapter"] == "style"
    assert (info["rank"], info["rule"], info["state"]) == ("8", "min_dim", "resident")
