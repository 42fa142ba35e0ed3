"""Every RPC counted and timed as it ends, with the names that dashboards of gRPC servers know."""

from __future__ import annotations

import functools
import inspect
import time
from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram

from server.trace_context import current_trace_id, exemplar, trace_id

# Seconds. From a health check to a generation of minutes.
HANDLING_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0),
)
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class GrpcMetrics(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Only methods that exist are counted, so that clients cannot make up series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        method = ("grpc_service", "grpc_method")
        self._handled = Counter(
            "grpc_server_handled",
            "RPCs that ended, by status code",
            (*method, "grpc_code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From the arrival of an RPC to its end",
            method,
            buckets=HANDLING_BUCKETS,
            registry=registry,
        )

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        kind = next(kind for kind in KINDS if getattr(handler, kind) is not None)
        watched = self._watched(getattr(handler, kind), details)
        return handler._replace(**{kind: watched})

    def _watched(self, handle: Callable[[Any, Any], Any], details: Any) -> Callable[..., Any]:
        _, service, method = details.method.split("/")
        trace = trace_id(details.invocation_metadata)

        async def call(request: Any, context: Any) -> Any:
            current_trace_id.set(trace)
            with self._count(service, method, context):
                return await handle(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            current_trace_id.set(trace)
            with self._count(service, method, context):
                async for response in handle(request, context):
                    yield response

        return functools.wraps(handle)(stream if inspect.isasyncgenfunction(handle) else call)

    @contextmanager
    def _count(self, service: str, method: str, context: Any) -> Iterator[None]:
        start_s = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield
            code = _code(context) or code
        except (CancelledError, GeneratorExit):
            code = _cancelled(context)
            raise
        except BaseException:
            code = _code(context) or grpc.StatusCode.UNKNOWN
            raise
        finally:
            mark = exemplar()
            self._handled.labels(service, method, spoken(code)).inc(exemplar=mark)
            seconds = self._seconds.labels(service, method)
            seconds.observe(time.monotonic() - start_s, mark)


def spoken(code: grpc.StatusCode) -> str:
    """The name of a code as the metrics of other gRPC servers have it: NotFound, Canceled, OK."""
    if code is grpc.StatusCode.OK:
        return "OK"
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    return str(code.name).title().replace("_", "")


def _code(context: Any) -> grpc.StatusCode | None:
    """The code that the method set, if it did; gRPC has it as a number or as a StatusCode."""
    found: grpc.StatusCode | int | None = context.code()
    if isinstance(found, int):
        return next((code for code in grpc.StatusCode if code.value[0] == found), None)
    return found


def _cancelled(context: Any) -> grpc.StatusCode:
    """The client went away, or its deadline passed."""
    remaining_s = context.time_remaining()
    late = remaining_s is not None and remaining_s <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
