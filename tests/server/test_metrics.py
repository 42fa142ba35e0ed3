from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runtime import STYLE, FakeRuntime
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kasa_runtime.errors import AdapterInvalid, LimitExceeded, Overloaded, ShuttingDown
from kasa_runtime.types import AdapterState, AdapterTier, FinishReason, Mode, TokenChunk
from server.gauges import Gauges
from server.grpc_metrics import GrpcMetrics
from server.http.metrics import HttpMetrics
from server.metrics import Metrics
from server.trace_context import current_trace_id

NAMES = {
    "kasa_time_to_first_token_seconds",
    "kasa_inter_token_latency_seconds",
    "kasa_e2e_request_latency_seconds",
    "kasa_request_queue_time_seconds",
    "kasa_request_adapter_load_time_seconds",
    "kasa_request_prefill_time_seconds",
    "kasa_request_decode_time_seconds",
    "kasa_num_requests_running",
    "kasa_num_requests_waiting",
    "kasa_kv_cache_usage_ratio",
    "kasa_prefix_cache_queries",
    "kasa_prefix_cache_hits",
    "kasa_prompt_tokens",
    "kasa_generation_tokens",
    "kasa_requests",
    "kasa_requests_refused",
    "kasa_num_preemptions",
    "kasa_engine_steps",
    "kasa_adapter_requests_running",
    "kasa_adapter_requests_waiting",
    "kasa_adapters",
    "kasa_adapter_slots",
    "kasa_adapter_load_failures",
    "kasa_build_info",
    "grpc_server_handled",
    "grpc_server_handling_seconds",
    "kasa_http_request_seconds",
    "kasa_http_requests",
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
    metrics.first_token(adapter, queue_s=0.5, load_s=0.125, ttft_s=0.75, prompt_tokens=5)
    metrics.tokens(adapter, count=1, gap_s=None)
    metrics.tokens(adapter, count=2, gap_s=0.02)
    metrics.finished(adapter, Mode.BATCHED, FinishReason.STOP, decode_s=0.2, total_s=0.9)


@pytest.fixture
def metrics():
    metrics = Metrics(max_adapters=2)
    metrics.adapters_changed(infos("one", "two", "three"))
    return metrics


async def test_every_name_of_the_contract_is_there(metrics):
    metrics.registry.register(Gauges(FakeRuntime(metrics), metrics.label))
    GrpcMetrics(metrics.registry)
    HttpMetrics(metrics.registry)
    text = generate_latest(metrics.registry).decode()
    found = {family.name for family in text_string_to_metric_families(text)}
    of_the_process = {name for name in found if name.startswith(("process_", "python_"))}
    assert found - of_the_process == NAMES
    assert {"process_resident_memory_bytes", "python_info"} <= of_the_process


def test_the_guide_has_every_name():
    guide = Path(__file__).parents[2] / "docs" / "monitoring.md"
    listed = set(re.findall(r"^\| `(\w+)", guide.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name.removesuffix("_total") for name in listed} == NAMES


def test_one_request_is_counted(metrics):
    one_request(metrics, "one")
    found = samples(metrics)
    adapter = ("adapter", "one")
    assert found["kasa_prompt_tokens_total", adapter] == 5
    assert found["kasa_generation_tokens_total", adapter] == 3
    assert found["kasa_request_queue_time_seconds_sum", adapter] == 0.375
    assert found["kasa_request_adapter_load_time_seconds_sum", adapter] == 0.125
    assert found["kasa_request_prefill_time_seconds_sum",] == 0.25
    assert found["kasa_request_decode_time_seconds_sum",] == 0.2
    labels = (adapter, ("finish_reason", "stop"), ("mode", "batched"))
    assert found["kasa_requests_total", *labels] == 1


def test_latencies_are_from_the_arrival_to_what_was_written(metrics, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("server.metrics.time.monotonic", lambda: now_s)
    delivery = metrics.delivery("one@abc", arrival_s=99.0)
    for after_s, chunk in (
        (0.5, TokenChunk("", ())),
        (0.5, TokenChunk("a", (1, 2))),
        (0.25, TokenChunk("b", (3, 4))),
        (0.25, TokenChunk("", (), finish_reason=FinishReason.STOP)),
    ):
        now_s += after_s
        delivery.wrote(chunk)
    found, adapter = samples(metrics), ("adapter", "one")
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 2.0),
        ("inter_token_latency_seconds", 2, 0.25),
        ("e2e_request_latency_seconds", 1, 2.5),
    ):
        assert found[f"kasa_{name}_count", adapter] == count
        assert found[f"kasa_{name}_sum", adapter] == total


def test_what_a_traced_call_counts_carries_its_trace_id(metrics):
    metrics.delivery("one", arrival_s=0.0).wrote(TokenChunk("a", (1,)))
    assert "trace_id" not in openmetrics.generate_latest(metrics.registry).decode()
    token = current_trace_id.set("ab" * 16)
    try:
        metrics.delivery("one", arrival_s=0.0).wrote(TokenChunk("a", (1,)))
        one_request(metrics, "one")
    finally:
        current_trace_id.reset(token)
    text = openmetrics.generate_latest(metrics.registry).decode()
    marked = {line.partition("{")[0] for line in text.splitlines() if f'"{"ab" * 16}"' in line}
    assert {"kasa_time_to_first_token_seconds_bucket", "kasa_requests_total"} <= marked


def test_adapters_that_could_not_be_loaded_are_counted_by_reason(metrics):
    metrics.adapter_load_failed("one", AdapterInvalid("torn", name="one"))
    metrics.adapter_load_failed("one", OSError())
    found = samples(metrics)
    for reason in ("adapter_invalid", "unknown"):
        labels = (("adapter", "one"), ("reason", reason))
        assert found["kasa_adapter_load_failures_total", *labels] == 1
    metrics.adapters_changed([])
    assert not any(name.startswith("kasa_adapter_load_failures") for name, *_ in samples(metrics))


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
    assert found["kasa_adapter_slots",] == 4
    assert found["kasa_engine_steps_total",] == 7
    assert found["kasa_num_preemptions_total",] == 1
    assert found["kasa_adapter_requests_running", ("adapter", "style")] == 2
    assert found["kasa_adapter_requests_running", ("adapter", "_base")] == 0
    assert found["kasa_adapter_requests_waiting", ("adapter", "_base")] == 1
    assert found["kasa_adapter_requests_waiting", ("adapter", "style")] == 0
    assert found["kasa_adapter_requests_waiting", ("adapter", "_other")] == 3
    assert found["kasa_adapters", ("state", "quarantined")] == 1
    assert found["kasa_adapters", ("state", "loading")] == 0
    assert found["kasa_adapter_merged", ("adapter", "style")] == 1
    assert found["kasa_adapter_token_share_ratio", ("adapter", "style")] == 0.75
    assert found["kasa_adapter_token_share_ratio", ("adapter", "_base")] == 0.25
    (info,) = (dict(labels) for name, *labels in found if dict(labels).get("version") == "abc123")
    assert info["adapter"] == "style"
    assert (info["rank"], info["rule"], info["state"]) == ("8", "min_dim", "resident")
