"""The server: gRPC services, health, reflection and HTTP on one event loop, from start to drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kasa.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

from kasa_runtime.errors import ConfigError
from kasa_runtime.runtime import Beginning, Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import AdapterInfo
from server.access import Gate
from server.adapter_service import AdapterService
from server.adapters import Adapters
from server.chunks import Pace
from server.config import ServerConfig
from server.convert import MAX_CHUNK_BYTES
from server.generating import Generating
from server.generation_service import GenerationService
from server.grpc_metrics import GrpcMetrics
from server.health import Health
from server.http import front_page
from server.http.adapters_api import AdaptersApi
from server.http.app import build_app
from server.http.listener import Listener
from server.http.metrics import HttpMetrics
from server.http.openai.routes import openai_routes
from server.http.pages import Pages
from server.metrics import Metrics
from server.model_service import ModelService
from server.tls import Certificates
from server.tracing import Tracing

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25
CLOSE_GRACE_S = 1.0
SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (model_pb2, "ModelService"),
    )
]
# A message holds one chunk of an upload, or one prompt, and what stands around it.
ENVELOPE_BYTES = 64 * 2**10
GRPC_OPTIONS = [
    ("grpc.max_send_message_length", 4 * MAX_CHUNK_BYTES),
    # Without it, a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients that ping during a long silent call are not to be thrown out with too_many_pings.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that vanished without a word is found, and its requests cancelled, within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Edge(Metrics):
    """The runtime's observer, metrics and the health of adapters; and what else can be made, and
    can be found wrong, before a model is loaded. Raises ConfigError."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config.max_adapter_labels)
        self.gate = Gate(config)
        self.pace = Pace(config.stream_interval)
        self.health = Health(self.gate)
        self.certificates = Certificates(config.tls) if config.tls.enabled else None
        endpoint = config.otlp_endpoint
        self.tracing = Tracing.to_collector(endpoint) if endpoint else None

    def adapters_changed(self, adapters: Sequence[AdapterInfo]) -> None:
        super().adapters_changed(adapters)
        self.health.set_adapters(adapters)


class Server:
    """Serves one runtime, whose observer is `edge`. `async with` starts, drains and stops it.

    `grpc_port` and `http_port` are the ports that it listens on, also where the configuration
    says 0.
    """

    def __init__(self, runtime: Runtime, edge: Edge, config: ServerConfig) -> None:
        self._runtime = runtime
        self._edge = edge
        self._config = config
        max_bytes = int(config.clients.max_message_mib * 2**20) + ENVELOPE_BYTES
        options = [*GRPC_OPTIONS, ("grpc.max_receive_message_length", max_bytes)]
        interceptors = [GrpcMetrics(edge.registry)]
        self._grpc = grpc.aio.server(interceptors=interceptors, options=options)
        self._generating = Generating(
            runtime, edge, edge.pace, log_prompts=config.log_prompts, tracing=edge.tracing
        )
        self._pages = Pages(runtime, edge, edge.gate, vllm_metrics=config.vllm_metrics)
        self._adapters = Adapters(runtime, edge, edge.gate)
        body_bytes = int(config.clients.max_message_mib * 2**20)
        routes = [
            *self._pages.routes(),
            *openai_routes(runtime, self._generating, self._adapters, edge.gate, body_bytes),
            *AdaptersApi(runtime, self._adapters, edge.gate, edge).routes(),
            *front_page.routes(),
        ]
        app = build_app(
            routes, HttpMetrics(edge.registry), own_names_only=config.is_open_on_loopback
        )
        self._http = Listener(app, config.http)
        self._stop = asyncio.Event()
        self._drain = True
        self.grpc_port = 0
        self.http_port = 0

    async def __aenter__(self) -> Server:
        runtime, edge, server = self._runtime, self._edge, self._grpc
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self._generating, edge.gate), server
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(runtime, self._adapters, edge.gate), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(runtime, edge.gate), server)
        health_pb2_grpc.add_HealthServicer_to_server(edge.health, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (*SERVICES, health_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        await self._listen()
        edge.adapters_changed(runtime.list_adapters())
        edge.health.set_services(SERVICES)
        logger.info("listening %s", self.addresses)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Tell clients to go elsewhere, let their requests end, close."""
        self._edge.health.shut_down()
        await self._runtime.drain(self._config.drain_s if self._drain else 0.0)
        await asyncio.gather(self._grpc.stop(CLOSE_GRACE_S), self._http.close(CLOSE_GRACE_S))
        self._pages.close()
        if self._edge.tracing is not None:
            await asyncio.to_thread(self._edge.tracing.close)
        logger.info("stopped")

    @property
    def addresses(self) -> str:
        """Where it listens, as one line."""
        host = self._host
        return f"grpc={host}:{self.grpc_port} http={host}:{self.http_port}"

    @property
    def _host(self) -> str:
        host = self._config.host
        return f"[{host}]" if ":" in host else host

    async def _listen(self) -> None:
        config = self._config
        address = f"{self._host}:{config.grpc_port}"
        try:
            if self._edge.certificates is None:
                self.grpc_port = self._grpc.add_insecure_port(address)
            else:
                credentials = self._edge.certificates.grpc_credentials()
                self.grpc_port = self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"grpc_port: cannot listen on {address}: {error}") from None
        tls = None if self._edge.certificates is None else self._edge.certificates.http_context()
        try:
            await self._http.start(config.host, config.http_port, tls)
        except OSError as error:
            address = f"{self._host}:{config.http_port}"
            raise ConfigError(f"http_port: cannot listen on {address}: {error}") from None
        self.http_port = self._http.port
        await self._grpc.start()

    def stop(self) -> None:
        """Let `run` return. Event loop only."""
        self._stop.set()

    async def run(self) -> int:
        """Serve until SIGTERM, SIGINT, `stop` or the engine's death. The process's exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            while not self._stop.is_set():
                if not self._runtime.alive:
                    logger.critical("the engine has stopped; exiting, so that it can be restarted")
                    self._drain = False
                    return 1
                await self._wait(WATCH_INTERVAL_S)
            return 0
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _wait(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), timeout_s)
        except TimeoutError:
            return

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        logger.info("%s: draining, at most %.0f s", name, self._config.drain_s)
        self.stop()


async def serve(
    runtime_config: RuntimeConfig,
    server_config: ServerConfig,
    begun: Beginning | None = None,
) -> int:
    """Load the model, serve it, and return the process's exit status. `begun`: of the runtime."""
    edge = Edge(server_config)
    runtime = await Runtime.create(runtime_config, edge, begun)
    try:
        async with Server(runtime, edge, server_config) as server:
            print(f"listening {server.addresses}", flush=True)
            return await server.run()
    finally:
        await runtime.close()
