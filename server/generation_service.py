"""kasa.v1.GenerationService over the runtime."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action
from kasa_runtime.types import FinishReason, GenerationRequest, TokenChunk
from server import convert, logs
from server.access import Gate
from server.chunks import Pace, coalesced, merge_chunks
from server.metrics import Metrics
from server.rpc import Call, rpc
from server.status import DeadlineExpired
from server.tracing import Tracing

logger = logging.getLogger(__name__)


class GenerationService:
    """A client that cancels or goes away cancels the method; that closes the runtime's iterator."""

    def __init__(
        self,
        runtime: Runtime,
        gate: Gate,
        metrics: Metrics,
        pace: Pace | None = None,
        *,
        log_prompts: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._pace = pace
        self._log_prompts = log_prompts
        self._tracing = tracing
        self.gate = gate

    @rpc
    async def Generate(self, message: Any, call: Call) -> Any:
        parts = []
        with self._traced(self._request(message, call), call) as request:
            delivery = self._metrics.delivery(request.adapter, call.arrival_s)
            async with aclosing(coalesced(self._runtime.generate(request))) as chunks:
                async for chunk in chunks:
                    parts.append(chunk)
                    delivery.wrote(chunk)
            generation = merge_chunks(parts)
            _end(generation, call)
        return convert.generate_response(generation)

    @rpc
    async def GenerateStream(self, message: Any, call: Call) -> None:
        # Written, not yielded: a generator suspended in a yield would not see the cancellation.
        with self._traced(self._request(message, call), call) as request:
            delivery = self._metrics.delivery(request.adapter, call.arrival_s)
            async with aclosing(coalesced(self._runtime.generate(request), self._pace)) as chunks:
                async for chunk in chunks:
                    await call.write(convert.stream_response(chunk))
                    delivery.wrote(chunk)
                    _end(chunk, call)

    def _traced(
        self, request: GenerationRequest, call: Call
    ) -> AbstractContextManager[GenerationRequest]:
        """The request, with a trace if there are any."""
        if self._tracing is None:
            return nullcontext(request)
        model = self._runtime.model.name
        return self._tracing.traced(request, model, call.metadata, call.facts)

    def _request(self, message: Any, call: Call) -> GenerationRequest:
        request = convert.generation_request(message, call.unique_id, call.deadline_s)
        call.caller.require(Action.GENERATE, request.adapter)
        call.facts["adapter"] = request.adapter
        if self._log_prompts:
            inputs = (request.prompt, request.messages, request.token_ids)
            given = next(value for value in inputs if value is not None)
            logger.info("prompt", extra=logs.fields(prompt=given))
        if call.caller.name:
            # Usage and times show what is cached: no tenant may find out others' prompts.
            request = replace(request, cache_salt=f"{call.caller.name}/{request.cache_salt}")
        return request


def _end(chunk: TokenChunk, call: Call) -> None:
    """What is to be done with a chunk if it is the last."""
    if chunk.finish_reason is None:
        return
    call.facts |= {"adapter": chunk.adapter, "mode": chunk.mode.value}
    call.facts["finish_reason"] = chunk.finish_reason.value
    if chunk.usage is not None:
        call.facts["prompt_tokens"] = chunk.usage.prompt_tokens
        call.facts["cached_prompt_tokens"] = chunk.usage.cached_prompt_tokens
        call.facts["completion_tokens"] = chunk.usage.completion_tokens
    if chunk.finish_reason is FinishReason.DEADLINE:
        raise DeadlineExpired
