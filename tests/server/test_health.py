from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_runtime import STYLE
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kasa.v1 import adapters_pb2

from server.healthcheck import check

Status = health_pb2.HealthCheckResponse


async def status_of(served, name):
    stub = health_pb2_grpc.HealthStub(served.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kasa.v1.GenerationService",
        "kasa.v1.AdapterService",
        "kasa.v1.ModelService",
        "adapter/style",
    ],
)
async def test_names_that_serve(served, name):
    assert await status_of(served, name) == Status.SERVING


async def test_quarantined_adapter_does_not_serve(served):
    assert await status_of(served, "adapter/broken") == Status.NOT_SERVING


async def test_unknown_name_is_not_found(served):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status_of(served, "adapter/nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_deleted_adapter_is_forgotten(served):
    await served.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="style"))
    with pytest.raises(grpc.aio.AioRpcError):
        await status_of(served, "adapter/style")


async def test_watch_sees_an_adapter_come_and_go_and_the_server_shut_down(served):
    stub = health_pb2_grpc.HealthStub(served.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service="adapter/style"))
    assert (await call.read()).status == Status.SERVING
    await served.runtime.delete_adapter("style")
    assert (await call.read()).status == Status.SERVICE_UNKNOWN
    served.runtime.put(STYLE)
    assert (await call.read()).status == Status.SERVING
    served.edge.health.shut_down()
    assert (await call.read()).status == Status.NOT_SERVING
    call.cancel()


async def test_list_has_every_name(served):
    stub = health_pb2_grpc.HealthStub(served.channel)
    statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
    assert statuses["adapter/style"].status == Status.SERVING
    assert statuses["adapter/broken"].status == Status.NOT_SERVING
    assert statuses[""].status == Status.SERVING


async def test_nothing_serves_after_shut_down_whatever_is_set(served):
    served.edge.health.shut_down()
    served.runtime.put(STYLE)
    assert await status_of(served, "adapter/style") == Status.NOT_SERVING
    assert await status_of(served, "") == Status.NOT_SERVING


async def test_healthcheck_for_containers(served):
    assert await asyncio.to_thread(check, served.address) == ""
    assert "NOT_SERVING" in await asyncio.to_thread(check, served.address, "adapter/broken")
    assert "NOT_FOUND" in await asyncio.to_thread(check, served.address, "nobody")
    served.edge.health.shut_down()
    assert "NOT_SERVING" in await asyncio.to_thread(check, served.address)


def test_healthcheck_without_a_server():
    assert "UNAVAILABLE" in check("127.0.0.1:1", timeout_s=5)
