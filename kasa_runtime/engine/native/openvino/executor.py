"""The OpenVINO executor: the fast one on CPU, in float32, with integer weights if wanted.

The graph is converted once (`conversion.py`), closed with paged attention (`attention.py`) and gets
operations of our own for its linear layers: with float32 weights the whole product (`products.py`),
beside integer ones the low-rank branches (`lowrank.py`). Merging an adapter makes other weights
beside the pristine ones, which the operations read from the next step on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import set_torch_threads
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native import huge_pages
from kasa_runtime.engine.native.executor import (
    NO_SLOT,
    Commit,
    Executor,
    PackedBatch,
    SequenceSlice,
    TailSource,
)
from kasa_runtime.engine.native.openvino import attention, linears
from kasa_runtime.engine.native.openvino.conversion import ConvertedModel
from kasa_runtime.engine.native.openvino.graph import AdaptedGraph, Weights, plugin_errors
from kasa_runtime.engine.native.openvino.lowrank import Packed
from kasa_runtime.engine.native.openvino.packed import PackedWeights, unpacked
from kasa_runtime.engine.native.openvino.settings import plugin_options
from kasa_runtime.engine.native.probe import require_split_prompts
from kasa_runtime.errors import ModelError
from kasa_runtime.home import remembered

logger = logging.getLogger(__name__)

TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.5
"""Of the logits against transformers' own, relative to their spread: with float32 activations, and
once more with those that are rounded."""


class OpenVinoExecutor(Executor):
    """One model on the CPU. Constructed on the step thread. Raises ModelError, ConfigError."""

    name = "openvino"

    def __init__(
        self, model_dir: Path, config: EngineConfig, built: AdaptedGraph | None = None
    ) -> None:
        """`built`: of this directory and configuration, where there is one already."""
        set_torch_threads(1)  # for sampling alone: a second pool would spin beside OpenVINO's
        self._graph = built or AdaptedGraph(model_dir, config)
        model = self._graph.model
        self._low_rank, self._adaptable = self._graph.low_rank, self._graph.adaptable
        self._pristine = self._weights = self._graph.take_pristine()
        self._merged_slot = NO_SLOT
        self._merged_weights: Packed = {}
        self._spare: Packed = {}  # memory of weights that were merged, for the next ones
        self._adapters: dict[int, AdapterWeights] = {}  # by slot
        with plugin_errors(model.info.architecture):
            self._describe(model, config)
            caches = attention.allocate(self._pristine.compiled, self.num_blocks)
            self._caches, memory = caches
            self._give_caches(self._pristine.request)
            self._require_parity(model, TOLERANCE)
            self._require_split_prompts(model)
            self._set_options(plugin_options(config))
        huge_pages.settle_in_background(memory, self._graph.packed.settle)

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

    @property
    def layers(self) -> Set[str]:
        return self._graph.shapes.keys()

    def prepare_slots(
        self, contents: Mapping[int, AdapterWeights | None], tails: TailSource
    ) -> Commit:
        adapters = {slot: adapter for slot, adapter in contents.items() if adapter is not None}
        switch = self._open({name for a in adapters.values() for name in a.modules})
        unused = [self._low_rank.forget(slot) for slot in contents]
        for slot, adapter in adapters.items():
            self._low_rank.prepare(slot, adapter, tails)
        self._adapters |= adapters
        for slot in contents.keys() - adapters.keys():
            self._adapters.pop(slot, None)

        def commit() -> None:
            switch()
            self._low_rank.merge(self._merged_slot)
            _release(unused)

        return commit

    def prepare_merge(self, slot: int, tails: TailSource) -> Commit:
        merged = self._merged(slot)
        dense = self._graph.dense | merged.keys()
        weights = self._pristine
        if dense != self._graph.dense:
            weights = self._compile(dense, self._adaptable)
            huge_pages.collapse()
        return self._switch(weights, merged, slot)

    def prepare_unmerge(self) -> Commit:
        return self._switch(self._pristine, {}, NO_SLOT)

    def close(self) -> None:
        del self._weights, self._pristine, self._graph, self._caches

    def weights(self) -> dict[str, Tensor]:
        """Dense copies of the weights that are served now, by layer. For tests and checks."""
        served = {**self._graph.packed, **self._merged_weights}
        nodes = linears.linear_nodes(self._graph.model.graph, self._graph.shapes)
        return {
            name: torch.from_numpy(unpacked(served[name], self._graph.shapes[name]))
            if name in served
            else linears.weight(node)
            for name, node in nodes.items()
        }

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Those to serve with, after the checks that need float32 activations."""
        if options == self._graph.options:
            return
        self._graph.options = options
        self._pristine = self._weights = self._compile(self._graph.dense, self._adaptable)
        self._require_parity(self._graph.model, ROUNDED_TOLERANCE)

    def _compile(self, dense: Set[str], adaptable: Set[str]) -> Weights:
        weights = self._graph.compile(dense, adaptable)
        self._give_caches(weights.request)
        return weights

    def _merged(self, slot: int) -> Packed:
        """The weights of an adapter's layers with the adapter in them, computed from the pristine
        ones."""
        start_s = time.monotonic()
        names = self._adapters[slot].modules.keys()
        merged = self._spare
        if merged.keys() != names:
            merged = PackedWeights({name: self._graph.shapes[name] for name in names})
        coded = linears.linear_nodes(self._graph.model.graph, names - self._graph.dense)
        for name, node in coded.items():
            self._low_rank.pack(linears.array(node), merged[name])
        self._low_rank.fold(slot, {**merged, **self._graph.packed}, merged)
        logger.info("merged weights in %.2f s", time.monotonic() - start_s)
        return merged

    def _open(self, names: Set[str]) -> Commit:
        """Make layers adaptable that were not before: the graphs have to be compiled again."""
        if names <= self._adaptable:
            return lambda: None
        adaptable = self._adaptable | names
        slot, merged = self._merged_slot, self._merged_weights
        weights = pristine = self._compile(self._graph.dense, adaptable)
        if self._weights is not self._pristine:
            weights = self._compile(self._graph.dense | merged.keys(), adaptable)
        switch = self._switch(weights, merged, slot)

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
        token_ids, want = map(torch.tensor, model.probe)
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

    def _require_split_prompts(self, model: ConvertedModel) -> None:
        """A property of the converted model, so once is enough. Raises ModelError."""

        def check() -> dict[str, bool]:
            require_split_prompts(self, model.info.architecture, 0.01)
            return {"agree": True}

        remembered("split-prompts", {"model": model.directory.name}, check)

    def _switch(self, weights: Weights, merged: Packed, slot: int) -> Commit:
        def commit() -> None:
            self._low_rank.use({**self._graph.packed, **merged})
            before = [self._weights, self._spare]
            self._spare = {} if merged else self._merged_weights or self._spare
            self._weights, self._merged_weights = weights, merged
            self._merged_slot = slot
            self._low_rank.merge(slot)
            _release(before)

        return commit

    def _give_caches(self, request: Any) -> None:
        for name, tensor in self._caches.items():
            request.set_tensor(name, tensor)


def _release(unused: list[Any]) -> None:
    """Forget what may be the last references to megabytes or gigabytes: freeing them takes up to a
    step."""
    threading.Thread(target=unused.clear, name="kasa-release", daemon=True).start()
