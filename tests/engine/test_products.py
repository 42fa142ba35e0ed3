"""Our own products in the place of a graph's linear layers, against float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kasa_runtime.engine.native.executor import NO_SLOT, PackedBatch, SequenceSlice

pytest.importorskip("openvino")

import openvino as ov
import openvino.opset13 as ops

from engine.test_lowrank_operations import HIDDEN, WIDE, Array, Graph, adapter, layers, silu
from kasa_runtime.engine.native.openvino import products
from kasa_runtime.engine.native.openvino.lowrank import LowRank
from kasa_runtime.engine.native.openvino.native import compiled_library
from kasa_runtime.engine.native.openvino.packed import PackedWeights, unpacked
from kasa_runtime.engine.native.openvino.settings import core

ROWS = (1, 5, 12, 13, 40, 121, 300)
"""Of a step: below, at and above what one tile has, and what one pass over the weights serves."""


class Compiled:
    """A graph whose layers are our own products, with an adapter for all of them in slot 0."""

    def __init__(self, graph: Graph, y: Any) -> None:
        self.graph = graph
        self.shapes = {name: weight.shape for name, weight in graph.weights.items()}
        self.low_rank = LowRank(compiled_library(), self.shapes, 1)
        self.packed = PackedWeights(self.shapes)
        for name, weight in graph.weights.items():
            self.low_rank.pack(weight, self.packed[name])
        self.low_rank.use(self.packed)
        self.adapter = adapter(graph.weights)
        self.low_rank.prepare(0, self.adapter, tails=None)  # type: ignore[arg-type]
        model = ov.Model([y, ops.gather(y, graph.parameters[1], 1)], graph.parameters)
        products.replace(model, graph.linears, self.low_rank)
        self.kinds = Counter(node.get_type_name() for node in model.get_ordered_ops())
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        self._request = core().compile_model(model, "CPU", options).create_infer_request()

    def run(self, slots: list[int]) -> tuple[Array, Any, Array]:
        """y of random rows with these slots, the layers in float64, and x (rows, HIDDEN)."""
        sequences = [SequenceSlice(1, 0, range(1), slot) for slot in slots]
        self.low_rank.begin(PackedBatch.pack([0] * len(slots), sequences, [0]))
        x = np.random.default_rng(7).standard_normal((1, max(ROWS), HIDDEN)).astype(np.float32)
        x = x[:, : len(slots)].copy()
        found = self._request.infer({"x": x, "logit_rows": np.array([0])})[0][0].copy()
        has_adapter = np.array([slot == 0 for slot in slots], np.float32)
        return found, layers(self.graph, self.adapter, has_adapter), x[0]


def mixed(num_rows: int) -> list[int]:
    return [NO_SLOT if row % 3 == 0 else 0 for row in range(num_rows)]


def require_close(found: Array, want: NDArray[np.float64]) -> None:
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()


def gated(has_residual: bool) -> Compiled:
    graph = Graph()
    gate, up = graph.linear("gate", graph.x, WIDE), graph.linear("up", graph.x, WIDE)
    y = graph.linear("down", ops.multiply(ops.swish(gate), up), HIDDEN)
    return Compiled(graph, ops.add(graph.x, y) if has_residual else y)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_gated_mlp_is_one_operation(num_rows: int, has_residual: bool) -> None:
    compiled = gated(has_residual)
    found, layer, x = compiled.run(mixed(num_rows))
    want = layer("down", silu(layer("gate", x)) * layer("up", x))
    require_close(found, want + x if has_residual else want)
    assert compiled.kinds["GatedMlpAdd" if has_residual else "GatedMlp"] == 1
    assert not sum(compiled.kinds[kind] for kind in ("MatMul", "Swish", "Add", "Multiply"))


@pytest.mark.parametrize("num_rows", ROWS)
def test_layers_that_read_the_same_are_one_operation(num_rows: int) -> None:
    graph = Graph()
    bias = np.arange(WIDE, dtype=np.float32)
    left = ops.add(graph.linear("left", graph.x, WIDE), ops.constant(bias.reshape(1, 1, -1)))
    middle, right = graph.linear("middle", graph.x, 5), graph.linear("right", graph.x, WIDE)
    compiled = Compiled(graph, ops.concat([ops.multiply(left, right), middle], 2))
    found, layer, x = compiled.run(mixed(num_rows))
    product = (layer("left", x) + bias) * layer("right", x)
    require_close(found, np.concatenate([product, layer("middle", x)], 1))
    assert (compiled.kinds["Linears"], compiled.kinds["MatMul"]) == (1, 0)


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_residual_sum_is_part_of_a_square_layer(num_rows: int) -> None:
    graph = Graph()
    compiled = Compiled(graph, ops.add(graph.linear("only", ops.relu(graph.x), HIDDEN), graph.x))
    found, layer, x = compiled.run(mixed(num_rows))
    require_close(found, x + layer("only", np.maximum(x, 0)))
    assert (compiled.kinds["LinearAdd"], compiled.kinds["Add"]) == (1, 0)


def test_a_gate_that_something_else_reads_keeps_its_activation() -> None:
    graph = Graph()
    gate, up = graph.linear("gate", graph.x, WIDE), graph.linear("up", graph.x, WIDE)
    hidden = ops.multiply(ops.swish(gate), up)
    y = ops.add(graph.linear("down", hidden, HIDDEN), ops.reduce_sum(hidden, np.array([2]), True))
    compiled = Compiled(graph, y)
    found, layer, x = compiled.run(mixed(9))
    between = silu(layer("gate", x)) * layer("up", x)
    require_close(found, layer("down", between) + between.sum(1, keepdims=True))
    assert (compiled.kinds["Linears"], compiled.kinds["Swish"]) == (2, 1)


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    compiled = gated(has_residual=True)
    whole, _, _ = compiled.run(mixed(300))
    for num_rows in (*range(1, 40), 120, 121, 250):
        part, _, _ = compiled.run(mixed(num_rows))
        assert np.array_equal(part, whole[:num_rows]), num_rows


def test_weights_change_places_between_steps() -> None:
    """With an adapter in them, rows of the base have its terms subtracted; the pristine ones come
    back bit for bit."""
    compiled = gated(has_residual=True)
    before, _, _ = compiled.run(mixed(9))
    merged = PackedWeights(compiled.shapes)
    compiled.low_rank.fold(0, compiled.packed, merged)
    for name, weight in compiled.graph.weights.items():
        delta = compiled.adapter.modules[name]
        want = weight + (delta.b.double() @ delta.a.double()).numpy()
        found = unpacked(merged[name], compiled.shapes[name])
        assert np.abs(found - want).max() < 1e-6 * np.abs(want).max()
    compiled.low_rank.use(merged)
    compiled.low_rank.merge(0)
    after, _, _ = compiled.run(mixed(9))
    assert np.abs(after - before).max() < 4e-6 * np.abs(before).max()
    compiled.low_rank.use(compiled.packed)
    compiled.low_rank.merge(NO_SLOT)
    again, _, _ = compiled.run(mixed(9))
    assert np.array_equal(again, before)


@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (32, 8), (83, 37)])
def test_packing_loses_nothing(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    low_rank = LowRank(compiled_library(), {"a": shape}, 1)
    for stored in (weight, np.asfortranarray(weight)):
        packed = PackedWeights({"a": shape})["a"]
        low_rank.pack(stored, packed)
        assert np.array_equal(unpacked(packed, shape), weight)
