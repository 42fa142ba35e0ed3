"""The base's weights as integer codes, by NNCF, and what the codes stand for.

Legend: codes and zero point z are integers of 8 or 4 bits, the scale is float16; a weight that the
graph computes with is W = (codes - z) * scale, in float32. int8 has a scale and a z for every
output feature; int4 for every group of input features of one output feature, and embeddings stay
int8. The few layers that lose most by it stay float32 (`sensitivity.py`). The CPU plugin multiplies
by the codes without ever making W.

An adapter's delta is added to W as to any base: W - P Q + s B diag(d) A, where P Q is the tail of
the weight that was compressed, against which the adapter was trained. Merged weights are that sum
in float32, exact, at float32's cost in the adapter's layers.

With activations in 8 bits (`settings.py`), on processors with VNNI, the plugin multiplies integers
by integers: in x W^T, and there alone, it rounds every 32 features of a row x to multiples of a
127th of the largest of them. An adapter's delta and merged weights are still multiplied by x
itself, so merged and batched agree but for what that rounding does; with float32 activations they
agree.

NNCF is needed to compress, not to serve what was compressed before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from kasa_runtime.errors import ConfigError

VERSION = 2
"""Of how weights are compressed; raise it when that changes."""

GROUP_SIZE = 32
"""Input features that share a scale in int4."""

DEQUANTISATION = frozenset({"Convert", "Subtract", "Multiply", "Reshape"})


def require_nncf(quantization: str) -> None:
    """Raises ConfigError where NNCF is not installed."""
    try:
        import nncf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"quantization {quantization}: compressing this model, once, needs nncf; pip install "
            "'kasa-runtime[int8]'"
        ) from error


def compress(graph: Any, quantization: str) -> Any:
    """The graph with its matrices as codes of "int8" or "int4"; `graph` itself may be changed."""
    import nncf

    modes = nncf.CompressWeightsMode
    else_int8 = nncf.AdvancedCompressionParameters(  # of layers that cannot be cut into groups
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST,
        min_adjusted_group_size=GROUP_SIZE,
    )
    settings: dict[str, dict[str, Any]] = {
        "int8": {"mode": modes.INT8_ASYM},
        "int4": {
            "mode": modes.INT4_ASYM,
            "group_size": GROUP_SIZE,
            "ratio": 1.0,
            "advanced_parameters": else_int8,
        },
    }
    nncf.set_log_level(logging.WARNING)
    with redirect_stdout(sys.stderr):  # of its progress bar
        return nncf.compress_weights(graph, **settings[quantization])


def is_weight(node: Any) -> bool:
    """Whether a node is a weight: a constant, or what is made of constant codes."""
    kind = node.get_type_name()
    return kind == "Constant" or (kind in DEQUANTISATION and all(map(is_weight, _sources(node))))


def dense(node: Any) -> Any:
    """A copy of the weight that a node is, float32."""
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data(dtype=np.float32, copy=True)
    first, *rest = map(dense, _sources(node))
    if kind == "Subtract":
        return first - rest[0]
    if kind == "Multiply":
        return first * rest[0]
    return first.reshape(node.get_output_shape(0))


def dense_weights(graph: Any) -> Iterator[tuple[str, Any]]:
    """Every weight that is made of codes, float32, with the name of its codes."""
    for user in graph.get_ordered_ops():
        for node in _sources(user):
            if node.get_type_name() in DEQUANTISATION and is_weight(node) and not is_weight(user):
                yield _codes(node).get_friendly_name(), dense(node)


def _codes(node: Any) -> Any:
    while node.get_type_name() != "Constant":
        node = _sources(node)[0]
    return node


def _sources(node: Any) -> list[Any]:
    return [port.get_source_output().get_node() for port in node.inputs()]
