"""Who may read what over HTTP: probes all, the rest only those who may observe every adapter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from kasa_runtime.errors import Unauthenticated
from kasa_runtime.tokens import EVERYTHING, Action
from server.access import Gate

PROBES = ("/healthz", "/readyz")


def guard(gate: Gate, *, wants_certificate: bool) -> Middleware:
    """A middleware that answers 401 and 403. `wants_certificate`: of the client."""

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path not in PROBES:
            if wants_certificate and not _certificate(request):
                raise web.HTTPForbidden(text="this server wants a certificate of its clients\n")
            _check_token(gate, request)
        return await handler(request)

    return check


def _certificate(request: web.Request) -> object:
    return request.transport is not None and request.transport.get_extra_info("peercert")


def _check_token(gate: Gate, request: web.Request) -> None:
    headers = {name.lower(): value for name, value in request.headers.items()}
    try:
        caller = gate.caller(headers)
    except Unauthenticated as error:
        headers = {"WWW-Authenticate": "Bearer"}
        raise web.HTTPUnauthorized(text=f"{error}\n", headers=headers) from None
    permitted = (*caller.patterns[Action.OBSERVE], *caller.patterns[Action.ADMINISTER])
    if EVERYTHING not in permitted:
        text = f'token {caller.name!r} needs observe = ["*"]: this page has every adapter\n'
        raise web.HTTPForbidden(text=text)
