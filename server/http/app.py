"""The HTTP application: which path leads where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from server.http.calls import Calls
from server.http.errors import to_problem
from server.http.metrics import HttpMetrics
from server.http.origin import OwnOrigin


def build_app(
    routes: Sequence[Route], metrics: HttpMetrics, *, own_names_only: bool = False
) -> ASGIApp:
    """The application; the caller runs it. A handler may raise any error: the client gets an error
    object (`errors.py`). `own_names_only`: see `origin.py`."""
    paths = {route.endpoint: route.path for route in routes}
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Calls, metrics, paths),
            Middleware(OwnOrigin, own_names_only=own_names_only),
        ],
        exception_handlers={HTTPException: _answer},
    )
    app.router.redirect_slashes = False
    return app


async def _answer(request: Request, error: Any) -> Response:
    """What Starlette itself raises: there is no such path, or the path has no such method."""
    return to_problem(error).response()
