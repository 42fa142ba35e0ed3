"""Text to token ids, by the model's own tokenizer and chat template.

transformers says what they are: it knows every way in which models ship them. Importing it takes
seconds, so its answer is remembered under KASA_HOME.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from kasa_runtime.detokenizer import Detokenizer
from kasa_runtime.errors import InvalidRequest, ModelError
from kasa_runtime.home import remembered
from kasa_runtime.token_bytes import TokenBytes
from kasa_runtime.types import ChatMessage, SamplingParams

if TYPE_CHECKING:
    from kasa_runtime.chat_template import ChatTemplate

VERSION = 1
"""Of what is remembered; raise it when that changes."""

TEMPLATES = "additional_chat_templates"
LARGEST_READ = 64 * 2**20
"""Bytes of a file beside the weights: larger ones are known by size and time."""


class Tokenizer:
    """A fast transformers tokenizer. Thread-safe. Raises ModelError where there is none."""

    def __init__(self, model_dir: Path) -> None:
        try:
            known = remembered("tokenizers", _made_of(model_dir), lambda: _as_json(model_dir))
        except OSError as error:
            raise ModelError(f"{model_dir}: cannot load its tokenizer: {error}") from error
        self._backend = tokenizers.Tokenizer.from_str(known["backend"])
        self._backend.encode_special_tokens = known["encode_special_tokens"]
        self._templates: dict[str, str] = known["chat_templates"]
        self._special_tokens: dict[str, str] = known["special_tokens"]

    @property
    def backend(self) -> tokenizers.Tokenizer:
        return self._backend

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model puts around a text."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """By the model's chat template, ready for the assistant's answer. Raises InvalidRequest."""
        if not self.has_chat_template:
            raise InvalidRequest("chat", "this model has no chat template; send a prompt instead")
        if not messages:
            raise InvalidRequest("chat", "want at least one message")
        try:
            template = self._tool_template if tools else self._template
            if tools and not template.tells_tools:
                raise InvalidRequest("tools", "this model's chat template does not know tools")
            text = template.render(messages, tools)
        except InvalidRequest:
            raise
        except (
            Exception
        ) as error:  # a template is a program of the model's, and raises what it likes
            raise InvalidRequest(
                "chat", f"the model's chat template refused it: {error}"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def detokenizer(self, sampling: SamplingParams) -> Detokenizer:
        return Detokenizer(self._backend, sampling.stop, sampling.min_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, which may be a part of a character; of a special one, its name.
        b"" if there is no such token."""
        return self._token_bytes(token_id)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._backend)

    @cached_property
    def _template(self) -> ChatTemplate:
        from kasa_runtime.chat_template import ChatTemplate

        if "default" not in self._templates:
            raise ValueError(f"want one named default, found {sorted(self._templates)}")
        return ChatTemplate(self._templates["default"], self._special_tokens)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """Some models have another one for conversations with tools."""
        from kasa_runtime.chat_template import ChatTemplate

        if "tool_use" not in self._templates:
            return self._template
        return ChatTemplate(self._templates["tool_use"], self._special_tokens)


def _as_json(model_dir: Path) -> dict[str, Any]:
    """What transformers makes of the directory. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{model_dir}: cannot load its tokenizer: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{model_dir}: want a fast tokenizer (tokenizer.json), found a slow one")
    templates = tokenizer.chat_template or {}
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # a bare one, where a part of it is written in Python
        raise ModelError(f"{model_dir}: its tokenizer cannot be kept: {error}") from error
    return {
        "backend": backend,
        "encode_special_tokens": tokenizer.backend_tokenizer.encode_special_tokens,
        "chat_templates": {"default": templates} if isinstance(templates, str) else templates,
        "special_tokens": tokenizer.special_tokens_map,
    }


def _made_of(model_dir: Path) -> dict[str, str]:
    """All files that a tokenizer may be made of, and what makes it."""
    versions = {name: version(name) for name in ("transformers", "tokenizers")}
    files = [path for path in _files(model_dir) if path.is_file()]
    contents = {f"file {path.relative_to(model_dir)}": _identity(path) for path in files}
    return {"version": str(VERSION), **versions, **contents}


def _files(model_dir: Path) -> Iterator[Path]:
    yield from model_dir.iterdir()
    yield from (model_dir / TEMPLATES).glob("*")


def _identity(path: Path) -> str:
    stat = path.stat()
    if stat.st_size > LARGEST_READ:
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
