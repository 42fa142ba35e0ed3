from __future__ import annotations

import aiohttp
import pytest


async def get(served, path, **headers):
    async with (
        aiohttp.ClientSession() as session,
        session.get(served.url(path), headers=headers) as response,
    ):
        return response.status, response.headers["Content-Type"], await response.text()


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


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
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
