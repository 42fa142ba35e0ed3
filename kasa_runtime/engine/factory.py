"""Makes the engine that the configuration names; what it needs is imported here and only then."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kasa_runtime.engine.base import Engine
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import ConfigError, KasaError, ModelError

if TYPE_CHECKING:
    import tokenizers

    from kasa_runtime.adapter.tails import TailCache
    from kasa_runtime.engine.native.executor import Executor
    from kasa_runtime.engine.native.openvino.graph import AdaptedGraph


logger = logging.getLogger(__name__)


class Begun:
    """A graph that is built and being compiled, or what became of the attempt."""

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        from kasa_runtime.engine.native.openvino.graph import AdaptedGraph

        self._graph: AdaptedGraph | None = None
        self._error: KasaError | None = None
        try:
            self._graph = AdaptedGraph(model_dir, config)
            self._graph.begin()
        except KasaError as error:
            self._error = error

    def take(self) -> AdaptedGraph:
        """Once: it is large, and the taker's. Raises ModelError, ConfigError."""
        if self._error is not None:
            raise self._error
        graph, self._graph = self._graph, None
        assert graph is not None, "taken twice"
        return graph


def begin(model_dir: Path, config: EngineConfig) -> Begun | None:
    """Build what OpenVINO needs no torch for and compile it, on a thread of its own, if the
    configuration will probably want it and the model is converted already. Call it before anything
    else is imported: the imports that follow take about as long as the compiling."""
    if config.executor == "torch" or config.dtype not in ("auto", "float32"):
        return None
    if config.device not in ("auto", "cpu") or (config.device == "auto" and _may_have_gpu()):
        return None
    if not _is_installed():
        return None
    from kasa_runtime.engine.native.openvino.conversion import is_converted

    return Begun(model_dir, config) if is_converted(model_dir, config.quantization) else None


def make_engine(
    kind: Literal["native", "vllm"],
    model_dir: Path,
    tails: TailCache,
    config: EngineConfig,
    begun: Begun | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Engine:
    """An engine that is not started. `begun` and `tokenizer` are the native one's."""
    if kind == "vllm":
        from kasa_runtime.engine.vllm_engine import VllmEngine

        return VllmEngine(model_dir, config, tails)
    from kasa_runtime.engine.native.engine import NativeEngine

    return NativeEngine(config, lambda: make_executor(model_dir, config, begun), tails, tokenizer)


def make_executor(model_dir: Path, config: EngineConfig, begun: Begun | None = None) -> Executor:
    """The executor that the configuration names; "auto" is OpenVINO where it serves this model as
    well, else torch; with a quantization it is OpenVINO alone. Step thread. Raises ModelError,
    ConfigError."""
    if config.executor == "torch":
        return _torch(model_dir, config)
    if config.executor == "openvino" or config.quantization != "none":
        if not _is_installed():
            raise ConfigError("executor openvino: the package is missing; pip install openvino")
        return _openvino(model_dir, config, begun)
    why = _against_openvino(config)
    if why is None:
        try:
            executor = _openvino(model_dir, config, begun)
        except ModelError as error:
            why = str(error)
        else:
            logger.info("executor openvino: float32 on the CPU")
            return executor
    logger.info("executor torch: %s", why)
    return _torch(model_dir, config)


def _against_openvino(config: EngineConfig) -> str | None:
    """Why these settings are for torch."""
    import torch

    on_cuda = torch.cuda.is_available() if config.device == "auto" else config.device != "cpu"
    if on_cuda:
        return f"device {config.device} is not the CPU"
    if config.dtype not in ("auto", "float32"):
        return f"dtype {config.dtype} is not float32"
    return None if _is_installed() else "openvino is not installed"


def _may_have_gpu() -> bool:
    """Without torch, which knows."""
    return any(Path("/dev").glob("nvidia*")) or Path("/dev/kfd").exists()


def _is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _torch(model_dir: Path, config: EngineConfig) -> Executor:
    from kasa_runtime.engine.native.torch_executor import TorchExecutor

    return TorchExecutor(model_dir, config)


def _openvino(model_dir: Path, config: EngineConfig, begun: Begun | None) -> Executor:
    from kasa_runtime.engine.native.openvino.executor import OpenVinoExecutor

    return OpenVinoExecutor(model_dir, config, begun.take() if begun else None)
