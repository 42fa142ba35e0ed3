"""The trace that a call belongs to, as W3C Trace Context writes it into the metadata of a call."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

HEADER = "traceparent"
# version, trace id, parent id, flags; later versions may add more.
_PATTERN = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?"
)
_SAMPLED = 0x01

current_trace_id: ContextVar[str] = ContextVar("current_trace_id", default="")
"""Of the call that is handled; "" where nothing records its trace."""


def trace_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The trace id of a call's metadata; "" if it has none, or one that is not sampled."""
    value = dict(metadata or ()).get(HEADER, "")
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    return match[1] if match and int(match[2], 16) & _SAMPLED else ""


def exemplar() -> dict[str, str] | None:
    """What an observation is marked with, so that its trace can be looked up."""
    found = current_trace_id.get()
    return {"trace_id": found} if found else None
