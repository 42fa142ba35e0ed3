"""OpenTelemetry spans of generations: one for the request, in it queue, lease, load, prefill and
decode. Names of attributes are those of the semantic conventions for generative AI, and `kasa.*`.

Spans are made when a request has ended, from times that it has anyway. OpenTelemetry is imported
only if there is somebody to tell.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import grpc

from kasa_runtime.errors import ConfigError, reason
from kasa_runtime.types import GenerationRequest
from server.status import to_status

SERVICE_NAME = "kasa"
# OpenTelemetry's conventions: with other codes it is the client whose call was wrong.
SERVER_FAULTS = [
    code.value[0]
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
]
NO_OPENTELEMETRY = (
    "otlp_endpoint needs OpenTelemetry, which is not installed: pip install 'kasa-runtime[tracing]'"
)


class Tracing:
    """Makes spans with one provider of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("kasa_runtime")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str) -> Self:
        """Send spans over OTLP's gRPC, in batches, from a thread. Sampling and further attributes
        are those of OpenTelemetry's own variables. Raises ConfigError without the packages."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"{NO_OPENTELEMETRY} ({error})") from None
        name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """Send what is left. Blocking."""
        self._provider.shutdown()

    @contextmanager
    def traced(
        self,
        request: GenerationRequest,
        model: str,
        metadata: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> Iterator[GenerationRequest]:
        """The request with its trace, whose parent is the client's `traceparent`; a span until the
        end. `model`: the base's name; `facts`: what is known by the end."""
        from opentelemetry.trace import SpanKind

        operation = "text_completion" if request.messages is None else "chat"
        span = self._tracer.start_span(
            f"{operation} {model}",
            self._propagator.extract({k: v for k, v in metadata.items() if isinstance(v, str)}),
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, **_asked(request, model)},
        )
        try:
            recorded = span.is_recording()
            yield replace(request, trace=_Trace(self._tracer, span)) if recorded else request
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.set_attributes(_ended(facts, model))
            span.end()


class _Trace:
    """See `kasa_runtime.types.Trace`."""

    def __init__(self, tracer: Any, span: Any, clock_offset_ns: int | None = None) -> None:
        from opentelemetry.trace import set_span_in_context

        if clock_offset_ns is None:
            clock_offset_ns = time.time_ns() - time.monotonic_ns()
        self._tracer = tracer
        self._context = set_span_in_context(span)
        self._clock_offset_ns = clock_offset_ns

    def span(self, name: str, start_s: float, end_s: float) -> _Trace:
        start_ns, end_ns = (round(at_s * 1e9) + self._clock_offset_ns for at_s in (start_s, end_s))
        span = self._tracer.start_span(name, self._context, start_time=start_ns)
        span.end(end_ns)
        return _Trace(self._tracer, span, self._clock_offset_ns)


def _asked(request: GenerationRequest, model: str) -> dict[str, Any]:
    sampling = request.sampling
    attributes = {
        "gen_ai.provider.name": SERVICE_NAME,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.stop_sequences": sampling.stop or None,
        "kasa.request.id": request.request_id,
        **_adapter(request.adapter),
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _ended(facts: Mapping[str, Any], model: str) -> dict[str, Any]:
    if "finish_reason" not in facts:
        return {}
    attributes = {
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [facts["finish_reason"]],
        "gen_ai.usage.input_tokens": facts.get("prompt_tokens"),
        "gen_ai.usage.cache_read.input_tokens": facts.get("cached_prompt_tokens"),
        "gen_ai.usage.output_tokens": facts.get("completion_tokens"),
        "kasa.mode": facts["mode"],
        **_adapter(facts["adapter"]),
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _adapter(ref: str) -> dict[str, str | None]:
    name, _, version = ref.partition("@")
    return {"kasa.adapter.name": name or None, "kasa.adapter.version": version or None}


def _fail(span: Any, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        span.set_attribute("error.type", "CANCELLED")
        return
    status = to_status(error)
    span.set_attribute("error.type", reason(type(error)))
    if status.code in SERVER_FAULTS:
        span.set_status(Status(StatusCode.ERROR, status.message))
