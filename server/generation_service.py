"""kasa.v1.GenerationService over the runtime."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Any

from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action
from kasa_runtime.types import FinishReason, GenerationRequest, TokenChunk
from server import convert
from server.access import Gate
from server.chunks import coalesced, merge_chunks
from server.rpc import Call, rpc
from server.status import DeadlineExpired


class GenerationService:
    """A client that cancels or goes away cancels the method; that closes the runtime's iterator."""

    def __init__(self, runtime: Runtime, gate: Gate) -> None:
        self._runtime = runtime
        self.gate = gate

    @rpc
    async def Generate(self, message: Any, call: Call) -> Any:
        request = _request(message, call)
        async with aclosing(coalesced(self._runtime.generate(request))) as chunks:
            generation = merge_chunks([chunk async for chunk in chunks])
        _check_deadline(generation)
        return convert.generate_response(generation)

    @rpc
    async def GenerateStream(self, message: Any, call: Call) -> None:
        request = _request(message, call)
        # Written, not yielded: a generator suspended in a yield would not see the cancellation.
        async with aclosing(coalesced(self._runtime.generate(request))) as chunks:
            async for chunk in chunks:
                await call.context.write(convert.stream_response(chunk))
                _check_deadline(chunk)


def _request(message: Any, call: Call) -> GenerationRequest:
    request = convert.generation_request(message, call.unique_id, call.deadline_s)
    call.caller.require(Action.GENERATE, request.adapter)
    if call.caller.name:
        # What is cached shows in usage and in time: no tenant may ask what others' prompts were.
        request = replace(request, cache_salt=f"{call.caller.name}/{request.cache_salt}")
    return request


def _check_deadline(chunk: TokenChunk) -> None:
    if chunk.finish_reason is FinishReason.DEADLINE:
        raise DeadlineExpired
