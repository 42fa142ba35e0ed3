"""The OpenVINO executor: the fast one on CPU, in float32, with integer weights if wanted.

The graph is converted once (`conversion.py`), closed with paged attention (`attention.py`) and gets
an operation for the low-rank branches beside its linear layers (`lowrank.py`). Merging an adapter
compiles the graph again with other weights, beside the pristine one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from kasa_runtime.adapter.kasa import merged_weight
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import set_torch_threads
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.executor import (
    NO_SLOT,
    Commit,
    Executor,
    PackedBatch,
    SequenceSlice,
    TailSource,
)
from kasa_runtime.engine.native.openvino import attention, linears
from kasa_runtime.engine.native.openvino.conversion import ConvertedModel, converted
from kasa_runtime.engine.native.openvino.lowrank import LowRank
from kasa_runtime.engine.native.openvino.native import compiled_library
from kasa_runtime.engine.native.openvino.settings import (
    FLOAT_ACTIVATIONS,
    plugin_options,
    require_float32_on_cpu,
)
from kasa_runtime.engine.native.probe import require_split_prompts
from kasa_runtime.errors import CapacityExceeded, KasaError, ModelError

logger = logging.getLogger(__name__)

TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.5
"""Of the logits against transformers' own, relative to their spread: with float32 activations, and
once more with those that are rounded."""


@dataclass(frozen=True)
class Weights:
    """One compiled graph: the pristine weights, or those with an adapter merged."""

    graph: Any
    compiled: Any
    request: Any


class OpenVinoExecutor(Executor):
    """One model on the CPU. Constructed on the step thread. Raises ModelError, ConfigError."""

    name = "openvino"

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        require_float32_on_cpu(config)
        set_torch_threads(1)  # for sampling alone: a second pool would spin beside OpenVINO's
        self._core = ov.Core()
        self._options: Mapping[str, Any] = {**plugin_options(config), **FLOAT_ACTIVATIONS}
        self._adapters: dict[int, AdapterWeights] = {}  # by slot
        self._caches: dict[str, Any] = {}
        library = compiled_library()
        model = converted(model_dir, self._core, config.quantization)
        try:
            self._build(model, LowRank(library, model.modules, config.max_slots))
            self._describe(model, config)
            self._caches = attention.allocate(self._pristine.compiled, self.num_blocks)
            self._give_caches(self._pristine.request)
            self._require_parity(model, TOLERANCE)
            require_split_prompts(self, model.info.architecture, 0.01)
            self._set_options(model, plugin_options(config))
        except KasaError:
            raise
        except Exception as error:  # the plugin, which raises RuntimeError for everything
            raise ModelError(
                f"{model.info.architecture} does not run on OpenVINO {ov.__version__}: {error}; "
                "use --executor torch"
            ) from error

    def run(self, batch: PackedBatch) -> Tensor:
        self._low_rank.begin(batch)
        values = {
            "input_ids": batch.token_ids.numpy(),
            "position_ids": batch.positions.numpy(),
            "logit_rows": batch.logit_rows.numpy(),
            **attention.step_inputs(batch.sequences, self.block_size),
        }
        request = self._weights.request
        for name, value in values.items():
            request.set_tensor(name, ov.Tensor(value, shared_memory=True))
        request.infer(share_outputs=True)
        return torch.from_numpy(request.get_tensor("logits").data)

    def prepare_load(self, slot: int, adapter: AdapterWeights, tails: TailSource) -> Commit:
        missing = [name for name in adapter.modules if name not in self._shapes]
        if missing:
            raise CapacityExceeded(f"{adapter.key}: this engine cannot adapt {missing[0]}")
        switch = self._open(adapter.modules.keys(), tails)
        self._low_rank.prepare(slot, adapter, tails)
        self._adapters[slot] = adapter

        def commit() -> None:
            switch()
            self._low_rank.merge(self._merged_slot)

        return commit

    def prepare_unload(self, slot: int) -> Commit:
        del self._adapters[slot]

        def commit() -> None:
            self._low_rank.forget(slot)
            self._low_rank.merge(self._merged_slot)

        return commit

    def prepare_merge(self, slot: int, tails: TailSource) -> Commit:
        return self._switch(self._merged(slot, tails, self._adaptable), slot)

    def prepare_unmerge(self) -> Commit:
        return self._switch(self._pristine, NO_SLOT)

    def close(self) -> None:
        del self._weights, self._pristine, self._graph, self._caches, self._core

    def weights(self) -> dict[str, Tensor]:
        """Dense copies of the weights that are served now, by layer. For tests and checks."""
        nodes = linears.linear_nodes(self._weights.graph, self._shapes)
        return {name: linears.weight(node) for name, node in nodes.items()}

    def _build(self, model: ConvertedModel, low_rank: LowRank) -> None:
        attention.close(model.graph, model.layers)
        self._graph, self._low_rank = model.graph, low_rank
        nodes = linears.linear_nodes(model.graph, model.modules)
        self._shapes = {name: model.modules[name] for name in nodes}
        # Logits are large, and few adapters change the layer that makes them.
        self._adaptable = nodes.keys() - linears.below_logit_rows(model.graph, nodes)
        self._pristine = self._weights = self._compile({}, self._adaptable)
        self._merged_slot = NO_SLOT

    def _set_options(self, model: ConvertedModel, options: Mapping[str, Any]) -> None:
        """Those to serve with, after the checks that need float32 activations."""
        if options == self._options:
            return
        self._options = options
        self._pristine = self._weights = self._compile({}, self._adaptable)
        self._require_parity(model, ROUNDED_TOLERANCE)

    def _compile(self, merged: Mapping[str, Tensor], adaptable: Set[str]) -> Weights:
        """The model with these weights in the place of its own, by layer."""
        graph = self._graph.clone()
        nodes = linears.linear_nodes(graph, self._shapes)
        for name, weight in merged.items():
            linears.set_weight(nodes[name], weight)
        self._low_rank.add(graph, {n: node for n, node in nodes.items() if n in adaptable})
        compiled = self._core.compile_model(graph, "CPU", self._options)
        weights = Weights(graph, compiled, compiled.create_infer_request())
        self._give_caches(weights.request)
        return weights

    def _merged(self, slot: int, tails: TailSource, adaptable: Set[str]) -> Weights:
        start_s = time.monotonic()
        modules = self._adapters[slot].modules
        merged = {}
        for name, node in linears.linear_nodes(self._graph, modules).items():
            delta = modules[name]
            tail = tails.get(name, delta.t)
            merged[name] = merged_weight(linears.weight(node), delta.a, delta.b, tail)
        weights = self._compile(merged, adaptable)
        logger.info("compiled merged weights in %.1f s", time.monotonic() - start_s)
        return weights

    def _open(self, names: Set[str], tails: TailSource) -> Commit:
        """Make layers adaptable that were not before: the graphs have to be compiled again."""
        if names <= self._adaptable:
            return lambda: None
        adaptable = self._adaptable | names
        slot, pristine = self._merged_slot, self._compile({}, adaptable)
        weights = pristine if slot == NO_SLOT else self._merged(slot, tails, adaptable)
        switch = self._switch(weights, slot)

        def commit() -> None:
            self._adaptable, self._pristine = adaptable, pristine
            switch()

        return commit

    def _describe(self, model: ConvertedModel, config: EngineConfig) -> None:
        self.dtype = "float32" if config.quantization == "none" else config.quantization
        self.vocab_size = model.info.vocab_size
        self.context_length = model.info.context_length(config)
        self.num_layers = model.info.num_layers
        self.num_parameters = model.info.num_parameters
        self.eos_ids = model.info.eos_ids
        shapes = list(attention.block_shapes(self._pristine.compiled).values())
        [self.block_size] = {tokens for _, tokens, _ in shapes}
        token_bytes = 4 * sum(heads * dim for heads, _, dim in shapes)
        self.num_blocks = config.num_cache_blocks(self.block_size, token_bytes, self.context_length)

    def _require_parity(self, model: ConvertedModel, tolerance: float) -> None:
        """Raises ModelError where the graph's logits are not those of transformers: a trace keeps
        the path that its example took."""
        token_ids, want = model.probe
        token_ids = token_ids[: self.num_blocks * self.block_size]
        if len(token_ids) < len(model.probe[0]):
            return  # a cache for tests
        rows = range(len(token_ids) - len(want), len(token_ids))
        blocks = range(-(-len(token_ids) // self.block_size))
        seq = SequenceSlice(len(token_ids), 0, blocks, NO_SLOT)
        found = self.run(PackedBatch.pack(token_ids.tolist(), [seq], list(rows)))
        if not torch.dist(found, want) <= tolerance * torch.dist(want, want.mean()):
            raise ModelError(
                f"{model.info.architecture} has other logits in OpenVINO than in transformers "
                f"(by {float((found - want).abs().max()):.1e}); use --executor torch"
            )

    def _switch(self, weights: Weights, merged_slot: int) -> Commit:
        def commit() -> None:
            before, self._weights = self._weights, weights
            self._merged_slot = merged_slot
            self._low_rank.merge(merged_slot)
            _release([before])

        return commit

    def _give_caches(self, request: Any) -> None:
        for name, tensor in self._caches.items():
            request.set_tensor(name, tensor)


def _release(unused: list[Any]) -> None:
    """Forget what may be the last references to gigabytes, which takes as long as a step."""
    threading.Thread(target=unused.clear, name="kasa-release", daemon=True).start()
