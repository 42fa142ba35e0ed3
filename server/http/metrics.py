"""Every HTTP request counted and timed as it ends, under the paths of routes alone."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics import OTHER_LABEL, REQUEST_BUCKETS
from server.trace_context import exemplar

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
GONE = "gone"
"""The code of a request whose client went away."""


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "kasa_http_requests",
            "HTTP requests that ended, by status: of a stream that failed in its middle, the "
            "error's; `gone`: the client went away first",
            ("handler", "method", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "kasa_http_request_seconds",
            "From the arrival of an HTTP request to the end of its answer",
            ("handler",),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )

    def ended(self, path: str | None, method: str, code: str, arrival_s: float) -> None:
        """`path`: the route's; None where there is no such route."""
        handler, mark = path or OTHER_LABEL, exemplar()
        method = method if method in METHODS else OTHER_LABEL
        self._requests.labels(handler, method, code).inc(exemplar=mark)
        self._seconds.labels(handler).observe(time.monotonic() - arrival_s, mark)
