"""A run that is cut off and resumed ends with the adapter of one that ran through."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kasa_runtime.errors import TrainingError
from kasa_runtime.training import checkpoints
from kasa_runtime.training.config import RunConfig, Schedule
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.journal import METRICS_FILE, SPECTRA_FILE, read_lines
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.run import train
from kasa_runtime.training.workdir import RECORD

from .making import WriteRows
from .runs import (
    ROWS,
    finished,
    kasa_train,
    make_run,
    quiet,
    weights,
    with_output,
    with_train,
    write_toml,
)

NUM_STEPS = 24


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> RunConfig:
    data = write_rows("rows.jsonl", ROWS)
    return make_run(
        tmp_path, model_dir, data, max_steps=9, accumulation=2, save_steps=2, keep_checkpoints=9
    )


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    write_rows("rows.jsonl", ROWS)
    sections = {
        "model": {"name": str(model_dir)},
        "data": {"train": "rows.jsonl", "prompt": "{q} =>", "completion": " {a}"},
        "method": {"r": 4, "dropout": 0.2},
        "train": {
            "epochs": NUM_STEPS / 3,
            "batch_size": 4,
            "accumulation": 2,
            "log_steps": 1,
            "save_steps": 2,
            "keep_checkpoints": 1,
        },
        "output": {"dir": "unbroken", "work_dir": "work-unbroken"},
    }
    unbroken = write_toml(tmp_path / "unbroken.toml", sections)
    sections["output"] = {"dir": "killed", "work_dir": "work-killed"}
    killed = write_toml(tmp_path / "killed.toml", sections)
    finished(kasa_train(unbroken))

    seed = time.time_ns() % 1_000_000
    print(f"random seed {seed}")  # shown where the test fails
    chance = random.Random(seed)
    for number in range(2):
        process = kasa_train(killed, *(["--resume"] if number else []))
        step = chance.randint(1, NUM_STEPS - 2)
        kill(process, tmp_path / "work-killed" / METRICS_FILE, step, chance.uniform(0, 0.1))
        leave_torn(tmp_path / "work-killed", NUM_STEPS + 1 + number)  # the run may have ended
    output = finished(kasa_train(killed, "--resume"))

    files = [tmp_path / name / "adapter_model.safetensors" for name in ("unbroken", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes(), output
    for name in (METRICS_FILE, SPECTRA_FILE):
        steps = [
            [line["step"] for line in read_lines(tmp_path / work / name)]
            for work in ("work-unbroken", "work-killed")
        ]
        assert steps[0] == steps[1], name


def kill(process: subprocess.Popen[str], metrics: Path, step: int, delay_s: float) -> None:
    """Once `step` is logged, and a little later. A run that is resumed after that step is killed
    at its start."""
    while process.poll() is None:
        if any(line["step"] >= step for line in read_lines(metrics)):
            break
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def leave_torn(work_dir: Path, step: int) -> None:
    """What a process leaves behind that is killed while it writes a checkpoint."""
    torn = checkpoints.directory_of(work_dir, step)
    torn.mkdir(parents=True)
    (torn / "trainable.safetensors").write_bytes(b"half a fi")


def cut_off_at(config: RunConfig, step: int) -> None:
    """Make a run that ended look as if it had been killed after `step` was saved."""
    for path in config.work_dir.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    record = config.work_dir / RECORD
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_schedule_goes_on_where_it_was(
    config: RunConfig, tmp_path: Path, schedule: Schedule
) -> None:
    config = with_train(config, schedule=schedule)
    train(config, quiet())
    unbroken = weights(config.output.dir)
    cut_off_at(config, 4)  # in the middle of the second epoch
    train(with_train(config, resume=True), quiet())
    resumed = weights(config.output.dir)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.parametrize("step", [2, 6, 8])
def test_measuring_and_choosing_go_on_where_they_were(
    config: RunConfig, tmp_path: Path, step: int
) -> None:
    """Step 6 ends an epoch: it is measured, then saved."""
    config = with_train(config, best_metric="loss")
    facts = train(config, quiet())
    unbroken = weights(config.output.dir)
    cut_off_at(config, step)
    resumed = train(with_train(config, resume=True), quiet())
    assert resumed.kept_step == facts.kept_step
    assert resumed.final_losses == facts.final_losses
    assert all(torch.equal(unbroken[k], v) for k, v in weights(config.output.dir).items())


def test_retraction_resumes_exactly(config: RunConfig) -> None:
    method = replace(config.method, ortho_form=OrthoForm.QR, diag_init=DiagInit.ZEROS)
    config = replace(config, method=method)
    train(config, quiet())
    unbroken = weights(config.output.dir)
    cut_off_at(config, 4)
    train(with_train(config, resume=True), quiet())
    assert all(torch.equal(unbroken[k], v) for k, v in weights(config.output.dir).items())


def test_resuming_without_a_checkpoint_starts_at_the_first_step(
    config: RunConfig, tmp_path: Path
) -> None:
    train(config, quiet())
    other = with_output(with_train(config, resume=True), tmp_path / "other")
    train(other, quiet())
    want = weights(config.output.dir)
    assert all(torch.equal(want[k], v) for k, v in weights(other.output.dir).items())


def test_resuming_with_other_settings_is_refused_by_name(config: RunConfig) -> None:
    train(config, quiet())
    cut_off_at(config, 4)
    changed = with_train(config, resume=True, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"train.learning_rate = 0.01, now it is 0.001"):
        train(changed, quiet())


def test_a_new_run_does_not_throw_away_the_checkpoints_of_one_that_was_cut_off(
    config: RunConfig,
) -> None:
    train(config, quiet())
    cut_off_at(config, 4)
    with pytest.raises(TrainingError, match=r"did not finish .* checkpoint-4.* --resume"):
        train(config, quiet())
    assert checkpoints.newest(config.work_dir)


def test_a_new_run_removes_what_a_finished_one_left(config: RunConfig) -> None:
    train(config, quiet())
    train(with_train(config, max_steps=3, save_steps=0), quiet())
    assert not list(config.work_dir.glob("checkpoint-*"))
    steps = [line["step"] for line in read_lines(config.work_dir / METRICS_FILE)]
    assert max(steps) == 3
