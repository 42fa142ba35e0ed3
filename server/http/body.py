"""The body of a request, as long as it may be."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request

DISCARDED_BYTES = 64 * 2**20
"""What is read of a body that is too large: a client learns why only after it has sent."""


async def read_json(request: Request, max_bytes: int) -> bytes:
    """The body, which must say that it is JSON: another type could be sent by any page that is open
    in a browser beside the server. Raises HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"want content-type: application/json, got {kind[:80]!r}")
    return await read(request, max_bytes)


async def read(request: Request, max_bytes: int) -> bytes:
    """Raises HTTPException if it is longer than `max_bytes`."""
    body, num_bytes = bytearray(), 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= max_bytes:
            body += part
        elif num_bytes > max_bytes + DISCARDED_BYTES:
            break
    if num_bytes > max_bytes:
        message = f"this server takes a body of {max_bytes} bytes (max_message_mib)"
        raise HTTPException(413, message, {"connection": "close"})
    return bytes(body)
