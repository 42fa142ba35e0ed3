"""The edge's own settings. The flags of `kasa serve` are derived from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kasa_runtime.errors import ConfigError


def setting(default: Any, help: str) -> Any:
    """A field of a configuration; `help` becomes the help of its flag."""
    return field(default=default, metadata={"help": help})


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
    vllm_metrics: bool = setting(
        False,
        "also serve /metrics/vllm: what gateways that route to vLLM read, under vLLM's names",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "how much to log, on stderr"
    )

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {value}")
        for name in ("drain_s", "max_adapter_labels"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name} must be at least 0, got {value}")
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ConfigError(f"grpc_port and http_port must differ, both are {self.grpc_port}")
