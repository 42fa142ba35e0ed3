"""Metrics, and whether the server lives and is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from kasa_runtime.runtime import Runtime
from server.access import Gate
from server.gauges import Gauges
from server.http.access import caller, require_sight_of_all
from server.metrics import Metrics
from server.vllm_metrics import VllmMetrics


class Pages:
    """`/healthz`, `/health` and `/readyz` need no token, metrics one that may observe every
    adapter."""

    def __init__(
        self, runtime: Runtime, metrics: Metrics, gate: Gate, *, vllm_metrics: bool = False
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._gate = gate
        self._gauges = Gauges(runtime, metrics.label)
        self._vllm_metrics = VllmMetrics(runtime) if vllm_metrics else None
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    def routes(self) -> list[Route]:
        routes = [
            Route("/healthz", self.healthz),
            Route("/health", self.healthz),  # where clients of OpenAI's API look for it
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]
        return routes + ([Route("/metrics/vllm", self.for_routers)] if self._vllm_metrics else [])

    def close(self) -> None:
        self._encoding.shutdown()

    async def healthz(self, request: Request) -> Response:
        """The process answers and its engine lives; when not, it should be restarted."""
        return _answer(self._runtime.alive, "ok", "the engine has stopped")

    async def readyz(self, request: Request) -> Response:
        """Requests can be served; when not, none should be sent here."""
        return _answer(self._runtime.ready, "ready", "draining, or the engine has stopped")

    async def metrics(self, request: Request) -> Response:
        return await self._page(request, self._gauges, self._metrics.registry)

    async def for_routers(self, request: Request) -> Response:
        """What gateways that route to vLLM read."""
        assert self._vllm_metrics is not None
        return await self._page(request, self._vllm_metrics)

    async def _page(self, request: Request, gauges: Collector, *counted: Collector) -> Response:
        """`gauges` are read on the event loop. All is encoded, and `counted` is collected, in a
        thread: with a hundred adapters that takes tenths of a second, for which no stream should
        stand."""
        require_sight_of_all(caller(request, self._gate))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        read = list(gauges.collect())
        families = _Families(chain(read, *(collector.collect() for collector in counted)))
        body = await asyncio.get_running_loop().run_in_executor(self._encoding, encode, families)
        return Response(body, headers={"content-type": content_type})


class _Families(Collector):
    """Metrics that were collected, or are when they are encoded."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _answer(good: bool, yes: str, no: str) -> Response:
    return PlainTextResponse(f"{yes if good else no}\n", 200 if good else 503)
