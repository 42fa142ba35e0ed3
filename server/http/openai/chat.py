"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.runtime import Runtime
from kasa_runtime.types import ChatMessage, FinishReason, GenerationRequest, TokenChunk
from server.access import Gate
from server.generating import Generating
from server.http.body import read_json
from server.http.calls import HttpCall
from server.http.openai.answers import Generations, ending, envelope
from server.http.openai.conversion import (
    Asked,
    adapter_of,
    chat_messages,
    check_stream_options,
    form_parameter,
    named_as_asked,
    structured_output,
)
from server.http.openai.logprobs import TokenBytes, of_chat, of_prompt
from server.http.openai.parsing import parse
from server.http.openai.requests import ChatParameters
from server.http.openai.tools import ToolUse, call, tool_use


@dataclass(frozen=True)
class ChatCompletions:
    """`n` answers to one conversation."""

    runtime: Runtime
    generating: Generating
    gate: Gate
    max_bytes: int

    async def __call__(self, request: Request, call: HttpCall) -> ASGIApp:
        asked = parse(ChatParameters, await read_json(request, self.max_bytes))
        _check(asked)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        fields = envelope(call, "chatcmpl", kind, asked.model)
        tools = tool_use(asked)
        with named_as_asked():
            choices = await self._choices(asked, tools, call)
        form = form_parameter(asked) if tools.schema is None else "tools"
        generations = Generations(self.generating, self.gate, call, choices, fields, form)
        return await generations.answer(asked)

    async def _choices(
        self, asked: ChatParameters, tools: ToolUse, call: HttpCall
    ) -> list[ChatChoice]:
        common = _common(asked, tools, self.runtime.model.name)
        messages = chat_messages(asked.messages)
        num_prompt_tokens = await self._count(asked, messages, tools)
        generations = [
            common.request(call.unique_id, index, messages=messages, tools=tools.told)
            for index in range(asked.n or 1)
        ]
        token_bytes = self.runtime.token_bytes
        return [
            ChatChoice(token_bytes, asked, generation, index, tools, num_prompt_tokens)
            for index, generation in enumerate(generations)
        ]

    async def _count(
        self, asked: ChatParameters, messages: tuple[ChatMessage, ...], tools: ToolUse
    ) -> int:
        """The prompt's tokens, where they have to be known before the end."""
        if not (asked.stream_options and asked.stream_options.continuous_usage_stats):
            return 0
        tokenize: Callable[..., list[int]] = self.runtime.tokenize
        return len(await asyncio.to_thread(tokenize, messages=messages, tools=tools.told))


def _check(asked: ChatParameters) -> None:
    """What parameters have to do with each other. Raises InvalidRequest."""
    check_stream_options(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest("top_logprobs", "belongs to logprobs: true")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens", "must not be given beside max_completion_tokens")


def _common(asked: ChatParameters, tools: ToolUse, base: str) -> Asked:
    max_tokens = asked.max_completion_tokens
    form = structured_output(asked)
    if form is not None and tools.structured_output is not None:
        raise InvalidRequest("tool_choice", "says the form of the answer, as response_format does")
    return Asked(
        asked,
        adapter_of(asked.model, base),
        asked.max_tokens if max_tokens is None else max_tokens,
        (asked.top_logprobs or 0) if asked.logprobs else None,
        tools.structured_output or form,
        asked.prompt_logprobs,
    )


class ChatChoice:
    """See `answers.Choice`."""

    has_output = True

    def __init__(
        self,
        token_bytes: TokenBytes,
        asked: ChatParameters,
        request: GenerationRequest,
        index: int,
        tools: ToolUse,
        num_prompt_tokens: int,
    ) -> None:
        self.index = index
        self.request = request
        self.is_first = index == 0
        self.num_prompt_tokens = num_prompt_tokens
        self._token_bytes = token_bytes
        self._asked = asked
        self._tools = tools
        self._tells_tokens = bool(asked.logprobs or asked.return_token_ids)
        self._begun = False
        self._withheld = ""  # calls are told when they are whole

    def whole(self, chunk: TokenChunk) -> dict[str, Any]:
        calls = self._tools.calls(chunk.text)
        message: dict[str, Any] = {"role": "assistant", "content": chunk.text, "refusal": None}
        if calls is not None:
            message |= {"content": None, "tool_calls": calls}
        return {"index": self.index, "message": message, **self._rest(chunk, called=bool(calls))}

    def part(self, chunk: TokenChunk) -> dict[str, Any] | None:
        delta, called = self._delta(chunk)
        if not self._begun:
            delta = {"role": "assistant", "content": "", **delta}
        elif not delta and chunk.finish_reason is None and not self._tells_tokens:
            return None
        rest = self._rest(chunk, called=called)
        self._begun = True
        return {"index": self.index, "delta": delta, **rest}

    def _delta(self, chunk: TokenChunk) -> tuple[dict[str, Any], bool]:
        """What is new, and whether it belongs to calls of tools."""
        if self._tools.function:
            function: dict[str, Any] = {"arguments": chunk.text}
            if self._begun:
                return {"tool_calls": [{"index": 0, "function": function}]}, True
            told = call(self._tools.function, chunk.text)
            return {"content": None, "tool_calls": [{"index": 0, **told}]}, True
        if not self._tools.required:
            return ({"content": chunk.text} if chunk.text else {}), False
        self._withheld += chunk.text
        if chunk.finish_reason is None:
            return {}, False
        calls = self._tools.calls(self._withheld)
        if calls is None:
            return {"content": self._withheld}, False
        return {"tool_calls": [{"index": i, **one} for i, one in enumerate(calls)]}, True

    def _rest(self, chunk: TokenChunk, *, called: bool) -> dict[str, Any]:
        """What a choice has beside its text. `called`: it is a call of tools."""
        reason = chunk.finish_reason and chunk.finish_reason.value
        if called and chunk.finish_reason is FinishReason.STOP:
            reason = "tool_calls"
        told: dict[str, Any] = {"logprobs": None, "finish_reason": reason}
        if self._asked.logprobs:
            told["logprobs"] = of_chat(chunk.logprobs, self._token_bytes)
        if self._asked.prompt_logprobs is not None and not self._begun:
            told["prompt_logprobs"] = of_prompt(
                chunk.prompt_logprobs, self._asked.prompt_logprobs, self._token_bytes
            )
        if self._asked.return_token_ids:
            told["token_ids"] = chunk.token_ids
        return {**told, **ending(chunk)}
