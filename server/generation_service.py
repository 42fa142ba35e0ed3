"""kasa.v1.GenerationService over the runtime."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from server import convert
from server.access import Gate
from server.chunks import merge_chunks
from server.generating import Generating
from server.rpc import RpcCall, rpc


class GenerationService:
    """A client that cancels or goes away cancels the method; that closes the runtime's iterator."""

    def __init__(self, generating: Generating, gate: Gate) -> None:
        self._generating = generating
        self.gate = gate

    @rpc
    async def Generate(self, message: Any, call: RpcCall) -> Any:
        request = convert.generation_request(message, call.unique_id, call.deadline_s)
        async with aclosing(self._generating.chunks(request, call)) as chunks:
            parts = [chunk async for chunk in chunks]
        return convert.generate_response(merge_chunks(parts))

    @rpc
    async def GenerateStream(self, message: Any, call: RpcCall) -> None:
        # Written, not yielded: a generator suspended in a yield would not see the cancellation.
        request = convert.generation_request(message, call.unique_id, call.deadline_s)
        async with aclosing(self._generating.chunks(request, call, as_stream=True)) as chunks:
            async for chunk in chunks:
                await call.write(convert.stream_response(chunk))
