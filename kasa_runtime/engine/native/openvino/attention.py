"""Closes an open graph with OpenVINO's paged attention, and the KV cache it works on."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino.op import _PagedAttentionExtension

from kasa_runtime.engine.native import huge_pages
from kasa_runtime.errors import ModelError

if TYPE_CHECKING:
    from kasa_runtime.engine.native.executor import SequenceSlice
    from kasa_runtime.engine.native.openvino.conversion import AttentionLayer

STEP_INPUTS = (
    "past_lens",
    "subsequence_begins",
    "block_indices",
    "block_indices_begins",
    "max_context_len",
)


def close(graph: Any, layers: Sequence[AttentionLayer]) -> None:
    """Put paged attention between each layer's queries, keys, values and its `attended` input.
    Raises ModelError where it cannot express the layer."""
    steps = [_input(name, [] if name == "max_context_len" else [-1]) for name in STEP_INPUTS]
    caches = []
    results = {port.get_any_name(): port.get_node() for port in graph.outputs}
    parameters = {port.get_any_name(): port.get_node() for port in graph.inputs}
    for i, layer in enumerate(layers):
        own = [_cache(f"{part}_cache.{i}") for part in ("key", "value")]
        asked = [results[f"{part}.{i}"] for part in ("query", "key", "value")]
        sources = [result.input(0).get_source_output() for result in asked]
        node = _paged_attention(layer, [*sources, *(c.output(0) for c in own)], steps)
        attended = parameters[f"attended.{i}"]
        for user in attended.output(0).get_target_inputs():
            user.replace_source_output(node.output(0))
        for result in asked:
            graph.remove_result(result)
        graph.remove_parameter(attended)
        caches += own
    graph.add_parameters([*steps, *caches])
    graph.validate_nodes_and_infer_types()


def _paged_attention(layer: AttentionLayer, qkv_and_caches: list[Any], steps: list[Any]) -> Any:
    """The runtime's operation; its many inputs for features that we do not use stay empty."""
    i32, f32 = np.int32, np.float32
    past, begins, blocks, block_begins, longest = (step.output(0) for step in steps)
    sinks = np.array(layer.sinks, f32).reshape(1, -1, 1, 1) if layer.sinks else _empty(f32, 4)
    inputs = [
        *qkv_and_caches,
        *(past, begins, blocks, block_begins),
        _constant(np.array(layer.scaling, f32)),
        _constant(np.array(layer.sliding_window, i32)),
        _constant(_empty(f32, 1)),  # slopes of ALiBi
        longest,
        *(_constant(_empty(i32, 1)) for _ in range(3)),  # cache eviction: scores, rotated blocks
        *(_constant(_empty(f32, 1)) for _ in range(2)),  # its rotations; sparse attention
        *(_constant(np.array(0, i32)) for _ in range(2)),
        _constant(sinks),
        _constant(np.array(0, i32)),  # diversity of evicted blocks
        *(_constant(_empty(i32, 1)) for _ in range(4)),
        _constant(_empty(np.uint8, 1)),  # a mask among the queries of a step
        _constant(_empty(i32, 1)),
    ]
    try:
        node = _PagedAttentionExtension(inputs)
    except RuntimeError as error:
        raise ModelError(
            f"OpenVINO {ov.__version__} cannot express this model's attention ({error}); "
            "use --executor torch"
        ) from error
    about = node.get_rt_info()  # the CPU plugin takes the cache's shape from here
    about["k_head_size"], about["v_head_size"] = layer.key_dim, layer.value_dim
    about["num_k_heads"] = about["num_v_heads"] = layer.num_kv_heads
    return node


def _empty(dtype: Any, rank: int) -> Any:
    return np.zeros([0] * rank, dtype)


def _constant(value: Any) -> Any:
    return ops.constant(value).output(0)


def _input(name: str, shape: list[int]) -> Any:
    return _named(ops.parameter(ov.PartialShape(shape), ov.Type.i32), name)


def _cache(name: str) -> Any:
    """Shape and type are for the plugin to choose."""
    return _named(ops.parameter(ov.PartialShape([-1, -1, -1, -1]), ov.Type.dynamic), name)


def _named(parameter: Any, name: str) -> Any:
    parameter.set_friendly_name(name)
    parameter.output(0).set_names({name})
    return parameter


def step_inputs(sequences: Sequence[SequenceSlice], block_size: int) -> dict[str, Any]:
    """Where each sequence's tokens and blocks are, as int32 arrays by input name."""
    blocks = [s.block_table[: -(-s.context_len // block_size)] for s in sequences]

    def begins(lengths: list[int]) -> Any:
        return np.cumsum([0, *lengths], dtype=np.int32)

    values = (
        np.array([s.num_computed for s in sequences], np.int32),
        begins([s.num_tokens for s in sequences]),
        np.array([block for own in blocks for block in own], np.int32),
        begins([len(own) for own in blocks]),
        np.array(max(s.context_len for s in sequences), np.int32),
    )
    return dict(zip(STEP_INPUTS, values, strict=True))


def block_shapes(compiled: Any) -> dict[str, tuple[int, ...]]:
    """The shape of one block (heads, tokens, dim) of every cache input, as the plugin chose it."""
    shapes = {}
    for port in compiled.inputs:
        if "_cache." in port.get_any_name():
            dims = list(port.get_partial_shape())[1:]
            shapes[port.get_any_name()] = tuple(dim.get_length() for dim in dims)
    return shapes


def allocate(compiled: Any, num_blocks: int) -> tuple[dict[str, Any], mmap.mmap]:
    """Cache tensors (float32) by input name, zeroed, and the memory in which they lie."""
    shapes = {name: (num_blocks, *shape) for name, shape in block_shapes(compiled).items()}
    sizes = [_whole_pages(4 * math.prod(shape)) for shape in shapes.values()]
    # The first step touches some of every layer: with huge pages, a start would zero them all.
    memory = huge_pages.reserve(sum(sizes))
    starts = itertools.accumulate(sizes, initial=0)
    tensors = {
        name: ov.Tensor(np.ndarray(shape, np.float32, memory, start), shared_memory=True)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }
    return tensors, memory


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
