"""The linear layers of a graph: which operations they are, and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino.opset13 as ops
from numpy.typing import NDArray

from kasa_runtime.engine.native.openvino import compression

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "__module.decoder."
"""What the tracer puts before a module's path in the names of its operations."""


def linear_nodes(graph: Any, modules: Iterable[str]) -> dict[str, Any]:
    """The product of each linear layer that can be adapted: called once, by a constant weight or
    one of integers."""
    wanted, found = set(modules), dict[str, list[Any]]()
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        module = node.get_friendly_name().partition("/")[0].removeprefix(PREFIX)
        if module in wanted:
            found.setdefault(module, []).append(node)
    return {
        module: nodes[0]
        for module, nodes in found.items()
        if len(nodes) == 1 and compression.is_weight(weight_node(nodes[0]))
    }


def weight_node(linear: Any) -> Any:
    return linear.input(1).get_source_output().get_node()


def is_dense(linear: Any) -> bool:
    """Whether the layer's weight is no integers."""
    return bool(weight_node(linear).get_type_name() == "Constant")


def array(linear: Any) -> NDArray[np.float32]:
    """The layer's weight (out, in), float32, a view where it is dense."""
    node = weight_node(linear)
    stored: NDArray[np.float32] = node.data if is_dense(linear) else compression.dense(node)
    return stored if linear.get_attributes()["transpose_b"] else stored.T


def weight(linear: Any) -> Tensor:
    """A copy of the layer's weight (out, in), float32."""
    from torch import from_numpy

    stored = compression.dense(weight_node(linear))
    return from_numpy(stored if linear.get_attributes()["transpose_b"] else stored.T.copy())


def set_weight(linear: Any, value: Tensor) -> None:
    """Give the layer another weight (out, in), leaving other users of the old one alone."""
    stored = value if linear.get_attributes()["transpose_b"] else value.T
    constant = ops.constant(stored.contiguous().numpy(), dtype=np.float32)
    linear.input(1).replace_source_output(constant.output(0))


def below_logit_rows(graph: Any, linears: Mapping[str, Any]) -> set[str]:
    """The layers that see only the rows whose logits are wanted."""
    [start] = [p.get_node() for p in graph.inputs if p.get_any_name() == "logit_rows"]
    below, front = {start.get_name()}, [start]
    while front:
        for output in front.pop().outputs():
            for user in output.get_target_inputs():
                if user.get_node().get_name() not in below:
                    below.add(user.get_node().get_name())
                    front.append(user.get_node())
    return {module for module, node in linears.items() if node.get_name() in below}
