"""Runs of cells on a tiny encoder and a tiny decoder: every approach trains, results are kept and
found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
    TaskKind,
    TrainSection,
)
from kasa_runtime.training.experiments.grid import EXPERIMENTS, Approach, Cell
from kasa_runtime.training.experiments.runner import Results, digest, run_cell, run_cells

from ..making import WriteRows

SENTENCES = [
    {"text": text, "label": str(label)}
    for text, label in (("good day", 1), ("bad day", 0), ("good film", 1), ("bad film", 0))
]


@pytest.fixture
def classifying(encoder_dir: Path, write_rows: WriteRows, tmp_path: Path) -> RunConfig:
    rows = write_rows("rows.jsonl", SENTENCES)
    return RunConfig(
        model=ModelSection(name=str(encoder_dir)),
        data=DataSection(train=rows, eval=rows, task=TaskKind.CLASSIFICATION),
        method=MethodSection(r=4, alpha=8, target_modules=("query", "value")),
        train=TrainSection(epochs=2, batch_size=2, learning_rate=1e-2, log_steps=1),
        eval=EvalSection(metrics=("accuracy",)),
        output=OutputSection(dir=tmp_path / "tiny"),
    )


@pytest.fixture
def writing(model_dir: Path, write_rows: WriteRows, tmp_path: Path) -> RunConfig:
    rows = write_rows("rows.jsonl", [{"prompt": "red", "completion": " stop"}] * 4)
    return RunConfig(
        model=ModelSection(name=str(model_dir)),
        data=DataSection(train=rows, eval=rows),
        method=MethodSection(r=4, alpha=8, target_modules=("q_proj", "down_proj")),
        train=TrainSection(epochs=2, batch_size=2, learning_rate=1e-2, log_steps=1),
        output=OutputSection(dir=tmp_path / "tiny"),
    )


@pytest.mark.parametrize("approach", list(Approach))
def test_each_approach_trains_what_it_should(classifying: RunConfig, approach: Approach) -> None:
    result = run_cell(classifying, Cell("x", approach), seed=0)
    assert not result.failure
    assert [point["epoch"] for point in result.curve] == (
        [0] if approach is Approach.NOTHING else [1, 2]
    )
    assert all(0 <= point["accuracy"] <= 100 for point in result.curve)
    if approach is Approach.HEAD:
        assert result.num_parameters == 0
    else:
        assert result.num_parameters > 0
    moved = result.curve[0]["loss"] != result.curve[-1]["loss"]
    assert moved is (approach is not Approach.NOTHING)


@pytest.mark.parametrize(
    "approach", [Approach.KASA, Approach.DORA, Approach.PISSA, Approach.ADALORA, Approach.FULL]
)
def test_approaches_train_a_decoder(writing: RunConfig, approach: Approach) -> None:
    result = run_cell(writing, Cell("x", approach), seed=0)
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]
    assert (result.defect_A is not None) is (approach is Approach.KASA)


def test_kasa_has_r_parameters_a_layer_more_than_lora(classifying: RunConfig) -> None:
    kasa, lora = (run_cell(classifying, Cell("x", a), 0) for a in (Approach.KASA, Approach.LORA))
    num_layers = 2 * 2  # query and value of each of two layers
    assert kasa.num_parameters - lora.num_parameters == num_layers * classifying.method.r


def test_a_seed_repeats_and_another_one_differs(classifying: RunConfig) -> None:
    curves = [run_cell(classifying, Cell("x"), seed).curve for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_the_truncated_base_loses_with_t(writing: RunConfig) -> None:
    cells = EXPERIMENTS["untrained"].cells(writing)[:5]  # t = 0, 1, 2, 4, 8
    losses = [run_cell(writing, cell, 0).curve[0]["loss"] for cell in cells]
    assert len(set(losses)) == len(losses)
    assert abs(losses[1] - losses[0]) < abs(losses[4] - losses[0])


def test_what_is_there_is_not_run_again(classifying: RunConfig, tmp_path: Path) -> None:
    cells = EXPERIMENTS["truncation"].cells(classifying)
    path, quiet = tmp_path / "out" / "results.jsonl", Console(quiet=True)
    run_cells(classifying, cells[:1], range(2), Results(path), quiet)
    assert len(path.read_text().splitlines()) == 2
    first = path.read_text()
    run_cells(classifying, cells, range(2), Results(path), quiet)
    assert path.read_text().startswith(first)
    assert len(path.read_text().splitlines()) == 4
    other = replace(classifying, train=replace(classifying.train, epochs=1))
    assert Results(path).find(other, cells[0], 0) is None, "other settings, other results"
    assert Results(path).of_cell(classifying, cells[0]).keys() == {0, 1}


def test_digest_is_of_settings_and_not_of_places(classifying: RunConfig) -> None:
    moved = replace(classifying, data=replace(classifying.data, train=Path("/else/rows.jsonl")))
    assert digest(moved) == digest(classifying)
    other = replace(classifying, method=replace(classifying.method, r=2))
    assert digest(other) != digest(classifying)


def test_a_run_that_diverges_is_a_result(classifying: RunConfig) -> None:
    result = run_cell(classifying, Cell("x", changes={"method.beta": 1e38}), 0)
    assert "not finite" in result.failure
    assert result.curve == []


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"run": "x"})[:5] + "\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl:1: not a result"):
        Results(path)
