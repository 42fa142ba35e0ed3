"""Tables and plots: the figures in them are those of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    OutputSection,
    RunConfig,
    TaskKind,
)
from kasa_runtime.training.experiments.grid import EXPERIMENTS
from kasa_runtime.training.experiments.report import spread, write_reports
from kasa_runtime.training.experiments.runner import Result, Results, digest


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        data=DataSection(train=tmp_path / "t.jsonl", task=TaskKind.CLASSIFICATION),
        eval=EvalSection(metrics=("accuracy",)),
        output=OutputSection(dir=tmp_path / "tiny"),
    )


def filled(config: RunConfig, path: Path, name: str) -> Results:
    """Cell i, seed s: accuracy 50 + 10 i + s after the first epoch, one less after the second."""
    results = Results(path)
    for i, cell in enumerate(EXPERIMENTS[name].cells(config)):
        for seed in range(2):
            accuracy = 50.0 + 10 * i + seed
            results.add(
                Result(
                    run=config.name,
                    settings=digest(config),
                    cell=cell.key,
                    seed=seed,
                    curve=[
                        {"epoch": 1, "accuracy": accuracy, "loss": 1.0},
                        {"epoch": 2, "accuracy": accuracy - 1, "loss": 0.5},
                    ],
                    final={},
                    num_parameters=1234,
                    seconds=1.0,
                    steps=4,
                )
            )
    return results


def test_table_has_best_and_last_epoch_and_the_paired_difference(
    config: RunConfig, tmp_path: Path
) -> None:
    results = filled(config, tmp_path / "results.jsonl", "truncation")
    paths = write_reports(tmp_path, [EXPERIMENTS["truncation"]], [config], results)
    assert [path.name for path in paths] == ["truncation-tiny.png", "truncation.md"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    table = paths[1].read_text()
    assert "| KaSA | 1,234 | 2 | 50.5 ± 0.7 | 49.5 ± 0.7 | -10.00 ± 0.00 |" in table
    assert "| KaSA without truncation | 1,234 | 2 | 60.5 ± 0.7 | 59.5 ± 0.7 |  |" in table
    assert "2 seeds" in table


@pytest.mark.parametrize("name", ["truncation-rank", "versus-lora"])
def test_sweeps_are_drawn(config: RunConfig, tmp_path: Path, name: str) -> None:
    results = filled(config, tmp_path / "results.jsonl", name)
    paths = write_reports(tmp_path, [EXPERIMENTS[name]], [config], results)
    assert paths[0].stat().st_size > 5000


def test_nothing_is_written_of_nothing(config: RunConfig, tmp_path: Path) -> None:
    empty = Results(tmp_path / "results.jsonl")
    assert write_reports(tmp_path, list(EXPERIMENTS.values()), [config], empty) == []


def test_spread_is_the_sample_deviation() -> None:
    assert spread([]) == ""
    assert spread([1.0]) == "1.000"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([30.0, 30.0], signed=True) == "+30.0 ± 0.0"
