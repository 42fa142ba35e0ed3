"""Who calls over HTTP: whom the token names, with a certificate where this server wants one."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from kasa_runtime.errors import PermissionDenied
from kasa_runtime.tokens import EVERYTHING, Action, Caller
from server.access import Gate

CERTIFICATE = "kasa.certificate"
"""Where the listener puts the client's certificate into the scope; None: it showed none."""


def caller(request: Request, gate: Gate) -> Caller:
    """Raises Unauthenticated; PermissionDenied without a certificate where one is wanted."""
    if gate.wants_certificate and not request.scope.get(CERTIFICATE):
        raise PermissionDenied("this server wants a certificate of its clients")
    return gate.caller(request.headers)


def require_sight_of_all(caller: Caller) -> None:
    """For what tells of every adapter. Raises PermissionDenied."""
    permitted = (*caller.patterns[Action.OBSERVE], *caller.patterns[Action.ADMINISTER])
    if EVERYTHING not in permitted:
        raise PermissionDenied(
            f'token {caller.name!r} needs observe = ["*"]: this page has every adapter'
        )


def peer(scope: Any) -> str:
    """The client's address as gRPC writes it, so that both faces count one client as one."""
    host, port = scope.get("client") or ("", 0)
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
