"""HTTP beside gRPC, on the same event loop: /metrics, /healthz, /readyz."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kasa_runtime.runtime import Runtime


def build_app(
    runtime: Runtime, registry: CollectorRegistry, middlewares: Sequence[Middleware] = ()
) -> web.Application:
    """The application; the caller runs it."""

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def healthz(request: web.Request) -> web.Response:
        """The process answers and its engine lives; when not, it should be restarted."""
        return _answer(runtime.alive, "ok", "the engine has stopped")

    async def readyz(request: web.Request) -> web.Response:
        """Requests can be served; when not, none should be sent here."""
        return _answer(runtime.ready, "ready", "draining, or the engine has stopped")

    app = web.Application(middlewares=middlewares)
    app.add_routes(
        [web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)]
    )
    return app


def _answer(good: bool, yes: str, no: str) -> web.Response:
    return web.Response(text=f"{yes if good else no}\n", status=200 if good else 503)
