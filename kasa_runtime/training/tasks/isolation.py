"""Whether a model keeps packed sequences apart."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kasa_runtime.errors import ConfigError


@torch.inference_mode()
def check_isolation(model: PreTrainedModel) -> None:
    """Ask the model itself: what stands before a packed sequence must not change its logits.

    transformers tells sequences apart by positions that start anew, and only in models that pass
    them on to its masks: not with recurrent layers, positions that are added elsewhere, or
    attention that has no mask. Raises ConfigError."""
    model.eval()
    first = model(**_packed(model, 1, 2, 3, 4)).logits[:, 4:].float()  # (1, 3, vocabulary)
    second = model(**_packed(model, 5, 6, 7, 8)).logits[:, 4:].float()
    # A product of other rows may round otherwise; another sequence in sight changes far more.
    tolerance = 4 * torch.finfo(model.dtype).eps * first.abs().max()
    if not (first - second).abs().max() <= tolerance:
        raise ConfigError(
            f"[data] packing: {type(model).__name__} with {model.config._attn_implementation} "
            "attention does not keep packed rows apart; set packing = false"
        )


def _packed(model: PreTrainedModel, *before: int) -> dict[str, Tensor | bool]:
    """`before`, and three tokens that are always the same: one row."""
    ids = torch.tensor([[*before, 9, 10, 11]], device=model.device)
    positions = torch.tensor([[*range(len(before)), 0, 1, 2]], device=model.device)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}
