"""Our own products in the place of a graph's linear layers (`product.hpp`, `lowrank.cpp`): their
weights are read through the table, so that others take their place between two steps, and the terms
of each row's adapter are added in the same pass.

A gated MLP becomes one operation, and a square layer that goes into a residual sum does this too:
their results have the shape of what they read, which the plugin knows. Of all others it asks for
the shapes in every step, so layers that read the same input are one operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kasa_runtime.engine.native.openvino.linears import below_logit_rows
from kasa_runtime.engine.native.openvino.lowrank import ALL_ROWS, LOGIT_ROWS, LowRank
from kasa_runtime.engine.native.openvino.patterns import (
    biased,
    by_input,
    gated_pair,
    readers,
    redirect,
    residual_sum,
)


def replace(graph: Any, linears: Mapping[str, Any], low_rank: LowRank) -> None:
    """`linears`: the products by layer, in the order of the graph."""
    gathered = below_logit_rows(graph, linears)
    groups = by_input(linears)
    done: set[str] = set()
    for names in groups:
        step = LOGIT_ROWS if names[0] in gathered else ALL_ROWS
        group = {name: linears[name] for name in names}
        if mlp := _gated_mlp(group, groups, linears, low_rank):
            _put(low_rank, "GatedMlp", mlp, linears, step)
            done.update(mlp)
        rest = [name for name in names if name not in done]
        if len(rest) == 1 and _adds_in_place(rest[0], linears, low_rank):
            _put(low_rank, "Linear", rest, linears, step)
        elif rest:
            _put_linears(low_rank, rest, linears, step)
    graph.validate_nodes_and_infer_types()


def _put(
    low_rank: LowRank, kind: str, names: list[str], linears: Mapping[str, Any], step: int
) -> None:
    """One operation for a chain of layers, and for the residual sum after it."""
    x, y = _input(linears[names[0]]), linears[names[-1]].output(0)
    if residual := residual_sum(y):
        y, other = residual
        new = low_rank.operation(f"{kind}Add", [x, other], names, step)
    else:
        new = low_rank.operation(kind, [x], names, step)
    redirect(y.get_target_inputs(), new.output(0))


def _put_linears(
    low_rank: LowRank, names: list[str], linears: Mapping[str, Any], step: int
) -> None:
    sizes = [low_rank.shapes[name][0] for name in names]
    x = _input(linears[names[0]])
    new = low_rank.operation("Linears", [x], names, step, sizes=sizes)
    for name, output in zip(names, new.outputs(), strict=True):
        redirect(linears[name].output(0).get_target_inputs(), output)


def _gated_mlp(
    group: Mapping[str, Any],
    groups: list[list[str]],
    linears: Mapping[str, Any],
    low_rank: LowRank,
) -> list[str]:
    """Its gate, up and down; empty where there is none, or one with biases."""
    if not (pair := gated_pair(group)):
        return []
    gate, up, activated = pair
    reading = readers(activated, groups, linears)
    if len(reading) != 1 or low_rank.shapes[reading[0]][0] != low_rank.shapes[gate][1]:
        return []
    names = [gate, up, *reading]
    is_plain = all(biased(linears[name]) == linears[name].output(0) for name in names)
    return names if is_plain else []


def _adds_in_place(name: str, linears: Mapping[str, Any], low_rank: LowRank) -> bool:
    """Whether a layer keeps the width of its input and goes into a residual sum."""
    out_features, in_features = low_rank.shapes[name]
    return out_features == in_features and residual_sum(linears[name].output(0)) is not None


def _input(linear: Any) -> Any:
    return linear.input(0).get_source_output()
