"""The HTTP port: uvicorn's protocol on our event loop, with limits on what a client may send and
how slowly."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import time
from email.utils import formatdate
from functools import lru_cache, partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.config import HttpLimits
from server.http.access import CERTIFICATE
from server.http.errors import of_status

logger = logging.getLogger(__name__)

MAX_URL_BYTES = 16 * 2**10
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 2**10
"""Of all headers of a request; also of what may arrive without completing anything."""
MIN_BYTES_PER_S = 1024
"""A body that arrives faster than this is never too slow, however large it is."""
LINGER_S = 1.0
LOOK_S = 0.05
KEEP_ALIVE = (
    # A client that vanished without a word is found, and its requests cancelled, within 40 s.
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 1),
)


class Listener:
    """Serves `app`. Event loop only."""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._state = ServerState()
        config = Config(
            app,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # whose limits a request counts against is not the client's to say
            timeout_keep_alive=limits.http_idle_s,  # type: ignore[arg-type]
        )
        config.load()
        self._protocol = partial(Protocol, config, self._state, limits.http_receive_s)
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Raises OSError if it cannot listen there."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, host, port, ssl=tls, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self, grace_s: float) -> None:
        """Take no more requests, let those in flight end for `grace_s`, cancel the rest."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        deadline_s = time.monotonic() + grace_s
        while self._state.tasks and time.monotonic() < deadline_s:
            await asyncio.sleep(LOOK_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)


class _Refused(Exception):
    """A request that is not to be read on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Protocol(HttpToolsProtocol):
    """One connection. A request is cancelled when its client goes away."""

    def __init__(self, config: Config, state: ServerState, receive_s: float) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self.logger = logger
        self._answer, self.app = self.app, self._cancellable
        self._running: set[asyncio.Task[Any]] = set()
        self._receive_s = receive_s
        self._timer: asyncio.TimerHandle | None = None  # while a request is being received
        self._began_s = 0.0
        self._num_body_bytes = 0
        self._num_headers = 0
        self._num_header_bytes = 0
        self._num_idle_bytes = 0  # since the parser last had something whole
        self._refusal: _Refused | None = None

    # From the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._certificate = transport.get_extra_info("peercert")
        _keep_alive(transport.get_extra_info("socket"))
        self._begin_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_receiving()
        self._unset_keepalive_if_required()
        self._cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._num_idle_bytes += len(data)
        super().data_received(data)
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._begin_receiving()  # empty lines, which are the beginning of nothing yet
        if self._num_idle_bytes > MAX_HEADER_BYTES and self._refusal is None:
            self._refusal = _Refused(431, f"want a header of at most {MAX_HEADER_BYTES} bytes")
            self.send_400_response("")

    # From the parser.

    def on_message_begin(self) -> None:
        self.server_state.default_headers = _date(int(time.time()))
        self._num_headers = self._num_header_bytes = self._num_body_bytes = 0
        self._num_idle_bytes = 0
        super().on_message_begin()
        if self._timer is None:
            self._begin_receiving()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(414, f"want a URL of at most {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_idle_bytes = 0
        self._num_headers += 1
        self._num_header_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS:
            self._refuse(431, f"want at most {MAX_HEADERS} headers")
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"want headers of at most {MAX_HEADER_BYTES} bytes together")
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._num_idle_bytes = 0
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_idle_bytes = 0
        self._end_receiving()
        super().on_message_complete()

    # What is wrong with a request.

    def _refuse(self, status: int, message: str) -> None:
        """Stop the parser, which then asks for `send_400_response`."""
        self._refusal = _Refused(status, message)
        raise self._refusal

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong, unless an answer is under way, and close. What still arrives is read
        for a while: closing before would reset the connection, and take the answer with it."""
        refusal = self._refusal = self._refusal or _Refused(400, "this is no HTTP/1.1 request")
        self._end_receiving()
        self._cancel()
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()
            return
        self.transport.write(_response(refusal.status, str(refusal)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _cancel(self) -> None:
        """Nobody waits for an answer any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
        for task in self._running:
            task.cancel()

    def _begin_receiving(self) -> None:
        if self._refusal is not None:
            return
        self._began_s = self.loop.time()
        self._timer = self.loop.call_later(self._receive_s, self._check_pace)

    def _end_receiving(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_pace(self) -> None:
        """A request has been on its way for a while: is it too slow, or only large?"""
        allowed_s = self._receive_s + self._num_body_bytes / MIN_BYTES_PER_S
        left_s = self._began_s + allowed_s - self.loop.time()
        if self.flow.read_paused:  # it is we who are slow
            left_s = max(left_s, 1.0)
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._check_pace)
            return
        self._refusal = _Refused(408, f"the request did not arrive within {allowed_s:.0f} s")
        self.send_400_response("")

    # The application.

    async def _cancellable(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        scope[CERTIFICATE] = self._certificate
        self._running.add(task)
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if self._refusal is None and not self.transport.is_closing():
                raise
        finally:
            self._running.discard(task)


def _keep_alive(connection: socket.socket | None) -> None:
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        if option := getattr(socket, name, None):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


@lru_cache(maxsize=1)
def _date(now_s: int) -> list[tuple[bytes, bytes]]:
    return [(b"date", formatdate(now_s, usegmt=True).encode())]


def _response(status: int, message: str) -> bytes:
    body = json.dumps(of_status(status, message).body).encode()
    return (
        STATUS_LINE[status]
        + b"content-type: application/json\r\nconnection: close\r\n"
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
    )
