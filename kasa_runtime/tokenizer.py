"""The base model's tokenizer: text and chats to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kasa_runtime.detokenizer import Detokenizer
from kasa_runtime.errors import InvalidRequest, ModelError
from kasa_runtime.types import ChatMessage, SamplingParams


class Tokenizer:
    """A fast transformers tokenizer. Thread-safe. Raises ModelError where there is none."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"{model_dir}: cannot load its tokenizer: {error}") from error
        if not getattr(self._tokenizer, "is_fast", False):
            raise ModelError(
                f"{model_dir}: want a fast tokenizer (tokenizer.json), found a slow one"
            )

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model puts around a text."""
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """By the model's chat template, ready for the assistant's answer. Raises InvalidRequest."""
        if not self.has_chat_template:
            raise InvalidRequest("chat", "this model has no chat template; send a prompt instead")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's, and raises what it likes
            raise InvalidRequest(
                "chat", f"the model's chat template refused it: {error}"
            ) from error
        backend = self._tokenizer.backend_tokenizer
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def detokenizer(self, sampling: SamplingParams) -> Detokenizer:
        return Detokenizer(self._tokenizer, sampling.stop, sampling.min_tokens)
