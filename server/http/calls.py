"""What every HTTP request has in common: an id, errors that leave as error objects, a line in the
log, metrics. An `Endpoint` admits its callers as an RPC does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kasa_runtime.errors import KasaError
from server import logs
from server.access import Gate, client_of, told_to
from server.call import REQUEST_ID, Call
from server.http.access import caller, peer
from server.http.errors import Problem, to_problem
from server.http.metrics import GONE, HttpMetrics
from server.status import DeadlineExpired
from server.trace_context import HEADER, current_trace_id, trace_id

logger = logging.getLogger(__name__)

CALL = "kasa.call"
MAX_LOGGED = 200  # bytes of a path that is no route's


@dataclass(slots=True, kw_only=True)
class HttpCall(Call):
    """One request. `status`: of its answer, 0 before that begins; of a stream that failed in its
    middle, the error's."""

    status: int = 0

    def problem(self, error: Exception) -> Problem:
        """What this caller is told of an error. Of what nobody expected, the log tells more."""
        if not isinstance(error, (KasaError, DeadlineExpired)):
            logger.exception("%s failed, request %s", self.method, self.request_id, exc_info=error)
        problem = to_problem(told_to(self.caller, error))
        self.facts |= {"error": problem.message}
        return problem


def call_of(request: Request) -> HttpCall:
    call = request.scope[CALL]
    assert isinstance(call, HttpCall)
    return call


class Calls:
    """ASGI middleware around everything. `paths`: endpoint -> path of its route."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, paths: Mapping[Any, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        call = HttpCall(method=scope["method"], metadata=headers)
        scope[CALL] = call
        wrong_id = call.take_request_id()
        current_trace_id.set(trace_id([(HEADER, headers.get(HEADER, ""))]))
        with logs.request(call.request_id):
            try:
                await self._answer(scope, receive, _noted(send, call), wrong_id)
            except asyncio.CancelledError:
                call.status = 0
                raise
            finally:
                self._end(scope, call)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, wrong_id: Exception | None
    ) -> None:
        call = scope[CALL]
        try:
            if wrong_id is not None:
                raise wrong_id
            await self._app(scope, receive, send)
        except Exception as error:
            problem = call.problem(error)
            if call.status:
                raise  # in the middle of an answer: the connection is closed
            await problem.response()(scope, receive, send)

    def _end(self, scope: Scope, call: HttpCall) -> None:
        code = str(call.status or GONE)
        path = self._paths.get(scope.get("endpoint"))
        self._metrics.ended(path, scope["method"], code, call.arrival_s)
        # Not of every probe, every scrape and every look of a page.
        if scope["method"] != "GET" or not 0 < call.status < 400:
            where = path or scope["raw_path"][:MAX_LOGGED].decode("ascii", "backslashreplace")
            call.method = f"{scope['method']} {where}"
            call.facts["code"] = code
            call.log(logger)


def _noted(send: Send, call: HttpCall) -> Send:
    """Marks the answer with the request's id, and remembers its status."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.status = message["status"]
            own = (REQUEST_ID.encode(), call.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), own]}
        await send(message)

    return noted


Handler = Callable[[Request, HttpCall], Awaitable[ASGIApp]]


class Endpoint:
    """ASGI application of one route: admits the caller, and counts the call against its limits
    until the answer has been sent."""

    def __init__(self, gate: Gate, handle: Handler) -> None:
        self._gate = gate
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        call = call_of(request)
        call.caller = caller(request, self._gate)
        call.client = client_of(call.caller, peer(scope))
        with self._gate.stream(call.client):
            response = await self._handle(request, call)
            await response(scope, receive, send)
