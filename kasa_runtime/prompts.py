"""Prompts of every kind to token ids, checked against what the model and the server take."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import GenerationRequest

if TYPE_CHECKING:
    from kasa_runtime.engine.base import EngineLimits
    from kasa_runtime.tokenizer import Tokenizer


class Prompts:
    """Encodes off the event loop, one prompt after the other. Event loop only."""

    def __init__(self, tokenizer: Tokenizer, limits: EngineLimits, max_tokens: int) -> None:
        """`max_tokens` of one prompt; 0: as many as the context holds."""
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_tokens = max_tokens
        # A thread of its own: the loop's are at times all busy with adapters and their tails.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def encode(self, request: GenerationRequest) -> tuple[int, ...]:
        """The prompt's ids. Raises InvalidRequest naming the field."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, request)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        if request.token_ids is not None:
            where, ids = "tokens.ids", request.token_ids
        elif request.messages is not None:
            ids = tuple(self._tokenizer.encode_chat(request.messages, request.tools))
            where = "chat"
        else:
            where, ids = "prompt", tuple(self._tokenizer.encode(request.prompt or ""))
        self._check_ids(where, ids)
        self._check_room(where, len(ids), request.sampling.max_tokens)
        return ids

    def _check_ids(self, where: str, ids: tuple[int, ...]) -> None:
        if not ids:
            raise InvalidRequest(where, "must not be empty")
        # Of a text, too: a tokenizer may know more tokens than the model.
        vocab_size = self._limits.vocab_size
        if bad := [i for i in ids if not 0 <= i < vocab_size]:
            raise InvalidRequest(where, f"want ids from 0 to {vocab_size - 1}, got {bad[0]}")

    def _check_room(self, where: str, num_tokens: int, max_tokens: int | None) -> None:
        """`max_tokens` are to follow."""
        if num_tokens > (self._max_tokens or num_tokens):
            raise InvalidRequest(
                where, f"has {num_tokens} tokens, this server takes {self._max_tokens}"
            )
        context = self._limits.context_length
        room = context - num_tokens
        if room < 1:
            raise InvalidRequest(where, f"has {num_tokens} tokens, the context holds {context}")
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"want at most {room} after a prompt of {num_tokens} tokens, got {max_tokens}",
            )
