"""Low-rank branches beside a graph's linear layers, in the form that the CPU plugin fuses into one
operation: the two products and the mask between them, all three read from state variables, added
to the layer's own product before its bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino.op.util import Variable, VariableInfo
from torch import Tensor, from_numpy

PREFIX = "__module.decoder."
"""What the tracer puts before a module's path in the names of its operations."""


def kind_of(module: str) -> str:
    """The layers that share their columns and their mask, by name."""
    return module.rpartition(".")[2]


def linear_nodes(graph: Any, modules: Iterable[str]) -> dict[str, Any]:
    """The product of each linear layer that can be adapted: called once, by a constant weight."""
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
        if len(nodes) == 1 and weight_node(nodes[0]).get_type_name() == "Constant"
    }


def weight_node(linear: Any) -> Any:
    return linear.input(1).get_source_output().get_node()


def weight(linear: Any) -> Tensor:
    """A copy of the layer's weight (out, in)."""
    stored = np.array(weight_node(linear).data)
    return from_numpy(stored if linear.get_attributes()["transpose_b"] else stored.T.copy())


def set_weight(linear: Any, value: Tensor) -> None:
    """Give the layer another weight (out, in), leaving other users of the old one alone."""
    stored = value if linear.get_attributes()["transpose_b"] else value.T
    constant = ops.constant(stored.contiguous().numpy(), dtype=np.float32)
    linear.input(1).replace_source_output(constant.output(0))


def add_branches(graph: Any, linears: Mapping[str, Any]) -> dict[str, int]:
    """A branch beside every one of `linears`. Returns the rank of the mask by kind: 3 where tokens
    come as (1, tokens, features), 2 where they come as (tokens, features)."""
    masks: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    sinks: list[Any] = []
    for module, node in linears.items():
        kind, x = kind_of(module), node.input(0).get_source_output()
        in_features, out_features = _features(node)
        if kind not in masks:
            ranks[kind] = node.output(0).get_partial_shape().rank.get_length()
            shape = [-1, -1] if ranks[kind] == 2 else [1, -1, -1]
            masks[kind] = _variable(f"{kind}.mask", shape, sinks)
        # Neither product transposes: 4 to 9 % less time for a step than with A and B as they are.
        a_t = _variable(f"{module}.A", [in_features, -1], sinks)
        b_t = _variable(f"{module}.B", [-1, out_features], sinks)
        users = list(node.output(0).get_target_inputs())
        hidden = ops.multiply(ops.matmul(x, a_t, False, False), masks[kind])
        total = ops.add(node.output(0), ops.matmul(hidden, b_t, False, False))
        for user in users:
            user.replace_source_output(total.output(0))
    graph.add_sinks(sinks)
    graph.validate_nodes_and_infer_types()
    return ranks


def gathered_kinds(graph: Any, linears: Mapping[str, Any]) -> set[str]:
    """Kinds of layers that see only the rows whose logits are wanted."""
    [start] = [p.get_node() for p in graph.inputs if p.get_any_name() == "logit_rows"]
    below, front = {start.get_name()}, [start]
    while front:
        for output in front.pop().outputs():
            for user in output.get_target_inputs():
                if user.get_node().get_name() not in below:
                    below.add(user.get_node().get_name())
                    front.append(user.get_node())
    return {kind_of(module) for module, node in linears.items() if node.get_name() in below}


def _features(linear: Any) -> tuple[int, int]:
    """(in, out)"""
    rows, columns = weight_node(linear).get_output_shape(0)
    return (columns, rows) if linear.get_attributes()["transpose_b"] else (rows, columns)


def _variable(name: str, shape: list[int], sinks: list[Any]) -> Any:
    """A state variable of float32, without columns until it is set."""
    info = VariableInfo()
    info.data_shape, info.data_type = ov.PartialShape(shape), ov.Type.f32
    info.variable_id = name
    variable = Variable(info)
    initial = ops.constant(np.zeros([max(dim, 0) for dim in shape], np.float32))
    read = ops.read_value(initial, variable)
    sinks.append(ops.assign(read, variable))
    return read
