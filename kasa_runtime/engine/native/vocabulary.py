"""The bytes that each token stands for, which masks are computed from.

llguidance could read them from a tokenizer.json itself; it would hold the interpreter, and so every
stream, for twice as long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Set

import tokenizers

from kasa_runtime.errors import ModelError

MARK = "\x02"
"""Goes before a text that is not at a beginning: no token joins it to what follows, and what a
tokenizer puts before every text comes before it."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
Spelling = Callable[[str], bytes]


class Vocabulary:
    """A tokenizer with the names by which `LLTokenizer` asks. `size`: of the model's vocabulary;
    ids that are no token, and special ones, have no text. Raises ModelError where the tokenizer
    hides its bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int, eos_ids: Set[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(eos_ids)
        self.tokens = [b""] * size
        spelling = _spelling(tokenizer)
        for text, token in tokenizer.get_vocab(with_added_tokens=False).items():
            if token < size:  # a tokenizer may know more tokens than the model
                self.tokens[token] = spelling(text)
        special = set(eos_ids)
        for token, added in tokenizer.get_added_tokens_decoder().items():
            if token < size:
                self.tokens[token] = added.content.encode()
            if added.special or re.fullmatch(r"<.+>", added.content, re.DOTALL):
                special.add(token)
        self.special_token_ids = sorted(token for token in special if token < size)
        self._plain = {
            text: token for token, text in enumerate(self.tokens) if text and token not in special
        }
        self._longest = max(map(len, self._plain), default=0)
        self._num_before = len(tokenizer.encode(MARK, add_special_tokens=False).ids)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces. They stand for exactly its bytes, also
        where the model's own tokenizer would change it, or find special tokens in it."""
        ids: list[int] = self._tokenizer.encode(MARK + text, add_special_tokens=False).ids
        ids, whole = ids[self._num_before :], text.encode()
        spelt = [self.tokens[token] for token in ids if token < len(self.tokens)]
        if b"".join(spelt) == whole and all(piece in self._plain for piece in spelt):
            return ids
        return self._longest_first(whole)

    def _longest_first(self, rest: bytes) -> list[int]:
        """As far as there are tokens for it."""
        ids = []
        while rest:
            ends = range(min(self._longest, len(rest)), 0, -1)
            piece = next((rest[:end] for end in ends if rest[:end] in self._plain), None)
            if piece is None:
                break
            ids.append(self._plain[piece])
            rest = rest[len(piece) :]
        return ids


def _spelling(tokenizer: tokenizers.Tokenizer) -> Spelling:
    """How the model's decoder makes bytes of a token's name."""
    found = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    decoders = [found, *found.get("decoders", [])]
    types = {decoder.get("type") for decoder in decoders}
    if "ByteLevel" in types:
        return _byte_level()
    signs = [decoder["replacement"] for decoder in decoders if decoder.get("type") == "Metaspace"]
    signs += [
        decoder["pattern"]["String"]
        for decoder in decoders
        if decoder.get("type") == "Replace"
        and decoder["content"] == " "
        and "String" in decoder["pattern"]
    ]
    if "ByteFallback" in types or signs:
        return _byte_fallback(signs[0] if signs else " ")
    raise ModelError(
        f"want a tokenizer of bytes or with byte fallback, found the decoder {found.get('type')}"
    )


def _byte_level() -> Spelling:
    """GPT-2's names: a character for each byte, printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    names = {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}

    def spell(name: str) -> bytes:
        try:
            return name.translate(names).encode("latin-1")
        except UnicodeEncodeError:  # no such name: the text itself
            return name.encode()

    return spell


def _byte_fallback(space: str) -> Spelling:
    """SentencePiece's names: text with a sign for the space, and one name for each byte."""

    def spell(name: str) -> bytes:
        if byte := BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(space, " ").encode()

    return spell
