"""Log-probabilities as OpenAI's two APIs have them, and vLLM's of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kasa_runtime.types import TokenLogprobs

LEAST = -9999.0
"""For minus infinity, which JSON does not have."""

TokenBytes = Callable[[Sequence[int]], list[bytes]]
"""See `Runtime.token_bytes`."""


def of_chat(entries: Sequence[TokenLogprobs], token_bytes: TokenBytes) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    return {"content": [_of_token(entry, token_bytes) for entry in entries], "refusal": None}


def _of_token(entry: TokenLogprobs, token_bytes: TokenBytes) -> dict[str, Any]:
    ids = [entry.token_id, *(token_id for token_id, _ in entry.top)]
    logprobs = [_finite(logprob) for logprob in (entry.logprob, *(value for _, value in entry.top))]
    chosen, *top = (
        {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
        for data, logprob in zip(token_bytes(ids), logprobs, strict=True)
    )
    return {**chosen, "top_logprobs": top}


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, which may come in parts: offsets go on."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0  # characters before the next token

    def of(
        self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], num_top: int
    ) -> dict[str, Any]:
        """Of these tokens, each with its entry; None for the first of a prompt. `num_top`: how many
        likeliest tokens to tell beside the chosen one."""
        tokens = [_name(data) for data in self._token_bytes(ids)]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._top(entry, num_top) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The chosen token among them. Of two with the same text, the likelier one's."""
        pairs = [*entry.top[:num_top], (entry.token_id, entry.logprob)]
        names = map(_name, self._token_bytes([token_id for token_id, _ in pairs]))
        found: dict[str, float] = {}
        for name, (_, logprob) in zip(names, pairs, strict=True):
            found.setdefault(name, _finite(logprob))
        return found


def of_prompt(
    entries: Sequence[TokenLogprobs | None], num_top: int, token_bytes: TokenBytes
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of each token of the prompt, the chosen and the likeliest by id.
    `rank` is None where the token is not among these."""
    return [None if entry is None else _by_id(entry, num_top, token_bytes) for entry in entries]


def _by_id(entry: TokenLogprobs, num_top: int, token_bytes: TokenBytes) -> dict[str, Any]:
    found: dict[int, tuple[float, int | None]] = {entry.token_id: (entry.logprob, None)}
    for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1):
        found[token_id] = (logprob, rank)
    names = token_bytes(list(found))
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": name.decode("utf-8", "replace"),
        }
        for (token_id, (logprob, rank)), name in zip(found.items(), names, strict=True)
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _name(data: bytes) -> str:
    """A token as text; one that is a part of a character as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
