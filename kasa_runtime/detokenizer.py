"""From token ids to text, one step at a time: no half characters, no stop strings, no text that a
stop string may take back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character, or not yet one."""


class Detokenizer:
    """The text of one generation, growing.

    `push` returns what is certain: a character appears when all of its bytes have, and text that
    could be the beginning of a stop string waits until it is not."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._unread: list[int] = []  # tokens since the stream last gave text
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # decoded, not yet given out
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens, return new text. Sets `stopped` when a stop string is complete; it and
        all behind it are cut off, and later tokens give nothing."""
        released = ""
        for token in token_ids:
            if self.stopped:
                break
            self._num_tokens += 1
            self._held += self._decode(token)
            released += self._release()
        return released

    def finish(self) -> str:
        """What was held back in case a stop string followed, or because bytes of a character were
        missing; a last character that is still not whole is left out."""
        if self.stopped:
            return ""
        self._held += self._read().rstrip(REPLACEMENT)
        text = self._release() + self._held
        self._held = ""
        return text

    def _decode(self, token: int) -> str:
        """The text that `token` completes."""
        self._unread.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # a bare one, where bytes turn text that was given out into no text
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer, token)  # what comes before the next token
            return self._read()
        if text:
            self._unread.clear()
        return text or ""

    def _read(self) -> str:
        """The text of the unread tokens, whole or not."""
        text: str = self._tokenizer.decode(self._unread, skip_special_tokens=True)
        self._unread.clear()
        return text

    def _release(self) -> str:
        if self._num_tokens < self._min_tokens:  # too early to stop: nothing is held either
            text, self._held = self._held, ""
            return text
        found = [(i, s) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[0]], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, `stop` itself excluded."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
