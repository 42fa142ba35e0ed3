"""The cells of the experiments: what they change, and that equal ones are one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kasa_runtime.training.config import (
    DataSection,
    MethodSection,
    OutputSection,
    RunConfig,
    TaskKind,
)
from kasa_runtime.training.experiments.grid import EXPERIMENTS, Approach, Cell
from kasa_runtime.training.experiments.runner import of_cell


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        data=DataSection(train=tmp_path / "t.jsonl", task=TaskKind.CLASSIFICATION),
        output=OutputSection(dir=tmp_path / "out"),
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cells_have_labels_of_their_own_and_references_that_exist(
    name: str, config: RunConfig
) -> None:
    cells = EXPERIMENTS[name].cells(config)
    labels = [cell.label for cell in cells]
    assert len(set(labels)) == len(labels)
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.against for cell in cells} <= {"", *labels}
    for cell in cells:  # every change is a setting that there is
        of_cell(config, cell, seed=3)


def test_the_run_s_own_settings_are_one_cell_in_all_experiments(config: RunConfig) -> None:
    plain = Cell("any name").key
    for name in ("truncation", "truncation-rank", "loss-terms", "initialisation", "orthogonality"):
        assert plain in {cell.key for cell in EXPERIMENTS[name].cells(config)}, name


def test_loss_terms_cross_truncation_diagonal_and_penalties(config: RunConfig) -> None:
    cells = EXPERIMENTS["loss-terms"].cells(config)
    assert len(cells) == 2 * (4 + 2) + 1
    made = {cell.label: of_cell(config, cell, 0).method for cell in cells}
    bare = made["whole, no diagonal, L1"]
    assert (bare.truncation_rank, bare.diag, bare.beta, bare.gamma) == (0, False, 0, 0)
    whole = made["cut, diagonal, L1 + L2 + L3"]
    assert whole == config.method


def test_lora_of_the_served_rank_keeps_alpha_over_r(config: RunConfig) -> None:
    config = replace(config, method=MethodSection(r=8, alpha=16, truncation_rank=4))
    cells = EXPERIMENTS["versus-lora"].cells(config)
    doubled = next(cell for cell in cells if cell.label.startswith("LoRA, rank r + t"))
    method = of_cell(config, doubled, 0).method
    assert (method.r, method.alpha) == (12, 24)
    assert not method.is_kasa


def test_versus_lora_sweeps_rates_and_gives_full_fine_tuning_a_tenth(config: RunConfig) -> None:
    cells = EXPERIMENTS["versus-lora"].cells(config)
    full = [of_cell(config, c, 0).train for c in cells if c.approach is Approach.FULL]
    lora = [of_cell(config, c, 0).train for c in cells if c.label.startswith("LoRA, lr")]
    assert [f.learning_rate * 10 for f in full] == pytest.approx([x.learning_rate for x in lora])
    assert any(cell.approach is Approach.HEAD for cell in cells)
    causal = replace(config, data=replace(config.data, task=TaskKind.COMPLETION))
    cells = EXPERIMENTS["versus-lora"].cells(causal)
    assert not any(cell.approach is Approach.HEAD for cell in cells), "a decoder has no new head"
    assert not EXPERIMENTS["untrained"].fits(config)
    assert EXPERIMENTS["untrained"].fits(causal)
