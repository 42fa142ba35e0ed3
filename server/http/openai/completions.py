"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.runtime import Runtime
from kasa_runtime.types import GenerationRequest, TokenChunk, TokenLogprobs
from server.access import Gate
from server.generating import Generating
from server.http.body import read_json
from server.http.calls import HttpCall
from server.http.openai.answers import Generations, ending, envelope
from server.http.openai.conversion import (
    MAX_TOKENS,
    Asked,
    adapter_of,
    check_stream_options,
    form_parameter,
    named_as_asked,
    structured_output,
)
from server.http.openai.logprobs import CompletionLogprobs, of_prompt
from server.http.openai.parsing import parse
from server.http.openai.requests import MAX_CHOICES, CompletionParameters


@dataclass(frozen=True)
class Completions:
    """Several prompts make several choices, those of the first prompt first."""

    runtime: Runtime
    generating: Generating
    gate: Gate
    max_bytes: int

    async def __call__(self, request: Request, call: HttpCall) -> ASGIApp:
        asked = parse(CompletionParameters, await read_json(request, self.max_bytes))
        _check(asked)
        with named_as_asked():
            choices = await self._choices(asked, call)
        fields = envelope(call, "cmpl", "text_completion", asked.model)
        form = form_parameter(asked)
        generations = Generations(self.generating, self.gate, call, choices, fields, form)
        return await generations.answer(asked)

    async def _choices(self, asked: CompletionParameters, call: HttpCall) -> list[CompletionChoice]:
        common = _common(asked, self.runtime.model.name)
        choices: list[CompletionChoice] = []
        for prompt in asked.prompt:
            ids = await self._ids(asked, prompt)
            for number in range(asked.n or 1):
                given: dict[str, Any] = {"prompt": prompt}
                if not isinstance(prompt, str):
                    given = {"token_ids": tuple(prompt)}
                generation = common.request(call.unique_id, number, **given)
                choices.append(
                    CompletionChoice(self.runtime, asked, generation, len(choices), number, ids)
                )
        return choices

    async def _ids(self, asked: CompletionParameters, prompt: str | list[int]) -> Sequence[int]:
        """The prompt's tokens, where they have to be known here."""
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise InvalidRequest("prompt", "must not be empty")
        figures = asked.echo and asked.logprobs is not None
        if figures or (asked.stream_options and asked.stream_options.continuous_usage_stats):
            return await asyncio.to_thread(self.runtime.tokenize, prompt=prompt)
        return ()


def _check(asked: CompletionParameters) -> None:
    """What parameters have to do with each other. Raises InvalidRequest."""
    check_stream_options(asked)
    if asked.best_of not in (None, asked.n or 1):
        raise InvalidRequest("best_of", f"is supported here only as n, which is {asked.n or 1}")
    if asked.max_tokens == 0 and not asked.echo:
        raise InvalidRequest("max_tokens", "must be at least 1, or echo must be true, got 0")
    if len(asked.prompt) * (asked.n or 1) > MAX_CHOICES:
        raise InvalidRequest("n", f"times the number of prompts must be at most {MAX_CHOICES}")


def _common(asked: CompletionParameters, base: str) -> Asked:
    max_tokens = MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    wanted = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
    return Asked(
        asked,
        adapter_of(asked.model, base),
        max_tokens or 1,  # the least that an engine generates; see `has_output`
        asked.logprobs,
        structured_output(asked),
        max((number for number in wanted if number is not None), default=None),
    )


class CompletionChoice:
    """See `answers.Choice`."""

    def __init__(
        self,
        runtime: Runtime,
        asked: CompletionParameters,
        request: GenerationRequest,
        index: int,
        number: int,
        prompt_ids: Sequence[int],
    ) -> None:
        self.index = index
        self.request = request
        self.is_first = number == 0
        self.has_output = asked.max_tokens != 0
        self.num_prompt_tokens = len(prompt_ids)
        self._asked = asked
        self._prompt_ids = tuple(prompt_ids)
        self._token_bytes = runtime.token_bytes
        self._logprobs = CompletionLogprobs(runtime.token_bytes)
        self._begun = False

    def whole(self, chunk: TokenChunk) -> dict[str, Any]:
        text, ids = chunk.text, chunk.token_ids
        entries: tuple[TokenLogprobs | None, ...] = chunk.logprobs
        told: dict[str, Any] = {}
        if not self._begun:
            self._begun = True
            if self._asked.prompt_logprobs is not None:
                told["prompt_logprobs"] = of_prompt(
                    chunk.prompt_logprobs, self._asked.prompt_logprobs, self._token_bytes
                )
            if self._asked.echo:
                text = self._prompt_text() + text
                ids, entries = self._prompt_ids + ids, chunk.prompt_logprobs + entries
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._logprobs.of(ids, entries, self._asked.logprobs)
        if self._asked.return_token_ids:
            told["token_ids"] = chunk.token_ids
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": chunk.finish_reason and chunk.finish_reason.value,
            **told,
            **ending(chunk),
        }

    def part(self, chunk: TokenChunk) -> dict[str, Any] | None:
        told = self.whole(chunk)
        silent = not told["text"] and told["logprobs"] is None and not told.get("token_ids")
        return None if silent and chunk.finish_reason is None else told

    def _prompt_text(self) -> str:
        if self.request.prompt is not None:
            return self.request.prompt
        return b"".join(self._token_bytes(self._prompt_ids)).decode("utf-8", "replace")
