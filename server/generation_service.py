"""kasa.v1.GenerationService over the runtime."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from kasa_runtime.runtime import Runtime
from kasa_runtime.types import FinishReason, TokenChunk
from server import convert
from server.chunks import coalesced, merge_chunks
from server.metrics import Metrics
from server.rpc import Call, rpc
from server.status import DeadlineExpired


class GenerationService:
    """A client that cancels or goes away cancels the method; that closes the runtime's iterator."""

    def __init__(self, runtime: Runtime, metrics: Metrics) -> None:
        self._runtime = runtime
        self._metrics = metrics

    @rpc
    async def Generate(self, message: Any, call: Call) -> Any:
        request = convert.generation_request(message, call.unique_id, call.deadline_s)
        delivery = self._metrics.delivery(request.adapter, call.arrival_s)
        parts = []
        async with aclosing(coalesced(self._runtime.generate(request))) as chunks:
            async for chunk in chunks:
                parts.append(chunk)
                delivery.wrote(chunk)
        generation = merge_chunks(parts)
        _check_deadline(generation)
        return convert.generate_response(generation)

    @rpc
    async def GenerateStream(self, message: Any, call: Call) -> None:
        request = convert.generation_request(message, call.unique_id, call.deadline_s)
        delivery = self._metrics.delivery(request.adapter, call.arrival_s)
        # Written, not yielded: a generator suspended in a yield would not see the cancellation.
        async with aclosing(coalesced(self._runtime.generate(request))) as chunks:
            async for chunk in chunks:
                await call.context.write(convert.stream_response(chunk))
                delivery.wrote(chunk)
                _check_deadline(chunk)


def _check_deadline(chunk: TokenChunk) -> None:
    if chunk.finish_reason is FinishReason.DEADLINE:
        raise DeadlineExpired
