from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import Future

import grpc
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kasa.v1 import generation_pb2 as pb
from kasa.v1 import generation_pb2_grpc, model_pb2

from kasa_runtime.errors import ConfigError
from server import app
from server.app import Edge, Server
from server.config import ServerConfig


async def test_port_0_is_any_free_port_and_both_are_announced(served):
    server = served.server
    assert server.grpc_port > 0 and server.http_port > 0
    assert server.grpc_port != server.http_port
    assert server.addresses == (
        f"grpc=127.0.0.1:{server.grpc_port} http=127.0.0.1:{server.http_port}"
    )


@pytest.mark.parametrize("which", ["grpc_port", "http_port"])
async def test_taken_port_is_an_error_that_names_it(served, which):
    ports = {"grpc_port": 0, "http_port": 0, which: getattr(served.server, which)}
    edge = Edge(CONFIG)
    with pytest.raises(ConfigError, match=which):
        async with Server(FakeRuntime(edge), edge, ServerConfig(**ports)):
            pass


async def test_model_and_tokenize(served):
    model = (await served.model.GetModel(model_pb2.GetModelRequest())).model
    assert model.architecture == "FakeForCausalLM"
    assert model.num_parameters == 12345
    tokens = await served.model.Tokenize(model_pb2.TokenizeRequest(prompt="a bc"))
    assert list(tokens.token_ids) == [1, 2]


async def test_sigterm_drains_and_requests_in_flight_end_well():
    edge = Edge(CONFIG)
    runtime = FakeRuntime(edge, delay_s=0.02)
    server = Server(runtime, edge, CONFIG)
    await server.__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="word " * 20))
        running = asyncio.create_task(server.run())
        while not runtime.running:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(running, 2) == 0
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt="too late"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await call).finish_reason == pb.FINISH_REASON_STOP
        watch.cancel()
        await leaving
    assert runtime.drained_s == CONFIG.drain_s


async def test_dead_engine_ends_the_process_with_status_1(served, caplog):
    running = asyncio.create_task(served.server.run())
    await asyncio.sleep(0)
    served.runtime.alive = False
    assert await asyncio.wait_for(running, 2) == 1
    assert "the engine has stopped" in caplog.text


async def test_serve_prints_where_it_listens_and_closes_the_runtime(monkeypatch, capsys):
    runtimes, beginning = [], Future()

    class Factory:
        @staticmethod
        async def create(config, observer, begun):
            assert begun is beginning
            runtimes.append(FakeRuntime(observer))
            return runtimes[0]

    monkeypatch.setattr(app, "Runtime", Factory)
    serving = asyncio.create_task(app.serve(app.RuntimeConfig(), CONFIG, beginning))
    while "listening grpc=127.0.0.1:" not in capsys.readouterr().out:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(serving, 5) == 0
    assert runtimes[0].closed


@pytest.mark.parametrize(
    "wrong",
    [
        {"grpc_port": -1},
        {"http_port": 70000},
        {"drain_s": -1.0},
        {"grpc_port": 80, "http_port": 80},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)
