"""The edge's own settings. The flags of `kasa serve` are derived from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from kasa_runtime.errors import ConfigError
from kasa_runtime.runtime import RuntimeConfig


def setting(default: Any, help: str) -> Any:
    """A field of a configuration; `help` becomes the help of its flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TlsConfig:
    """Files are read again when they change."""

    tls_cert: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of the server's certificate and its chain; both ports then speak TLS"
        },
    )
    tls_key: Path | None = field(
        default=None, metadata={"help": "PEM file of the certificate's private key"}
    )
    tls_client_ca: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of authorities: clients must show a certificate of one of them"
        },
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key must be given together, got one of them")
        if self.tls_client_ca is not None and not self.enabled:
            raise ConfigError("tls_client_ca needs tls_cert and tls_key")

    @property
    def enabled(self) -> bool:
        return self.tls_cert is not None


@dataclass(frozen=True)
class AccessConfig:
    """Who may come in. The file is read again when it changes."""

    tokens_file: Path | None = field(
        default=None,
        metadata={"help": "file of the tokens that may come in (docs/security.md); none: all may"},
    )
    tokens: str = setting("", "the same as text, for the environment")
    insecure: bool = setting(
        False, "listen on other addresses than loopback without TLS and authentication"
    )

    def __post_init__(self) -> None:
        if self.tokens and self.tokens_file is not None:
            raise ConfigError("want one of tokens and tokens_file, got both")

    @property
    def enabled(self) -> bool:
        return bool(self.tokens) or self.tokens_file is not None


@dataclass(frozen=True)
class ClientLimits:
    """What one client may take: a token's name, or without tokens an address. 0: no limit."""

    max_message_mib: float = setting(4.0, "largest message that is received, in MiB")
    max_streams_per_client: int = setting(
        0, "calls of one client at the same time; one more is refused with RetryInfo; 0: no limit"
    )
    max_upload_mib: float = setting(4096.0, "largest upload, all files together, in MiB")
    max_uploads_per_minute: float = setting(
        0.0, "uploads that one client may begin; above it they are refused; 0: no limit"
    )

    def __post_init__(self) -> None:
        for name in ("max_message_mib", "max_upload_mib"):
            if not 0 < getattr(self, name) <= 4096:
                raise ConfigError(
                    f"{name} must be above 0 and at most 4096, got {getattr(self, name)}"
                )
        for name in ("max_streams_per_client", "max_uploads_per_minute"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class HttpLimits:
    """How long a connection over HTTP may keep us waiting."""

    http_receive_s: float = setting(
        30.0,
        "seconds in which a request over HTTP must have arrived; a large body gets longer, as long "
        "as it arrives at 1 KiB/s",
    )
    http_idle_s: float = setting(
        75.0, "seconds that a connection over HTTP stays open after an answer, for another request"
    )

    def __post_init__(self) -> None:
        for name in ("http_receive_s", "http_idle_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and how it behaves towards clients."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for all interfaces")
    grpc_port: int = setting(50051, "port of gRPC; 0: any free one, which is printed")
    http_port: int = setting(8080, "port of metrics and health over HTTP; 0: any free one")
    drain_s: float = setting(30.0, "seconds that requests in flight get to end after SIGTERM")
    max_adapter_labels: int = setting(
        100, "adapters with metrics under their own name; the others share `_other`"
    )
    stream_interval: int = setting(
        0,
        "tokens in a message of a stream, after the first; 0: one, and with more than 16 streams "
        "at once as many as keep a step from sending more than 16 messages",
    )
    vllm_metrics: bool = setting(
        False,
        "also serve /metrics/vllm: what gateways that route to vLLM read, under vLLM's names",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "how much to log, on stderr"
    )
    log_format: Literal["human", "json"] = setting("human", "lines for people, or for programs")
    log_prompts: bool = setting(False, "log the text of prompts too, which may be confidential")
    otlp_endpoint: str = setting(
        "",
        "send traces of requests to this OpenTelemetry collector (gRPC), as http://HOST:4317; "
        "needs the extra `tracing`",
    )
    tls: TlsConfig = field(default_factory=TlsConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    clients: ClientLimits = field(default_factory=ClientLimits)
    http: HttpLimits = field(default_factory=HttpLimits)

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {value}")
        for name in ("drain_s", "max_adapter_labels", "stream_interval"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name} must be at least 0, got {value}")
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ConfigError(f"grpc_port and http_port must differ, both are {self.grpc_port}")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_endpoint must begin with http:// or https://, got {self.otlp_endpoint!r}"
            )
        self._refuse_open_doors()

    def _refuse_open_doors(self) -> None:
        if _is_loopback(self.host) or self.access.insecure:
            return
        authenticated = self.access.enabled or self.tls.tls_client_ca is not None
        if not self.tls.enabled or not authenticated:
            raise ConfigError(
                f"host {self.host} is not loopback, so clients need TLS (tls_cert, tls_key) and "
                "authentication (tokens_file or tls_client_ca); where something in front sees to "
                "both, say insecure (--insecure, KASA_INSECURE=true)"
            )


@dataclass(frozen=True)
class ServeConfig:
    """All that `kasa serve` can be told: one tree, whose tables a configuration file has too."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
