from __future__ import annotations

import time
from dataclasses import replace

import httpx
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime
from prometheus_client.parser import text_string_to_metric_families

from server.app import Edge, Server


async def get(served, path, **headers):
    async with httpx.AsyncClient() as client:
        response = await client.get(served.url(path), headers=headers)
        return response.status_code, response.headers["Content-Type"], response.text


async def test_metrics_are_served(served):
    status, content_type, text = await get(served, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert "kasa_num_requests_running 0.0" in text
    assert 'kasa_adapter_info{adapter="style"' in text


async def test_metrics_as_openmetrics_when_asked_for(served):
    accept = "application/openmetrics-text; version=1.0.0"
    _, content_type, text = await get(served, "/metrics", Accept=accept)
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz"])
async def test_healthy(served, path):
    assert (await get(served, path))[0] == 200


async def test_draining_server_is_healthy_but_not_ready(served):
    await served.runtime.drain(0)
    assert (await get(served, "/healthz"))[0] == 200
    assert (await get(served, "/readyz"))[0] == 503


async def test_dead_engine_is_neither(served):
    served.runtime.alive = False
    assert (await get(served, "/healthz"))[0] == 503
    assert (await get(served, "/readyz"))[0] == 503


async def test_the_page_for_routers_is_there_only_when_wanted(served):
    assert (await get(served, "/metrics/vllm"))[0] == 404


async def test_the_page_for_routers_has_vllms_names():
    config = replace(CONFIG, vllm_metrics=True)
    edge = Edge(config)
    runtime = FakeRuntime(edge)
    async with Server(runtime, edge, config) as server, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.http_port}/metrics/vllm"
        families = list(text_string_to_metric_families((await client.get(url)).text))
    found = {s.name: (s.labels, s.value) for family in families for s in family.samples}
    model = {"model_name": "fake"}
    assert found["vllm:num_requests_running"] == (model, 0)
    assert found["vllm:num_requests_waiting"] == (model, 0)
    assert found["vllm:kv_cache_usage_perc"] == (model, 0.25)
    assert found["vllm:gpu_cache_usage_perc"] == (model, 0.25)
    labels, value = found["vllm:lora_requests_info"]
    assert labels == {
        "max_lora": "4",
        "running_lora_adapters": "style",
        "waiting_lora_adapters": "unknown,warm",
    }
    assert value == pytest.approx(time.time(), abs=60)
