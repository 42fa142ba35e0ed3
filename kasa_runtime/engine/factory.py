"""Makes the engine that the configuration names; what it needs is imported here and only then."""

from __future__ import annotations

from pathlib import Path

from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.engine.base import Engine
from kasa_runtime.engine.config import EngineConfig


def make_engine(model_dir: Path, tails: TailCache, config: EngineConfig) -> Engine:
    """The native engine with its torch executor; not started."""
    from kasa_runtime.engine.native.engine import NativeEngine
    from kasa_runtime.engine.native.torch_executor import TorchExecutor

    return NativeEngine(config, lambda: TorchExecutor(model_dir, config), tails)
