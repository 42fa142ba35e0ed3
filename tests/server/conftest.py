from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from fake_runtime import FakeRuntime
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from kasa.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from openai import AsyncOpenAI

from server.app import Edge, Server
from server.config import ServerConfig

CONFIG = ServerConfig(grpc_port=0, http_port=0, drain_s=2.0)


@dataclass
class Served:
    """A running server over a fake runtime, and stubs that talk to it."""

    runtime: FakeRuntime
    edge: Edge
    server: Server
    channel: Any

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.http_port}{path}"

    def openai(self, **options: Any) -> AsyncOpenAI:
        options = {"api_key": "none", "max_retries": 0, **options}
        return AsyncOpenAI(base_url=self.url("/v1"), **options)

    async def settled(self) -> None:
        """Nothing runs any more; fails where something goes on."""
        async with asyncio.timeout(5):
            while self.runtime.running or self.runtime.stats().num_requests_running:
                await asyncio.sleep(0.01)

    @property
    def generation(self) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapters_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def model(self) -> Any:
        return model_pb2_grpc.ModelServiceStub(self.channel)


@asynccontextmanager
async def serving_fake(config: ServerConfig) -> AsyncIterator[Served]:
    edge = Edge(config)
    runtime = FakeRuntime(edge)
    async with (
        Server(runtime, edge, config) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Served(runtime, edge, server, channel)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_fake(CONFIG) as served:
        yield served


@pytest.fixture
def details() -> Any:
    """The google.rpc details of an error, by type name."""

    def unpack(error: Any) -> dict[str, Any]:
        found = {}
        for packed in rpc_status.from_call(error).details:
            name = packed.TypeName().removeprefix("google.rpc.")
            found[name] = getattr(error_details_pb2, name)()
            packed.Unpack(found[name])
        return found

    return unpack
