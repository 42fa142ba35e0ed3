"""What a run writes down of its course."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.adapter.kasa import compute_tail
from kasa_runtime.errors import TrainingError
from kasa_runtime.training.journal import (
    METRICS_FILE,
    NUM_SNAPSHOTS,
    SPECTRA_FILE,
    Journal,
    read_lines,
)
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.spectra import diagonal, singular_values


def make_layer(out_of: int = 20, into: int = 12, *, diag: bool = True) -> KasaLinear:
    linear = torch.nn.Linear(into, out_of)
    tail = compute_tail(linear.weight.detach(), 3)
    layer = KasaLinear(linear, 3, 2.0, tail=tail, diag=diag)
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("diag", [True, False])
def test_singular_values_are_those_of_the_update(shape: tuple[int, int], *, diag: bool) -> None:
    layer = make_layer(*shape, diag=diag)
    with torch.no_grad():
        d = layer.lora_diag if layer.lora_diag is not None else torch.ones(3)
        update = 2.0 * (layer.lora_B * d) @ layer.lora_A
        want = torch.linalg.svdvals(update)[:3]
    torch.testing.assert_close(singular_values(layer), want, rtol=1e-4, atol=1e-5)


def test_diagonal_is_sorted_by_size() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.lora_diag.copy_(torch.tensor([1.0, -3.0, 2.0]))  # type: ignore[union-attr]
    assert diagonal(layer).tolist() == [3, 2, 1]  # type: ignore[union-attr]
    assert diagonal(make_layer(diag=False)) is None


class Course:
    """A run as the Trainer would tell a journal of it."""

    def __init__(self, work_dir: Path, max_steps: int) -> None:
        self.journal = Journal(work_dir, {"layers.0.q_proj": make_layer()})
        self.state = TrainerState(max_steps=max_steps, global_step=0)
        self.rest: tuple[Any, Any, Any] = (
            TrainingArguments(output_dir=str(work_dir), report_to="none"),
            self.state,
            TrainerControl(),
        )

    def run(self, start: int, end: int) -> None:
        self.state.global_step = start
        self.journal.on_train_begin(*self.rest)
        for step in range(start + 1, end + 1):
            self.state.global_step = step
            self.journal.on_step_end(*self.rest)
            self.journal.on_log(*self.rest, logs={"loss": 1.0 / step})
        self.journal.on_log(*self.rest, logs={"train_runtime": 3.0})
        self.journal.on_train_end(*self.rest)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_every_log_is_a_line_and_snapshots_are_few(tmp_path: Path) -> None:
    Course(tmp_path, 120).run(0, 119)
    assert steps(tmp_path / METRICS_FILE) == list(range(1, 120))
    taken = steps(tmp_path / SPECTRA_FILE)
    assert taken[0] == 0 and taken[-1] == 119 and taken[1] == 3
    assert len(taken) <= NUM_SNAPSHOTS + 2
    (first, *_) = read_lines(tmp_path / SPECTRA_FILE)
    assert len(first["layers"]["layers.0.q_proj"]["values"]) == 3


def test_a_resumed_run_forgets_what_came_after_its_first_step(tmp_path: Path) -> None:
    Course(tmp_path, 20).run(0, 13)
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"step": 14, "lo')  # killed here
    Course(tmp_path, 20).run(10, 20)
    assert steps(tmp_path / METRICS_FILE) == list(range(1, 21))
    assert steps(tmp_path / SPECTRA_FILE) == list(range(21))


def test_a_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    Course(tmp_path, 20).run(0, 20)
    Course(tmp_path, 20).run(0, 2)
    assert steps(tmp_path / METRICS_FILE) == [1, 2]


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    course = Course(tmp_path, 3)
    course.run(0, 1)
    course.journal.on_log(*course.rest, logs={"loss": 1.0, "grad_norm": float("inf")})
    last = (tmp_path / METRICS_FILE).read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["grad_norm"] is None


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(TrainingError, match=r"work/metrics.jsonl: cannot be written"):
        Course(tmp_path / "work", 3).run(0, 1)
