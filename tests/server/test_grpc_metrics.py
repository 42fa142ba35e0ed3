from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kasa.v1 import adapters_pb2, model_pb2
from kasa.v1 import generation_pb2 as pb
from prometheus_client.openmetrics.exposition import generate_latest

from kasa_runtime.errors import EngineDead
from server.grpc_metrics import spoken

TRACE = "0af7651916cd43dd8448eb211c80319c"


def handled(served):
    """(service, method, code) to the number of RPCs."""
    (metric,) = (m for m in served.edge.registry.collect() if m.name == "grpc_server_handled")
    return {tuple(sample.labels.values()): sample.value for sample in metric.samples}


async def ended(served, expected):
    """Wait until these RPCs have been counted: clients hear of an error before its method ends."""
    async with asyncio.timeout(10):
        while not handled(served).items() >= expected.items():
            await asyncio.sleep(0.01)


def timed(served, service, method):
    """How many RPCs were timed."""
    labels = {"grpc_service": service, "grpc_method": method}
    return served.edge.registry.get_sample_value("grpc_server_handling_seconds_count", labels)


async def fails(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code()


async def test_each_kind_of_rpc_is_counted_by_its_code(served):
    generation = "kasa.v1.GenerationService"
    await served.generation.Generate(pb.GenerateRequest(prompt="one two"))
    async for _ in served.generation.GenerateStream(pb.GenerateRequest(prompt="one two")):
        pass
    unknown = adapters_pb2.GetAdapterRequest(name="unknown")
    assert await fails(served.adapters.GetAdapter(unknown)) is grpc.StatusCode.NOT_FOUND
    await served.model.GetModel(model_pb2.GetModelRequest())
    expected = {
        (generation, "Generate", "OK"): 1,
        (generation, "GenerateStream", "OK"): 1,
        ("kasa.v1.AdapterService", "GetAdapter", "NotFound"): 1,
        ("kasa.v1.ModelService", "GetModel", "OK"): 1,
    }
    await ended(served, expected)
    assert handled(served) == expected
    assert timed(served, generation, "GenerateStream") == 1


async def test_upload_health_and_reflection_are_counted(served):
    empty = iter([adapters_pb2.UploadAdapterRequest()])
    assert await fails(served.adapters.UploadAdapter(empty)) is grpc.StatusCode.INVALID_ARGUMENT
    health = health_pb2_grpc.HealthStub(served.channel)
    await health.Check(health_pb2.HealthCheckRequest())
    assert await fails(health.Check(health_pb2.HealthCheckRequest(service="no"))) is (
        grpc.StatusCode.NOT_FOUND
    )
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    answers = [answer async for answer in stub.ServerReflectionInfo(asked)]
    assert answers
    reflection = "grpc.reflection.v1alpha.ServerReflection"
    expected = {
        ("kasa.v1.AdapterService", "UploadAdapter", "InvalidArgument"): 1,
        ("grpc.health.v1.Health", "Check", "OK"): 1,
        ("grpc.health.v1.Health", "Check", "NotFound"): 1,
        (reflection, "ServerReflectionInfo", "OK"): 1,
    }
    await ended(served, expected)
    assert handled(served) == expected


async def test_failures_are_counted_with_the_code_that_the_client_gets(served):
    for error, code in ((EngineDead("gone"), "Unavailable"), (ValueError("bug"), "Internal")):
        served.runtime.error = error
        await fails(served.generation.Generate(pb.GenerateRequest(prompt="one")))
        await ended(served, {("kasa.v1.GenerationService", "Generate", code): 1})


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_client_that_goes_away_is_counted_as_canceled(served, method):
    served.runtime.delay_s = 0.02
    call = getattr(served.generation, method)(pb.GenerateRequest(prompt="word " * 1000))
    while not served.runtime.running:
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait_for(served.runtime.ended.wait(), 10)
    await ended(served, {("kasa.v1.GenerationService", method, "Canceled"): 1})


async def test_methods_that_clients_make_up_are_not_counted(served):
    call = served.channel.unary_unary("/kasa.v1.GenerationService/MadeUp")
    assert await fails(call(b"")) is grpc.StatusCode.UNIMPLEMENTED
    assert handled(served) == {}


async def test_what_a_traced_call_counts_carries_its_trace_id(served):
    metadata = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
    request = pb.GenerateRequest(prompt="one two", adapter="style")
    async for _ in served.generation.GenerateStream(request, metadata=metadata):
        pass
    await served.generation.Generate(request)
    text = generate_latest(served.edge.registry).decode()
    marked = {line.partition("{")[0] for line in text.splitlines() if TRACE in line}
    assert marked == {
        "grpc_server_handled_total",
        "grpc_server_handling_seconds_bucket",
        "kasa_time_to_first_token_seconds_bucket",
        "kasa_inter_token_latency_seconds_bucket",
        "kasa_e2e_request_latency_seconds_bucket",
    }


def test_codes_are_named_as_by_other_grpc_servers():
    names = [spoken(code) for code in grpc.StatusCode]
    assert names[:4] == ["OK", "Canceled", "Unknown", "InvalidArgument"]
    assert "DeadlineExceeded" in names
