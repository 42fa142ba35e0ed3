"""The singular values of what layers have learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from kasa_runtime.training.layers import KasaLinear


@torch.no_grad()
def singular_values(layer: KasaLinear) -> Tensor:
    """Of the update s B diag(d) A: (r,) float32, descending, on the CPU.

    B = Q_B R_B and A^T = Q_A R_A with orthonormal Q, so they are those of the (r, r) matrix
    s R_B diag(d) R_A^T: an (out, in) matrix is never made."""
    right = torch.linalg.qr(layer.lora_A.float().T, mode="r").R  # (in, r) -> (r, r)
    left = torch.linalg.qr(layer.lora_B.float(), mode="r").R  # (out, r) -> (r, r)
    if layer.lora_diag is not None:
        left = left * layer.lora_diag
    values: Tensor = torch.linalg.svdvals(layer.scaling * (left @ right.T))
    return values.cpu()


@torch.no_grad()
def diagonal(layer: KasaLinear) -> Tensor | None:
    """|d|, descending; None for a layer that has none."""
    return None if layer.lora_diag is None else layer.lora_diag.abs().sort(descending=True)[0].cpu()
