"""HTTP beside gRPC, on the same event loop: metrics, and whether the server lives and is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kasa_runtime.runtime import Runtime
from server.gauges import Gauges
from server.metrics import Metrics
from server.vllm_metrics import VllmMetrics

Handler = Callable[[web.Request], Awaitable[web.Response]]


def build_app(
    runtime: Runtime,
    metrics: Metrics,
    middlewares: Sequence[Middleware] = (),
    *,
    vllm_metrics: bool = False,
) -> web.Application:
    """The application; the caller runs it."""

    async def healthz(request: web.Request) -> web.Response:
        """The process answers and its engine lives; when not, it should be restarted."""
        return _answer(runtime.alive, "ok", "the engine has stopped")

    async def readyz(request: web.Request) -> web.Response:
        """Requests can be served; when not, none should be sent here."""
        return _answer(runtime.ready, "ready", "draining, or the engine has stopped")

    async def threads(app: web.Application) -> AsyncIterator[None]:
        with encoding:
            yield

    app = web.Application(middlewares=middlewares)
    encoding = ThreadPoolExecutor(1, thread_name_prefix="metrics")
    app.cleanup_ctx.append(threads)
    page = _page(encoding, Gauges(runtime, metrics.label), metrics.registry)
    app.add_routes(
        [web.get("/metrics", page), web.get("/healthz", healthz), web.get("/readyz", readyz)]
    )
    if vllm_metrics:
        app.add_routes([web.get("/metrics/vllm", _page(encoding, VllmMetrics(runtime)))])
    return app


class _Families(Collector):
    """Metrics that were collected, or are when they are encoded."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _page(encoding: ThreadPoolExecutor, gauges: Collector, *counted: Collector) -> Handler:
    """`gauges` are read on the event loop. All is encoded, and `counted` is collected, in a thread:
    with a hundred adapters that takes tenths of a second, for which no stream should stand."""

    async def page(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        read = list(gauges.collect())
        families = _Families(chain(read, *(collector.collect() for collector in counted)))
        body = await asyncio.get_running_loop().run_in_executor(encoding, encode, families)
        return web.Response(body=body, headers={"Content-Type": content_type})

    return page


def _answer(good: bool, yes: str, no: str) -> web.Response:
    return web.Response(text=f"{yes if good else no}\n", status=200 if good else 503)
