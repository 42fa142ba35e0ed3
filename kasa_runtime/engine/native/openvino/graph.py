"""A model's graph with all that the engine puts into it, compiled.

Imports no torch: compiling takes as long as importing torch does, and at start-up both go on at the
same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.openvino import attention, linears, products
from kasa_runtime.engine.native.openvino.conversion import converted
from kasa_runtime.engine.native.openvino.lowrank import LowRank
from kasa_runtime.engine.native.openvino.native import compiled_library
from kasa_runtime.engine.native.openvino.packed import PackedWeights
from kasa_runtime.engine.native.openvino.settings import (
    FLOAT_ACTIVATIONS,
    core,
    plugin_options,
    require_float32_on_cpu,
)
from kasa_runtime.errors import KasaError, ModelError


@dataclass(frozen=True)
class Weights:
    """One compiled graph: the pristine weights, or those with an adapter merged."""

    graph: Any
    compiled: Any
    request: Any


class AdaptedGraph:
    """The model in the directory with paged attention and low-rank operations beside `adaptable`
    layers; `compile` goes by the `options` that are set, which begin with float32 activations.
    Raises ModelError, ConfigError."""

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        require_float32_on_cpu(config)
        self._core = core()
        self.options: Mapping[str, Any] = {**plugin_options(config), **FLOAT_ACTIVATIONS}
        library = compiled_library()
        self.model = converted(model_dir, self._core, config.quantization)
        with plugin_errors(self.model.info.architecture):
            self.low_rank = LowRank(library, self.model.modules, config.max_slots)
            attention.close(self.model.graph, self.model.layers)
            nodes = linears.linear_nodes(self.model.graph, self.model.modules)
            self.shapes = {name: self.model.modules[name] for name in nodes}
            self.dense = {name for name, node in nodes.items() if linears.is_dense(node)}
            # Logits are large, and few adapters change the layer that makes them.
            below = linears.below_logit_rows(self.model.graph, nodes)
            self.adaptable: Set[str] = (nodes.keys() - below) | self.dense
            self.packed = PackedWeights({name: self.shapes[name] for name in sorted(self.dense)})
        self._pristine: Future[Weights] | None = None

    def begin(self) -> None:
        """Pack and compile the pristine weights on a thread of its own, which leaves the
        interpreter to others."""
        pool = ThreadPoolExecutor(1, "kasa-compile")
        self._pristine = pool.submit(self._compile_pristine)
        pool.shutdown(wait=False)

    def take_pristine(self) -> Weights:
        """Those that `begin` began, if it did, else compiled now. They are gigabytes, and the
        caller's alone. Raises ModelError."""
        with plugin_errors(self.model.info.architecture):
            begun, self._pristine = self._pristine, None
            return begun.result() if begun else self._compile_pristine()

    def _compile_pristine(self) -> Weights:
        self.packed.show_or_fill(self.model.directory, self._pack)
        self.low_rank.use(self.packed)
        return self.compile(self.dense, self.adaptable)

    def _pack(self) -> None:
        nodes = linears.linear_nodes(self.model.graph, self.dense)
        for name, node in nodes.items():
            self.low_rank.pack(linears.array(node), self.packed[name])

    def compile(self, dense: Set[str], adaptable: Set[str]) -> Weights:
        """The graph with the layers `dense` multiplied by packed weights, the others by the
        plugin."""
        graph = self.model.graph.clone()
        nodes = linears.linear_nodes(graph, self.shapes)
        products.replace(graph, {n: node for n, node in nodes.items() if n in dense}, self.low_rank)
        others = {n: node for n, node in nodes.items() if n in adaptable - dense}
        self.low_rank.add(graph, others)
        compiled = self._core.compile_model(graph, "CPU", self.options)
        return Weights(graph, compiled, compiled.create_infer_request())


@contextmanager
def plugin_errors(architecture: str) -> Iterator[None]:
    """Turn what the plugin raises, which is RuntimeError for everything, into a ModelError."""
    try:
        yield
    except KasaError:
        raise
    except Exception as error:
        raise ModelError(
            f"{architecture} does not run on OpenVINO {ov.__version__}: {error}; "
            "use --executor torch"
        ) from error
