"""Which layers lose most by integer weights: in a few, a handful of activations are hundreds of
times as large as all others, and whatever is rounded there moves every prediction.

A layer's divergence is KL(p || p') of the model's predictions p and those with the weight of this
layer alone rounded, p', summed over a text that the model samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_runtime.engine.native.openvino import linears

SHARE = 0.04
"""Of the weights of all layers: what the most sensitive ones may hold together."""

NUM_TOKENS = 32
"""Of the text."""


def most_sensitive(
    model: PreTrainedModel, rounded: Mapping[str, Any], max_positions: int
) -> list[str]:
    """The layers with the largest divergence per weight that have SHARE of all weights. `rounded`
    are the products by integers that the layers become."""
    token_ids = _sampled(model, min(NUM_TOKENS, max_positions))
    sizes = {name: weight(model, name).numel() for name in rounded}
    left = SHARE * sum(sizes.values())
    want = _log_probabilities(model, token_ids)
    lost = dict[str, float]()
    for name, node in rounded.items():
        if sizes[name] <= left:
            with _replaced(weight(model, name), linears.weight(node)):
                found = _log_probabilities(model, token_ids)
            divergence = float(kl_div(found, want, reduction="sum", log_target=True))
            lost[name] = divergence / sizes[name]
    chosen = []
    for name in sorted(lost, key=lost.__getitem__, reverse=True):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """The layer's own weight (out, in), a view."""
    layer: Any = model.get_submodule(name)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@contextmanager
def _replaced(parameter: Tensor, other: Tensor) -> Iterator[None]:
    pristine = parameter.clone()
    parameter.copy_(other)
    yield
    parameter.copy_(pristine)


def _sampled(model: PreTrainedModel, num_tokens: int) -> Tensor:
    """Text of the model's own (tokens,), which stands for what it will read: no data are needed."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.tensor([model.config.get_text_config().bos_token_id or 0])
    for _ in range(num_tokens - 1):
        likely = _log_probabilities(model, token_ids)[-1].exp()
        token_ids = torch.cat([token_ids, likely.multinomial(1, generator=generator)])
    return token_ids


def _log_probabilities(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """(tokens, vocab)"""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=token_ids[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)
