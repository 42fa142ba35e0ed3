"""Which checkpoints count, which are removed, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kasa_runtime.errors import TrainingError
from kasa_runtime.training import checkpoints, workdir
from kasa_runtime.training.config import DataSection, OutputSection, RunConfig, TrainSection
from kasa_runtime.training.selection import num_since_best


def make(work_dir: Path, *steps: int) -> None:
    for step in steps:
        directory = checkpoints.directory_of(work_dir, step)
        directory.mkdir(parents=True)
        (directory / "trainable.safetensors").write_bytes(b"...")
        checkpoints.mark_complete(directory)


def steps(work_dir: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in work_dir.glob("checkpoint-*")}


def test_newest_goes_by_the_number_not_by_the_name(tmp_path: Path) -> None:
    make(tmp_path, 2, 10, 9)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_a_torn_checkpoint_is_never_the_newest_and_is_discarded(tmp_path: Path) -> None:
    make(tmp_path, 4, 8)
    (tmp_path / "checkpoint-8" / checkpoints.MARK).unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-4"
    checkpoints.discard_torn(tmp_path)
    assert steps(tmp_path) == {4}


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.rotate(tmp_path, 2, best_step=2)
    assert steps(tmp_path) == {2, 4, 5}
    checkpoints.rotate(tmp_path, 9)
    assert steps(tmp_path) == {2, 4, 5}


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    checkpoints.remove_all(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-notes", "metrics.jsonl"}


def test_what_is_written_again_is_not_whole_meanwhile(tmp_path: Path) -> None:
    make(tmp_path, 3)
    directory = tmp_path / "checkpoint-3"
    with checkpoints.writing(directory, is_main=True):
        assert checkpoints.newest(tmp_path) is None
        checkpoints.mark_complete(directory)
    assert checkpoints.newest(tmp_path) == directory


def test_a_write_that_fails_removes_what_it_wrote_and_names_the_last_good_one(
    tmp_path: Path,
) -> None:
    make(tmp_path, 3)
    directory = tmp_path / "checkpoint-6"
    message = r"checkpoint-6: .* cannot be written \(full\).*checkpoint-3; --resume"
    with (
        pytest.raises(TrainingError, match=message),
        checkpoints.writing(directory, is_main=True),
    ):
        directory.mkdir()
        raise OSError("full")
    assert steps(tmp_path) == {3}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    output = OutputSection(tmp_path / "adapter", work_dir=tmp_path / "work")
    return RunConfig(DataSection(tmp_path / "rows.jsonl"), output, train=TrainSection(save_steps=1))


def with_train(config: RunConfig, **train: object) -> RunConfig:
    return replace(config, train=replace(config.train, **train))  # type: ignore[arg-type]


def test_a_run_that_was_cut_off_is_resumed_or_kept(config: RunConfig) -> None:
    assert workdir.claim(config) is None
    make(config.work_dir, 5)
    with pytest.raises(TrainingError, match="did not finish"):
        workdir.claim(config)
    resumed = with_train(config, resume=True, log_steps=3, save_steps=7, patience=1)
    assert workdir.claim(resumed) == config.work_dir / "checkpoint-5"


def test_checkpoints_of_other_settings_are_refused_but_not_once_the_run_is_finished(
    config: RunConfig,
) -> None:
    workdir.claim(config)
    make(config.work_dir, 5)
    other = with_train(config, resume=True, seed=3)
    with pytest.raises(TrainingError, match=r"train.seed = 0, now it is 3"):
        workdir.claim(other)
    workdir.finish(config)
    assert workdir.claim(other) is None
    assert steps(config.work_dir) == set()


def test_a_moved_data_file_is_still_the_same_run(config: RunConfig, tmp_path: Path) -> None:
    workdir.claim(config)
    make(config.work_dir, 5)
    moved = replace(config, data=DataSection(tmp_path / "elsewhere" / "rows.jsonl"))
    assert workdir.claim(with_train(moved, resume=True))


@pytest.mark.parametrize(
    ("values", "greater", "want"),
    [
        ([], True, 0),
        ([1.0], True, 0),
        ([1.0, 2.0, 2.0, 1.5], True, 2),
        ([3.0, 1.0, 2.0], False, 1),
        ([float("nan"), float("nan")], True, 2),
        ([2.0, float("nan")], False, 1),
    ],
)
def test_waiting_is_counted_from_the_first_best(
    values: list[float], greater: bool, want: int
) -> None:
    assert num_since_best(values, greater_is_better=greater) == want
