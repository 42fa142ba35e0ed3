"""A run with `preset = "paper"` against the authors' formulas, written out here as their code has
them: SVD truncation to in_features - r components, n x n Gram matrices, unsquared norms, means over
modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from .curves import Recording, Start, assert_same_curve, optimised, record
from .making import WriteRows

BETA, GAMMA = 0.05, 0.1


class AuthorsLinear(nn.Module):
    """W is replaced by its in_features - r largest components; dW = s * B diag(d) A."""

    def __init__(self, linear: nn.Linear, start: Start) -> None:
        super().__init__()
        keep = linear.in_features - len(start.d)
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.num_cut = max(0, len(s) - keep)
        self.weight = u[:, :keep] @ torch.diag(s[:keep]) @ vh[:keep]
        self.scaling = start.scaling
        self.lora_A, self.lora_B = nn.Parameter(start.a.clone()), nn.Parameter(start.b.clone())
        self.lora_diag = nn.Parameter(start.d.clone())

    def forward(self, x: Tensor) -> Tensor:
        update = x @ self.lora_A.T @ torch.diag(self.lora_diag) @ self.lora_B.T
        return nn.functional.linear(x, self.weight) + update * self.scaling

    def penalties(self) -> tuple[Tensor, Tensor]:
        a, b, d = self.lora_A, self.lora_B, self.lora_diag
        l2 = torch.sum(d**2)
        l3 = torch.norm(a.T @ a - torch.eye(a.shape[1]))  # in x in
        l3 = l3 + torch.norm(b @ b.T - torch.eye(b.shape[0]))  # out x out
        return l2, l3


def curve_of_authors(recording: Recording) -> tuple[list[float], list[float], set[int]]:
    """Total and task losses, and how many components were cut off."""
    model = recording.model().requires_grad_(False)
    layers = []
    for path, start in recording.starts.items():
        layers.append(AuthorsLinear(model.get_submodule(path), start))
        model.set_submodule(path, layers[-1])
    totals, task_losses = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch, losses in optimised(parameters, recording.batches):
        task_loss = model(**batch).loss
        l2, l3 = torch.stack([torch.stack(layer.penalties()) for layer in layers]).mean(dim=0)
        losses.append(task_loss + BETA * l2 + GAMMA * l3)
        task_losses.append(task_loss.item())
        totals.append(losses[0].item())
    return totals, task_losses, {layer.num_cut for layer in layers}


@pytest.mark.parametrize("lines", ["", "rank_pattern = { k_proj = 2, gate_proj = 6 }"])
def test_same_loss_as_the_authors_formulas_at_every_step(
    model_dir: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    method = f'preset = "paper"\nr = 4\nalpha = 8\nbeta = {BETA}\ngamma = {GAMMA}\n{lines}'
    recording = record(model_dir, write_rows, monkeypatch, method)
    totals, task_losses, num_cut = curve_of_authors(recording)
    assert {0, 4} <= num_cut, "want layers of which their rule cuts something, and others"
    assert {start.t for start in recording.starts.values()} == num_cut
    assert totals[0] > 1.2 * task_losses[0], "the penalties are too small to matter"
    assert_same_curve(recording.totals, totals)
    assert_same_curve(recording.task_losses, task_losses)
