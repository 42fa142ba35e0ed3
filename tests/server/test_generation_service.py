from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_runtime import FakeRuntime
from kasa.v1 import generation_pb2 as pb

from kasa_runtime.errors import EngineDead, Overloaded
from server.access import Gate
from server.config import ServerConfig
from server.generating import Generating
from server.generation_service import GenerationService
from server.metrics import Metrics


async def test_generate_answers_once_with_all_of_it(served):
    sampling = pb.SamplingParams(logprobs=2)
    request = pb.GenerateRequest(prompt="one two three", adapter="style", sampling=sampling)
    response = await served.generation.Generate(request)
    assert response.text == "one two three "
    assert list(response.token_ids) == [0, 1, 2]
    assert response.finish_reason == pb.FINISH_REASON_STOP
    assert response.adapter == "style@abc123"
    assert response.mode == pb.MODE_BATCHED
    assert response.usage.completion_tokens == 3
    assert response.timing.ttft_s == 0.02
    assert [len(entry.top) for entry in response.logprobs] == [2, 2, 2]


async def test_stream_has_the_finish_fields_in_its_last_message_alone(served):
    served.runtime.delay_s = 0.005
    request = pb.GenerateRequest(prompt="one two three")
    messages = [message async for message in served.generation.GenerateStream(request)]
    assert "".join(message.text for message in messages) == "one two three "
    assert len(messages) > 1
    assert all(message.finish_reason == 0 and message.mode == 0 for message in messages[:-1])
    assert not any(message.HasField("usage") for message in messages[:-1])
    assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
    assert messages[-1].mode == pb.MODE_BASE


async def test_slow_client_gets_fewer_and_longer_messages(served):
    words = ["x" * 2000] * 2000  # 4 MB, far beyond the flow-control window
    request = pb.GenerateRequest(prompt=" ".join(words))
    call = served.generation.GenerateStream(request)
    await asyncio.wait_for(served.runtime.ended.wait(), 30)  # the engine is not held back
    messages = [message async for message in call]
    assert sum(len(message.token_ids) for message in messages) == len(words)
    assert [i for message in messages for i in message.token_ids] == list(range(len(words)))
    # How many depends on the buffers of the connection, which hold up to half of it.
    assert len(messages) < len(words) * 3 / 4


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancel_reaches_the_runtime(served, method):
    served.runtime.delay_s = 0.02
    request = pb.GenerateRequest(prompt="word " * 1000)
    call = getattr(served.generation, method)(request)
    while not served.runtime.running:
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait_for(served.runtime.ended.wait(), 2)
    assert not served.runtime.running


async def test_cancel_reaches_the_runtime_while_the_client_does_not_read(served):
    request = pb.GenerateRequest(prompt=("x" * 2000 + " ") * 2000)
    call = served.generation.GenerateStream(request)
    served.runtime.delay_s = 0.0005
    await call.read()
    await asyncio.sleep(0.1)  # the server waits in a write by now
    call.cancel()
    await asyncio.wait_for(served.runtime.ended.wait(), 5)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_deadline_of_the_engine_is_the_status(served, method, details):
    async def cut(request):
        async for chunk in chunks(request):
            yield chunk

    chunks, served.runtime.delay_s = served.runtime.generate, 0.05

    def with_short_deadline(request):
        # As if the engine saw the deadline before gRPC did.
        from dataclasses import replace

        assert request.deadline_s is not None
        return cut(replace(request, deadline_s=request.deadline_s - 4.9))

    served.runtime.generate = with_short_deadline
    call = getattr(served.generation, method)(pb.GenerateRequest(prompt="word " * 1000), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == "Generate":
            await call
        else:
            messages = [message async for message in call]
            assert messages[-1].finish_reason == pb.FINISH_REASON_DEADLINE
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(caught.value)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"


async def test_call_without_timeout_has_no_deadline(served):
    await served.generation.Generate(pb.GenerateRequest(prompt="one"))
    assert served.runtime.requests[0].deadline_s is None


async def test_request_id_comes_back_and_is_made_unique_inside(served):
    metadata = (("x-request-id", "req-7"),)
    for _ in range(2):
        call = served.generation.Generate(pb.GenerateRequest(prompt="one"), metadata=metadata)
        await call
        assert dict(await call.initial_metadata())["x-request-id"] == "req-7"
        assert dict(await call.trailing_metadata())["x-request-id"] == "req-7"
    first, second = (request.request_id for request in served.runtime.requests)
    assert first.startswith("req-7/") and second.startswith("req-7/") and first != second


async def test_request_id_is_made_up_where_absent_and_comes_with_errors(served):
    call = served.generation.Generate(pb.GenerateRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert len(dict(caught.value.trailing_metadata())["x-request-id"]) == 32


async def test_nothing_is_sent_ahead_of_an_error_so_that_clients_may_try_again(served):
    """gRPC retries no call of which it has seen the initial metadata."""
    served.runtime.error = Overloaded("the queue is full", retry_after_s=2.5)
    call = served.generation.GenerateStream(pb.GenerateRequest(prompt="one"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert "x-request-id" not in dict(caught.value.initial_metadata())
    assert "x-request-id" in dict(caught.value.trailing_metadata())


async def test_too_long_request_id_is_refused(served):
    metadata = (("x-request-id", "x" * 129),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.generation.Generate(pb.GenerateRequest(prompt="one"), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_errors_before_the_first_chunk_are_statuses(served, method, details):
    served.runtime.error = Overloaded("the queue is full", retry_after_s=2.5)
    call = getattr(served.generation, method)(pb.GenerateRequest(prompt="one"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "Generate" else call.read())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_error_in_the_middle_of_a_stream_comes_after_the_text(served):
    async def die(request):
        async for chunk in generate(request):
            yield chunk
            raise EngineDead("the step thread has ended")

    generate, served.runtime.generate = served.runtime.generate, die
    call = served.generation.GenerateStream(pb.GenerateRequest(prompt="one two"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        texts = []
        async for message in call:
            texts.append(message.text)
    assert texts == ["one "]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_unknown_error_is_logged_and_tells_nothing(served, caplog):
    served.runtime.error = ZeroDivisionError("secret of the implementation")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.generation.Generate(
            pb.GenerateRequest(prompt="one"), metadata=(("x-request-id", "req-8"),)
        )
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "secret of the implementation" in caplog.text
    assert "req-8" in caplog.text


async def test_without_a_collector_requests_have_no_trace(served):
    metadata = (("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"),)
    await served.generation.Generate(pb.GenerateRequest(prompt="one"), metadata=metadata)
    assert served.runtime.requests[0].trace is None


class SlowContext:
    """A client that takes 0.1 s for each message."""

    def invocation_metadata(self):
        return ()

    def set_trailing_metadata(self, metadata): ...

    async def send_initial_metadata(self, metadata): ...

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def time_remaining(self):
        return None

    async def write(self, message):
        await asyncio.sleep(0.1)


async def test_latencies_are_those_of_what_was_written_not_of_what_was_sampled():
    metrics = Metrics()
    generating = Generating(FakeRuntime(metrics), metrics)
    service = GenerationService(generating, Gate(ServerConfig()))
    await service.GenerateStream(pb.GenerateRequest(prompt="one two three"), SlowContext())
    value, base = metrics.registry.get_sample_value, {"adapter": "_base"}
    assert value("kasa_time_to_first_token_seconds_sum", base) >= 0.1
    assert value("kasa_e2e_request_latency_seconds_sum", base) >= 0.2
    assert value("kasa_e2e_request_latency_seconds_count", base) == 1
