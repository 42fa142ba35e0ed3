"""What surrounds linear layers in a graph, for operations of our own to take its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
MOVING = frozenset(
    {"Gather", "GatherElements", "GatherND", "Transpose", "Slice", "StridedSlice", "Concat"}
    | {"Split", "VariadicSplit", "Tile", "Broadcast", "ReverseSequence"}
)
"""What the plugin might let change places with an operation on rows."""


def moves_data(node: Any) -> bool:
    """Whether a node, or one that it only gives another shape, changes the places of rows or
    features."""
    while node.get_type_name() in RESHAPING:
        node = node.input(0).get_source_output().get_node()
    return node.get_type_name() in MOVING


def by_input(linears: Mapping[str, Any]) -> list[list[str]]:
    """Layers that read the same output, in order."""
    groups: list[tuple[Any, list[str]]] = []
    for name, node in linears.items():
        x = node.input(0).get_source_output()
        if groups and groups[-1][0] == x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def readers(x: Any, groups: list[list[str]], linears: Mapping[str, Any]) -> list[str]:
    """The layers that read `x`, if nothing else does."""
    for names in groups:
        if linears[names[0]].input(0).get_source_output() == x:
            return names if len(x.get_target_inputs()) == len(names) else []
    return []


def only_user(output: Any) -> Any:
    """The node that alone reads an output, once; None where there are others."""
    users = list(output.get_target_inputs())
    return users[0].get_node() if len(users) == 1 else None


def other_input(node: Any, output: Any) -> Any:
    a, b = (i.get_source_output() for i in node.inputs())
    return b if a == output else a


def biased(linear: Any) -> Any:
    """The layer's output: of the product, or of the sum with its bias."""
    product = linear.output(0)
    user = only_user(product)
    if user is None or user.get_type_name() != "Add":
        return product
    bias = other_input(user, product).get_node().get_type_name() == "Constant"
    return user.output(0) if bias and same_shape(user.output(0), product) else product


def same_shape(a: Any, b: Any) -> bool:
    return bool(a.get_partial_shape() == b.get_partial_shape())


def residual_sum(product: Any) -> tuple[Any, Any] | None:
    """The sum that a product goes into, and what it is added to there."""
    user = only_user(product)
    if user is None or user.get_type_name() != "Add":
        return None
    other = other_input(user, product)
    same = same_shape(other, product) and same_shape(user.output(0), product)
    return (user.output(0), other) if same and other != product else None


def gated_pair(linears: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """(gate, up, silu(gate) up) where two of the layers are used for nothing else."""
    outputs = {name: biased(linear) for name, linear in linears.items()}
    for gate, output in outputs.items():
        silu = only_user(output)
        if silu is None or not is_silu(silu):
            continue
        product = only_user(silu.output(0))
        if product is None or product.get_type_name() != "Multiply":
            continue
        other = other_input(product, silu.output(0))
        for up, candidate in outputs.items():
            if candidate == other and up != gate and only_user(other) is not None:
                return (gate, up, product.output(0)) if same_shape(output, other) else None
    return None


def is_silu(node: Any) -> bool:
    if node.get_type_name() != "Swish":
        return False
    betas = [i.get_source_output().get_node() for i in node.inputs()[1:]]
    return all(b.get_type_name() == "Constant" and b.get_data() == 1 for b in betas)


def redirect(inputs: Iterable[Any], source: Any) -> None:
    """Let inputs read another output."""
    for reading in inputs:
        reading.replace_source_output(source)
