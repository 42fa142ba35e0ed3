"""Tracing a transformers model, and compressing what was traced.

Imported only where a model is converted: transformers takes seconds.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.skeleton import linear_layers
from kasa_runtime.engine.native.decoder import DecoderInfo, load_decoder
from kasa_runtime.engine.native.openvino import compression, linears, sensitivity
from kasa_runtime.engine.native.openvino.conversion import AttentionLayer, ConvertedModel, Probe
from kasa_runtime.errors import KasaError, ModelError

logger = logging.getLogger(__name__)

NAME = "kasa_open"
INPUTS = ("input_ids", "position_ids", "logit_rows")
PROBE_TOKENS, PROBE_LOGITS = 24, 8


def convert(model_dir: Path) -> ConvertedModel:
    """Raises ModelError for a model that cannot be traced."""
    logger.info("converting %s for OpenVINO, once", model_dir)
    start_s = time.monotonic()
    AttentionInterface.register(NAME, _open_attention)
    model = load_decoder(model_dir, dtype=torch.float32, device=torch.device("cpu"), attention=NAME)
    info = DecoderInfo.of(model)
    model.set_experts_implementation("batched_mm")  # the others have steps that cannot be traced
    try:
        layers = _watch_attention(model)
        graph = _trace(model, layers)
        probe = _reference(model, info)
    except KasaError:
        raise
    except Exception as error:  # the architecture's own code, which raises what it likes
        raise ModelError(
            f"{info.architecture} cannot be converted for OpenVINO ({_reason(error)}); "
            "use --executor torch"
        ) from error
    modules = {n: (s.out_features, s.in_features) for n, s in linear_layers(model).items()}
    logger.info("converted in %.1f s", time.monotonic() - start_s)
    return ConvertedModel(graph, info, layers, modules, probe)


def compressed(model_dir: Path, base: ConvertedModel, quantization: str) -> ConvertedModel:
    """`base` with its weights as integers, but for the layers that lose most by it; the probe is
    transformers' with what the integers stand for."""
    logger.info("compressing %s to %s, once", model_dir, quantization)
    start_s = time.monotonic()
    graph = compression.compress(base.graph, quantization)
    model = load_decoder(
        model_dir, dtype=torch.float32, device=torch.device("cpu"), attention="eager"
    )
    nodes = linears.linear_nodes(graph, base.modules)
    for name in sensitivity.most_sensitive(model, nodes, base.info.max_positions):
        linears.set_weight(nodes[name], sensitivity.weight(model, name))
        logger.info("%s stays float32", name)
    _round_weights(model, graph, base.modules)
    probe = _reference(model, base.info)
    logger.info("compressed in %.1f s", time.monotonic() - start_s)
    return replace(base, graph=graph, probe=probe)


def _round_weights(model: PreTrainedModel, graph: Any, modules: Iterable[str]) -> None:
    """Give the model the weights that the integers of `graph` stand for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in compression.dense_weights(graph):
        parameter = parameters.get(name.removeprefix("self.decoder."))
        if parameter is not None:
            parameter.copy_(torch.from_numpy(weight))
    for name, node in linears.linear_nodes(graph, modules).items():
        layer: Any = model.get_submodule(name)
        if isinstance(layer, Conv1D):  # the tracer transposes its weight, and the name is lost
            layer.weight.copy_(linears.weight(node).T)


def _reason(error: Exception) -> str:
    """OpenVINO's messages are pages; the operations that it lacks are in lines of their own."""
    lines = str(error).splitlines() or [type(error).__name__]
    return "; ".join(line[3:] for line in lines if line.startswith("-- ")) or lines[0]


@dataclass
class _Pass:
    """One forward pass with open attention: what the layers ask, and what they are given."""

    attended: tuple[Tensor, ...] = ()  # per call (tokens, heads * value_dim); none: zeros
    calls: list[AttentionLayer] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)  # queries, keys, values of every call


_current: ContextVar[_Pass] = ContextVar("_current")


@contextmanager
def _passing(attended: tuple[Tensor, ...] = ()) -> Iterator[_Pass]:
    current = _Pass(attended)
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)


def _open_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hand out queries, keys and values (1, heads, tokens, dim) and return what comes from outside
    as (1, tokens, heads, dim). Raises ModelError for what paged attention cannot express."""
    if softcap is not None:
        raise ModelError(
            "OpenVINO's paged attention has no soft-capping of scores; use --executor torch"
        )
    current, index = _current.get(), len(_current.get().calls)
    heads, key_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    current.calls.append(
        AttentionLayer(
            int(heads),
            int(key.shape[1]),
            int(key_dim),
            int(value_dim),
            float(key_dim) ** -0.5 if scaling is None else float(scaling),
            sliding_window or 0,
            () if s_aux is None else tuple(s_aux.detach().flatten().tolist()),
        )
    )
    # (1, heads, tokens, dim) -> (tokens, heads * dim); widths as constants of the graph
    for x in (query, key, value):
        current.asked.append(x[0].transpose(0, 1).reshape(-1, int(x.shape[1]) * int(x.shape[3])))
    if not current.attended:
        out = query.new_zeros(query.shape[2], int(heads) * int(value_dim))
    else:
        out = current.attended[index]
    return out.reshape(1, -1, int(heads), int(value_dim)), None


class _OpenDecoder(nn.Module):
    """Token ids (tokens,), positions (tokens,), rows whose logits are wanted, and what attention
    gives each layer -> logits (rows, vocab), then queries, keys and values of each layer."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor, *attended: Tensor
    ) -> tuple[Tensor, ...]:
        with _passing(attended) as current:
            output = self.decoder(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                logits_to_keep=logit_rows,
            )
        return output.logits[0].float(), *current.asked


def _watch_attention(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention calls of one token's way through the model. Raises ModelError if there are
    none."""
    with torch.inference_mode(), _passing() as current:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    if not current.calls:
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so this "
            "engine cannot serve it; try another engine"
        )
    return current.calls


def _trace(model: PreTrainedModel, layers: list[AttentionLayer]) -> Any:
    tokens = 5
    attended = [torch.zeros(tokens, x.num_heads * x.value_dim) for x in layers]
    example = (torch.arange(tokens), torch.arange(tokens), torch.tensor([1, 4]), *attended)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about shapes that are meant as constants
        graph = ov.convert_model(_OpenDecoder(model), example_input=example)
    names = [*INPUTS, *(f"attended.{i}" for i in range(len(layers)))]
    for port, name in zip(graph.inputs, names, strict=True):
        parameter = port.get_node()
        parameter.set_friendly_name(name)
        port.set_names({name})
        shape = [-1] if name in INPUTS else [-1, *list(port.get_partial_shape())[1:]]
        parameter.set_partial_shape(ov.PartialShape(shape))
    asked = [f"{part}.{i}" for i in range(len(layers)) for part in ("query", "key", "value")]
    for port, name in zip(graph.outputs, ["logits", *asked], strict=True):
        port.set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def _reference(model: PreTrainedModel, info: DecoderInfo) -> Probe:
    """A prompt and transformers' own logits of its last tokens, with its own attention."""
    length = min(PROBE_TOKENS, info.max_positions)
    draw = np.random.default_rng(0)
    token_ids = torch.from_numpy(draw.integers(0, info.vocab_size, length))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(
            input_ids=token_ids[None], use_cache=False, logits_to_keep=PROBE_LOGITS
        ).logits[0]
    return token_ids.numpy(), logits.float().contiguous().numpy()
