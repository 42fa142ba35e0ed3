"""Server-sent events, one write for each."""

from __future__ import annotations

from starlette.types import Send

DONE = b"[DONE]"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events together
]


class EventStream:
    """An answer that begins with its first event. Sending waits for a reader that is slow."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """`data` has no line break."""
        if not self.begun:
            self.begun = True
            start = {"type": "http.response.start", "status": 200, "headers": HEADERS}
            await self._send(start)
        body = b"data: %b\n\n" % data
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
