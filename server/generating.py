"""A generation as every face of the server runs it: who may, what is logged and measured."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action
from kasa_runtime.types import FinishReason, GenerationRequest, TokenChunk
from server import logs
from server.call import Call
from server.chunks import Pace, coalesced
from server.metrics import Metrics
from server.status import DeadlineExpired
from server.tracing import Tracing

logger = logging.getLogger(__name__)


class Generating:
    """Runs generations for callers. Event loop only."""

    def __init__(
        self,
        runtime: Runtime,
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

    async def chunks(
        self, request: GenerationRequest, call: Call, *, as_stream: bool = False
    ) -> AsyncGenerator[TokenChunk]:
        """Chunks of one generation; those that came while the reader was busy arrive as one, and
        `as_stream` as many as streams send at a time. A chunk counts as written to the client when
        the next is asked for. Closing this cancels.

        Raises, beside what `Runtime.generate` does, PermissionDenied, and DeadlineExpired after
        the last chunk."""
        facts: dict[str, Any] = {}  # of this one: a call may have several
        with self._traced(self._permitted(request, call), call, facts) as request:
            delivery = self._metrics.delivery(request.adapter, call.arrival_s)
            pace = self._pace if as_stream else None
            async with aclosing(coalesced(self._runtime.generate(request), pace)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    delivery.wrote(chunk)
                    if chunk.finish_reason is not None:
                        facts |= _facts(chunk)
                        call.add(facts)
                    if chunk.finish_reason is FinishReason.DEADLINE:
                        raise DeadlineExpired

    def _permitted(self, request: GenerationRequest, call: Call) -> GenerationRequest:
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

    def _traced(
        self, request: GenerationRequest, call: Call, facts: Mapping[str, Any]
    ) -> AbstractContextManager[GenerationRequest]:
        """The request, with a trace if there are any."""
        if self._tracing is None:
            return nullcontext(request)
        model = self._runtime.model.name
        return self._tracing.traced(request, model, call.metadata, facts)


def _facts(last: TokenChunk) -> dict[str, Any]:
    """What is known by the end of a generation."""
    facts: dict[str, Any] = {"adapter": last.adapter, "mode": last.mode.value}
    facts["finish_reason"] = last.finish_reason and last.finish_reason.value
    if (usage := last.usage) is not None:
        facts["prompt_tokens"] = usage.prompt_tokens
        facts["cached_prompt_tokens"] = usage.cached_prompt_tokens
        facts["completion_tokens"] = usage.completion_tokens
    return facts
