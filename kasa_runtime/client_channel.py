"""What a client's channel does by itself: call again what failed before it did anything."""

from __future__ import annotations

import json
from typing import Any

from kasa_runtime.errors import ConfigError

MAX_ATTEMPTS = 5  # the most that gRPC makes
RETRIED = {
    "GenerationService": ("Generate", "GenerateStream"),  # nothing is kept of a broken-off one
    "AdapterService": (
        "ListAdapters",
        "GetAdapter",
        "ListAdapterVersions",
        "LoadAdapter",
        "UnloadAdapter",
        "MergeAdapter",
        "UnmergeAdapter",
    ),
    "ModelService": ("GetModel", "Tokenize"),
}
"""Methods that may be called again when it is not known whether a first call did anything."""


def channel_options(max_attempts: int) -> list[tuple[str, Any]]:
    """Of a channel that calls again what may be called again: after UNAVAILABLE, before the first
    message of a response, with pauses of about 0.1, 0.3, 0.9 and 2 s. Raises ConfigError."""
    if not 1 <= max_attempts <= MAX_ATTEMPTS:
        raise ConfigError(f"max_attempts must be 1 to {MAX_ATTEMPTS}, got {max_attempts}")
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1)]
    if max_attempts == 1:
        return [*options, ("grpc.enable_retries", 0)]
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.1s",
        "backoffMultiplier": 3,
        "maxBackoff": "2s",
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [
        {"service": f"kasa.v1.{service}", "method": method}
        for service, methods in RETRIED.items()
        for method in methods
    ]
    return [
        *options,
        (
            "grpc.service_config",
            json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]}),
        ),
        # A channel connects again at its own pace, which by default is slower than these attempts.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.per_rpc_retry_buffer_size", 8 * 2**20),  # longer prompts are not sent again
    ]
