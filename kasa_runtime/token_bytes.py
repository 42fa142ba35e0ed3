"""The bytes that single tokens stand for. A tokenizer decodes only what is a whole text."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"  # how SentencePiece writes it


class TokenBytes:
    """Token id -> bytes, of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: str(token.content) for token_id, token in added.items()}
        decoder = tokenizer.decoder
        kinds = set(_kinds(json.loads(decoder.__getstate__()) if decoder is not None else None))
        self._alphabet = _byte_level() if "ByteLevel" in kinds else None
        self._has_bytes = "ByteFallback" in kinds

    def __call__(self, token_id: int) -> bytes:
        """b"" if there is no such token."""
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None and self._alphabet.keys() >= set(token):
            return bytes(self._alphabet[character] for character in token)
        if self._has_bytes and (found := _BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return str(token).replace(SPACE, " ").encode()


def _kinds(decoder: Any) -> list[str]:
    """The types of a decoder and of those in it."""
    if decoder is None:
        return []
    inner = [kind for part in decoder.get("decoders", ()) for kind in _kinds(part)]
    return [decoder["type"], *inner]


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}
