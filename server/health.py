"""grpc.health.v1.Health: of the server (""), each service, each adapter ("adapter/<name>").

The servicer of grpcio-health-checking is not used: its `set` must be awaited, and it cannot forget
a name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from kasa_runtime.types import AdapterInfo, AdapterState
from server.access import Gate

ADAPTER_PREFIX = "adapter/"
Response = health_pb2.HealthCheckResponse


class Health:
    """Everything is set on the event loop, and seen by watchers at once. The server and its
    services answer without a token, adapters those who may see them."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._serving: dict[str, bool] = {}
        self._shut_down = False
        self._changed = asyncio.Event()

    def set_services(self, names: Sequence[str]) -> None:
        """From now on the server and these services serve."""
        self._update(self._serving | dict.fromkeys(("", *names), True))

    def set_adapters(self, adapters: Sequence[AdapterInfo]) -> None:
        """These are all adapters: serving unless in quarantine; one that has gone is forgotten."""
        others = {
            name: serving
            for name, serving in self._serving.items()
            if not name.startswith(ADAPTER_PREFIX)
        }
        states = {ADAPTER_PREFIX + info.name: info.state for info in adapters}
        serving = {name: state is not AdapterState.QUARANTINED for name, state in states.items()}
        self._update(others | serving)

    def shut_down(self) -> None:
        """Nothing serves any more, whatever is set later."""
        self._shut_down = True
        self._update(self._serving)

    def _update(self, serving: dict[str, bool]) -> None:
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def _response(self, name: str) -> Any:
        match self._serving.get(name):
            case None:
                return Response(status=Response.SERVICE_UNKNOWN)
            case serving:
                up = serving and not self._shut_down
                return Response(status=Response.SERVING if up else Response.NOT_SERVING)

    def _visible(self, context: Any, name: str) -> bool:
        adapter = name.removeprefix(ADAPTER_PREFIX)
        return adapter == name or self._gate.sees(context, adapter)

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in self._serving or not self._visible(context, request.service):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown name {request.service!r}")
        return self._response(request.service)

    async def List(self, request: Any, context: Any) -> Any:
        statuses = {
            name: self._response(name) for name in self._serving if self._visible(context, name)
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> None:
        last = None
        while True:
            changed = self._changed
            response = Response(status=Response.SERVICE_UNKNOWN)
            if self._visible(context, request.service):
                response = self._response(request.service)
            if response != last:
                await context.write(response)
                last = response
            await changed.wait()
