"""A run with `preset = "peft"` against PEFT's own KaSA in a plain loop: the same loss at every
step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from .curves import Recording, assert_same_curve, optimised, record
from .making import WriteRows

METHOD = """
preset = "peft"
r = 4
alpha = 8
beta = 0.01
gamma = 0.02
"""


def curve_of_peft(recording: Recording, **settings: Any) -> tuple[list[float], list[float]]:
    """Total and task losses."""
    kasa = peft.KasaConfig(beta=0.01, gamma=0.02)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", kasa_config=kasa, **settings
    )
    model = peft.get_peft_model(recording.model(), config)
    assert set(model.targeted_module_names) == recording.starts.keys()
    with torch.no_grad():
        for path, start in recording.starts.items():
            module = model.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.copy_(start.a)
            module.lora_B["default"].weight.copy_(start.b)
            module.lora_diag["default"].copy_(start.d)
    totals, task_losses = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch, losses in optimised(parameters, recording.batches):
        task_loss = model(**batch).loss
        losses.append(task_loss + model._get_kasa_loss())
        task_losses.append(task_loss.item())
        totals.append(losses[0].item())
    return totals, task_losses


@pytest.mark.parametrize(
    ("lines", "settings"),
    [
        ("", {}),
        (
            "rank_pattern = { q_proj = 7, 'layers.1.mlp.up_proj' = 2 }\n"
            "alpha_pattern = { v_proj = 20 }\n",
            {
                "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
                "alpha_pattern": {"v_proj": 20},
            },
        ),
        ("use_rslora = true", {"use_rslora": True}),
    ],
    ids=["one rank", "patterns", "rslora"],
)
def test_same_loss_as_peft_at_every_step(
    model_dir: Path,
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    settings: dict[str, Any],
) -> None:
    recording = record(model_dir, write_rows, monkeypatch, METHOD + lines)
    totals, task_losses = curve_of_peft(recording, **settings)
    assert totals[0] > 1.2 * task_losses[0], "the penalties are too small to matter"
    assert_same_curve(recording.totals, totals)
    assert_same_curve(recording.task_losses, task_losses)
