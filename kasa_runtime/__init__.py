"""KaSA Runtime: train, serve and operate KaSA adapters.

`import kasa_runtime` is light: torch and transformers are imported on first use of what needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kasa_runtime.errors import KasaError
from kasa_runtime.types import ChatMessage, GenerationRequest, SamplingParams, TokenChunk

if TYPE_CHECKING:
    from kasa_runtime.client import Client
    from kasa_runtime.runtime import Runtime
    from kasa_runtime.runtime_config import RuntimeConfig

__version__ = "0.1.0"

__all__ = [
    "ChatMessage",
    "Client",
    "GenerationRequest",
    "KasaError",
    "Runtime",
    "RuntimeConfig",
    "SamplingParams",
    "TokenChunk",
    "__version__",
]

_LAZY = {
    "Client": "kasa_runtime.client",
    "Runtime": "kasa_runtime.runtime",
    "RuntimeConfig": "kasa_runtime.runtime_config",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
