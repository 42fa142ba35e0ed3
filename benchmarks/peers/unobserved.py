"""`kasa`, whose server counts nothing: what observing it costs is measured against this."""

from __future__ import annotations

from typing import Any

import grpc.aio

from kasa_runtime.cli import main
from kasa_runtime.types import Observer, TokenChunk
from server import app


class NoDelivery:
    def wrote(self, chunk: TokenChunk) -> None: ...


class Unobserved(app.Edge):
    """The health of adapters, and nothing else."""

    first_token = Observer.first_token
    tokens = Observer.tokens
    finished = Observer.finished
    failed = Observer.failed
    adapter_loaded = Observer.adapter_loaded
    merged = Observer.merged

    def delivery(self, adapter: str, arrival_s: float) -> Any:
        return NoDelivery()


class NoInterceptor(grpc.aio.ServerInterceptor):
    def __init__(self, registry: Any) -> None: ...

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        return await continuation(details)


if __name__ == "__main__":
    app.Edge = Unobserved  # type: ignore[misc]
    app.GrpcMetrics = NoInterceptor  # type: ignore[assignment,misc]
    main()
