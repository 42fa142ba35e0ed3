"""The operations beside linear layers of a small graph, against float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kasa_runtime.adapter.lora import AdapterWeights, ModuleDelta
from kasa_runtime.engine.native.executor import PackedBatch, SequenceSlice

pytest.importorskip("openvino")

import openvino as ov
import openvino.opset13 as ops

from kasa_runtime.engine.native.openvino.lowrank import LowRank
from kasa_runtime.engine.native.openvino.native import compiled_library
from kasa_runtime.engine.native.openvino.settings import core

HIDDEN, WIDE = 37, 83
Array = NDArray[np.float32]


class Graph:
    """y of x (1, rows, HIDDEN), built of named linear layers; `weights` by name."""

    def __init__(self) -> None:
        self.x = ops.parameter([1, -1, HIDDEN], np.float32, name="x")
        rows = ops.parameter([-1], np.int64, name="logit_rows")
        rows.output(0).set_names({"logit_rows"})
        self.parameters = [self.x, rows]
        self.weights: dict[str, Array] = {}
        self.linears: dict[str, Any] = {}

    def linear(self, name: str, x: Any, out: int, scale: float = 1.0) -> Any:
        width = x.output(0).get_partial_shape()[2].get_length()
        random = np.random.default_rng(len(self.weights))
        weight = (scale * random.standard_normal((out, width)) / width**0.5).astype(np.float32)
        self.weights[name] = weight
        self.linears[name] = ops.matmul(x, ops.constant(weight), False, True)
        return self.linears[name]

    def compile(self, y: Any, low_rank: LowRank) -> Any:
        graph = ov.Model([y, ops.gather(y, self.parameters[1], 1)], self.parameters)
        low_rank.add(graph, self.linears)
        kinds = Counter(node.get_type_name() for node in graph.get_ordered_ops())
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        return core().compile_model(graph, "CPU", options).create_infer_request(), kinds


def adapter(weights: dict[str, Array], r: int = 3) -> AdapterWeights:
    random = torch.Generator().manual_seed(0)
    modules = {
        name: ModuleDelta(
            torch.randn(r, weight.shape[1], generator=random) / weight.shape[1] ** 0.5,
            torch.randn(weight.shape[0], r, generator=random),
            0,
        )
        for name, weight in weights.items()
    }
    return AdapterWeights("a@1", modules)


def layers(graph: Graph, loaded: AdapterWeights, has_adapter: Array) -> Any:
    """The linear layers in float64, with the adapter in the rows that have it."""

    def layer(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        delta = loaded.modules[name]
        change = x @ delta.a.double().numpy().T @ delta.b.double().numpy().T
        return x @ graph.weights[name].T.astype(float) + has_adapter[:, None] * change

    return layer


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * np.exp(-np.logaddexp(0, -x))


def result(graph: Graph, y: Any, num_rows: int) -> tuple[Any, Any, Array, Counter[str]]:
    """What the graph gives where every third row has no adapter, and the layers in float64."""
    shapes = {name: weight.shape for name, weight in graph.weights.items()}
    low_rank = LowRank(compiled_library(), shapes, 1)
    request, kinds = graph.compile(y, low_rank)
    loaded = adapter(graph.weights)
    low_rank.prepare(0, loaded, tails=None)  # type: ignore[arg-type]
    slots = [-1 if row % 3 == 0 else 0 for row in range(num_rows)]
    sequences = [SequenceSlice(1, 0, range(1), slot) for slot in slots]
    low_rank.begin(PackedBatch.pack([0] * num_rows, sequences, [0]))
    x = np.random.default_rng(7).standard_normal((1, num_rows, HIDDEN)).astype(np.float32)
    found = request.infer({"x": x, "logit_rows": np.array([0])})
    has_adapter = np.array([slot == 0 for slot in slots], np.float32)
    return found[0][0].copy(), layers(graph, loaded, has_adapter), x[0], kinds


@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_a_gated_layer(num_rows: int, scale: float) -> None:
    """Also where the activation is far from 0, on both sides."""
    graph = Graph()
    gate = graph.linear("gate", graph.x, WIDE, scale)
    up = graph.linear("up", graph.x, WIDE)
    hidden = ops.multiply(ops.swish(gate), up)
    y = ops.add(graph.x, graph.linear("down", hidden, HIDDEN))
    found, layer, x, kinds = result(graph, y, num_rows)
    want = x + layer("down", silu(layer("gate", x)) * layer("up", x))
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    counted = {kind: kinds[kind] for kind in ("Shrink", "Expand", "ExpandAdd", "ExpandGated")}
    assert counted == {"Shrink": 1, "Expand": 0, "ExpandAdd": 1, "ExpandGated": 1}
    assert not kinds["Swish"] + kinds["Add"] + kinds["Multiply"]


def test_a_gated_layer_that_something_else_reads() -> None:
    graph = Graph()
    gate, up = graph.linear("gate", graph.x, WIDE), graph.linear("up", graph.x, WIDE)
    hidden = ops.multiply(up, ops.swish(gate))
    down = graph.linear("down", hidden, HIDDEN)
    y = ops.add(down, ops.reduce_sum(hidden, np.array([2]), keep_dims=True))
    found, layer, x, kinds = result(graph, y, 9)
    between = silu(layer("gate", x)) * layer("up", x)
    want = layer("down", between) + between.sum(1, keepdims=True)
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    assert (kinds["Shrink"], kinds["Expand"], kinds["ExpandGated"]) == (2, 1, 1)


def test_what_is_read_twice_keeps_its_own_activation() -> None:
    graph = Graph()
    gate, up = graph.linear("gate", graph.x, WIDE), graph.linear("up", graph.x, WIDE)
    y = ops.add(ops.multiply(ops.swish(gate), up), up)
    found, layer, x, kinds = result(graph, y, 9)
    want = silu(layer("gate", x)) * layer("up", x) + layer("up", x)
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    assert (kinds["Expand"], kinds["ExpandGated"]) == (2, 0)


def test_biases_and_layers_that_follow_each_other() -> None:
    graph = Graph()
    bias = np.arange(WIDE, dtype=np.float32)
    first = ops.add(graph.linear("first", graph.x, WIDE), ops.constant(bias.reshape(1, 1, -1)))
    second = graph.linear("second", first, HIDDEN)
    y = ops.add(ops.add(second, graph.x), graph.linear("third", second, HIDDEN))
    found, layer, x, kinds = result(graph, y, 9)
    middle = layer("second", layer("first", x) + bias)
    want = middle + x + layer("third", middle)
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    assert (kinds["Shrink"], kinds["Expand"], kinds["ExpandAdd"]) == (3, 2, 1)


def test_two_layers_in_one_sum() -> None:
    """As in models whose attention and MLP run side by side."""
    graph = Graph()
    left, right = graph.linear("left", graph.x, HIDDEN), graph.linear("right", graph.x, HIDDEN)
    y = ops.add(graph.x, ops.add(left, right))
    found, layer, x, kinds = result(graph, y, 9)
    want = x + layer("left", x) + layer("right", x)
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    assert (kinds["Expand"], kinds["ExpandAdd"]) == (1, 1)
