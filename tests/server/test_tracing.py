from __future__ import annotations

import asyncio
import sys
import time
from concurrent import futures
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import httpx
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime

from kasa_runtime.client import AsyncClient
from kasa_runtime.errors import AdapterNotFound, ConfigError
from kasa_runtime.types import ChatMessage, SamplingParams
from server.app import Edge, Server
from server.config import ServerConfig
from server.tracing import Tracing

pytest.importorskip("opentelemetry.sdk")

from kasa.v1 import generation_pb2 as pb
from kasa.v1 import generation_pb2_grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-{end}") for end in ("01", "00"))


class TimedRuntime(FakeRuntime):
    """Tells the trace as the runtime does."""

    async def generate(self, request):
        began_s = time.monotonic()
        self.trace = request.trace
        async for chunk in super().generate(request):
            yield chunk
        if request.trace is not None:
            request.trace.span("lease", began_s, time.monotonic()).span("load", began_s, began_s)


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@asynccontextmanager
async def serving(exporter, monkeypatch):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def to_collector(endpoint):
        assert endpoint == "http://collector:4317"
        return Tracing(provider)

    monkeypatch.setattr(Tracing, "to_collector", to_collector)
    config = replace(CONFIG, otlp_endpoint="http://collector:4317")
    edge = Edge(config)
    async with Server(TimedRuntime(edge), edge, config) as server:
        yield server


@pytest.fixture
async def traced(exporter, monkeypatch):
    async with serving(exporter, monkeypatch) as server:
        yield server


@pytest.fixture
async def client(traced):
    async with AsyncClient(f"127.0.0.1:{traced.grpc_port}") as client:
        yield client


async def spans_of(exporter, count):
    async with asyncio.timeout(10):
        while len(found := exporter.get_finished_spans()) < count:
            await asyncio.sleep(0.01)
    return {span.name: span for span in found}


async def test_a_request_is_a_span_with_the_conventions_of_generative_ai(exporter, client):
    sampling = SamplingParams(max_tokens=5, temperature=0.5, top_k=3, seed=7, stop=("end",))
    before_ns = time.time_ns()
    await client.generate("one two", adapter="style", sampling=sampling, request_id="mine")
    spans = await spans_of(exporter, 3)
    span = spans["text_completion fake"]
    attributes = dict(span.attributes)
    assert attributes.pop("kasa.request.id").startswith("mine/")
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "kasa",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("end",),
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 2,
        "kasa.mode": "batched",
        "kasa.adapter.name": "style",
        "kasa.adapter.version": "abc123",
    }
    assert (span.kind, span.parent) == (SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    lease, load = spans["lease"], spans["load"]
    assert lease.parent.span_id == span.context.span_id
    assert load.parent.span_id == lease.context.span_id
    slack_ns = 50_000_000  # between the two clocks
    assert before_ns - slack_ns < lease.start_time <= lease.end_time < time.time_ns() + slack_ns


async def test_the_trace_of_the_client_goes_on(traced, exporter):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        call = stub.GenerateStream(pb.GenerateRequest(chat=chat), metadata=[SAMPLED])
        assert [message async for message in call]
        spans = await spans_of(exporter, 3)
        assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}
        assert f"{spans['chat fake'].parent.span_id:016x}" == PARENT_ID
        exporter.clear()
        await stub.Generate(pb.GenerateRequest(chat=chat), metadata=[NOT_SAMPLED])
        await stub.Generate(pb.GenerateRequest(chat=chat), metadata=[("traceparent", "nonsense")])
    spans = await spans_of(exporter, 3)
    assert spans["chat fake"].parent is None and len(exporter.get_finished_spans()) == 3


async def test_a_request_that_is_not_sampled_has_no_trace(traced):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        await stub.Generate(pb.GenerateRequest(prompt="hi"), metadata=[NOT_SAMPLED])
    assert traced._runtime.trace is None


async def test_errors_say_their_type_and_which_are_the_servers(traced, exporter, client):
    with pytest.raises(AdapterNotFound):
        await client.generate("hi", adapter="nobody")
    span = (await spans_of(exporter, 1))["text_completion fake"]
    assert span.attributes["error.type"] == "ADAPTER_NOT_FOUND"
    assert span.status.status_code is StatusCode.UNSET
    exporter.clear()
    traced._runtime.error = ZeroDivisionError("secret")
    with pytest.raises(Exception, match="internal error"):
        await client.generate("hi")
    span = (await spans_of(exporter, 1))["text_completion fake"]
    assert span.attributes["error.type"] == "ZERO_DIVISION_ERROR"
    assert span.status.status_code is StatusCode.ERROR and "secret" not in span.status.description


async def test_a_cancelled_stream_ends_its_span(traced, exporter, client):
    traced._runtime.delay_s = 0.02
    stream = client.stream(messages=[ChatMessage("user", "word " * 100)])
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(10):
        while not exporter.get_finished_spans():
            await asyncio.sleep(0.01)
    assert exporter.get_finished_spans()[0].attributes["error.type"] == "CANCELLED"


async def test_spans_reach_a_collector(monkeypatch):
    received = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    config = replace(CONFIG, otlp_endpoint=f"http://127.0.0.1:{port}")
    edge = Edge(config)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    async with (
        Server(FakeRuntime(edge), edge, config) as server,
        AsyncClient(f"127.0.0.1:{server.grpc_port}") as client,
    ):
        await client.generate("hi")
    (spans,) = [each for request in received for each in request.resource_spans]
    service = {pair.key: pair.value.string_value for pair in spans.resource.attributes}
    assert service["service.name"] == "kasa"
    assert [s.name for s in spans.scope_spans[0].spans] == ["text_completion fake"]
    collector.stop(None)


def test_an_endpoint_has_a_scheme():
    with pytest.raises(ConfigError, match="otlp_endpoint must begin with http"):
        ServerConfig(otlp_endpoint="collector:4317")


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, OTLPSpanExporter.__module__, None)
    with pytest.raises(ConfigError, match=r"pip install 'kasa-runtime\[tracing\]'"):
        Tracing.to_collector("http://collector:4317")


async def test_a_request_over_http_goes_on_with_the_trace_of_its_client(traced, exporter):
    url = f"http://127.0.0.1:{traced.http_port}/v1/completions"
    asked = {"model": "style", "prompt": "one two", "n": 2}
    async with httpx.AsyncClient(headers=dict([SAMPLED])) as http:
        await http.post(url, json=asked)
    await spans_of(exporter, 6)
    spans = [s for s in exporter.get_finished_spans() if s.name == "text_completion fake"]
    assert len(spans) == 2
    for span in spans:
        assert f"{span.context.trace_id:032x}" == TRACE_ID
        assert f"{span.parent.span_id:016x}" == PARENT_ID
        assert span.attributes["gen_ai.usage.output_tokens"] == 2  # each its own
        assert span.attributes["kasa.adapter.version"] == "abc123"


async def test_a_stream_that_its_reader_leaves_is_no_error_of_the_server(traced, exporter):
    traced._runtime.delay_s = 0.01
    url = f"http://127.0.0.1:{traced.http_port}/v1/completions"
    asked = {"model": "fake", "prompt": "word " * 100, "max_tokens": 100, "stream": True}
    async with httpx.AsyncClient() as http, http.stream("POST", url, json=asked) as answer:
        await anext(answer.aiter_lines())
    span = (await spans_of(exporter, 1))["text_completion fake"]
    assert span.attributes["error.type"] == "CANCELLED"
    assert span.status.status_code is StatusCode.UNSET
