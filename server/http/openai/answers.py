"""The answer to a request for generations: as one object, or as events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kasa_runtime.errors import ShuttingDown
from kasa_runtime.types import FinishReason, GenerationRequest, TokenChunk, Usage
from server.access import Gate
from server.chunks import merge_chunks
from server.generating import Generating
from server.http.calls import HttpCall
from server.http.openai.conversion import named_as_asked
from server.http.openai.events import DONE, EventStream
from server.http.openai.requests import GenerationParameters, StreamOptions

RETRY_S = 5.0

T = TypeVar("T")


class Choice(Protocol):
    """One generation of a request, and what it looks like in the answer."""

    index: int
    request: GenerationRequest
    is_first: bool  # of its prompt, whose tokens count once
    has_output: bool  # False: the generated token is not asked for, only the prompt's figures
    num_prompt_tokens: int  # where they have to be known before the end, else 0

    def whole(self, chunk: TokenChunk) -> dict[str, Any]:
        """The choice of an answer."""

    def part(self, chunk: TokenChunk) -> dict[str, Any] | None:
        """The choice of an event. None: there is nothing to tell."""


@dataclass
class Generations:
    """Those of one request. `fields`: of the answer and of each event, beside choices and usage;
    `form`: the parameter that says the form of the answer."""

    generating: Generating
    gate: Gate
    call: HttpCall
    choices: Sequence[Choice]
    fields: Mapping[str, Any]
    form: str

    async def answer(self, asked: GenerationParameters) -> ASGIApp:
        """At once, or as a stream, as was asked."""
        if not asked.stream:
            return await self.whole()
        options = asked.stream_options or StreamOptions()
        return Stream(
            self,
            with_usage=bool(options.include_usage),
            running_usage=bool(options.continuous_usage_stats),
        )

    async def whole(self) -> Response:
        """The answer when all have ended."""
        ended = await _together([self._last(choice) for choice in self.choices])
        pairs = list(zip(self.choices, ended, strict=True))
        choices = [choice.whole(chunk) for choice, chunk in pairs]
        answer = {**self.fields, "choices": choices, "usage": _summed(pairs)}
        return Response(to_json(answer), media_type="application/json")

    async def _last(self, choice: Choice) -> TokenChunk:
        async with aclosing(self.chunks(choice, as_stream=False)) as chunks:
            return merge_chunks([chunk async for chunk in chunks])

    async def chunks(self, choice: Choice, *, as_stream: bool) -> AsyncGenerator[TokenChunk]:
        """Each generation counts against the client's limit, the first with its call."""
        place = self.gate.stream(self.call.client) if choice.index else nullcontext()
        with place, named_as_asked(self.form):
            generated = self.generating.chunks(choice.request, self.call, as_stream=as_stream)
            async with aclosing(generated) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason is FinishReason.CANCELLED:  # not by the client
                        message = "this server is shutting down; try another"
                        raise ShuttingDown(message, retry_after_s=RETRY_S)
                    yield chunk if choice.has_output else _without_output(chunk)


class Stream:
    """ASGI application that tells each chunk as it comes. `with_usage`: in an event of its own at
    the end; `running_usage`: in every event."""

    def __init__(
        self, generations: Generations, *, with_usage: bool = False, running_usage: bool = False
    ) -> None:
        self._generations = generations
        self._with_usage = with_usage
        self._running_usage = running_usage
        self._before = to_json(generations.fields)[:-1] + b',"choices":['
        self._after = b'],"usage":null}' if with_usage else b"]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events, generations = EventStream(send), self._generations
        try:
            ended = await _together([self._tell(one, events) for one in generations.choices])
        except Exception as error:
            if not events.begun:
                raise
            problem = generations.call.problem(error)
            generations.call.status = problem.status  # for metrics and the log; 200 has been sent
            await events.write(to_json(problem.body), last=True)
            return
        if self._with_usage:
            usage = _summed(list(zip(generations.choices, ended, strict=True)))
            await events.write(b'%b],"usage":%b}' % (self._before, to_json(usage)))
        await events.write(DONE, last=True)

    async def _tell(self, choice: Choice, events: EventStream) -> TokenChunk:
        """Returns the last chunk."""
        num_tokens = 0
        async with aclosing(self._generations.chunks(choice, as_stream=True)) as chunks:
            async for chunk in chunks:
                num_tokens += len(chunk.token_ids)
                if (part := choice.part(chunk)) is not None:
                    after = self._after
                    if self._running_usage:
                        usage = _usage(choice.num_prompt_tokens, num_tokens)
                        after = b'],"usage":%b}' % to_json(usage)
                    await events.write(b"%b%b%b" % (self._before, to_json(part), after))
        return chunk


def envelope(call: HttpCall, prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every answer begins with. `model`: as the client named it."""
    return {
        "id": f"{prefix}-{call.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def ending(chunk: TokenChunk) -> dict[str, Any]:
    """What the last chunk says beside the reason: the version that answered, and how."""
    if chunk.finish_reason is None:
        return {}
    return {"adapter": chunk.adapter, "mode": chunk.mode.value}


async def _together(running: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all. An error of one cancels the others."""
    if len(running) == 1:
        return [await running[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in running]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _without_output(chunk: TokenChunk) -> TokenChunk:
    """Of a generation of which only the prompt's figures are wanted."""
    reason = chunk.finish_reason and FinishReason.LENGTH
    usage = chunk.usage and replace(chunk.usage, completion_tokens=0)
    return replace(chunk, text="", token_ids=(), logprobs=(), finish_reason=reason, usage=usage)


def _summed(ended: Sequence[tuple[Choice, TokenChunk]]) -> dict[str, Any]:
    usages = [(choice, chunk.usage or Usage(0, 0)) for choice, chunk in ended]
    prompts = [usage for choice, usage in usages if choice.is_first]
    return {
        **_usage(
            sum(usage.prompt_tokens for usage in prompts),
            sum(usage.completion_tokens for _, usage in usages),
        ),
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_prompt_tokens for usage in prompts)
        },
    }


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
