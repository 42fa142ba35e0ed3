"""What a person sees while a run goes on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from kasa_runtime.training.progress import ProgressCallback, counting, duration

LOGS = {
    "loss": 2.5, "L1": 2.4, "L2": 8.0, "L3": 4.0, "defect_A": 1.25, "defect_B": 2.5,
    "tokens_per_s": 1234.4,
}  # fmt: skip


def shown(tmp_path: Path, *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=terminal, highlight=False)
    progress = ProgressCallback(console)
    state = TrainerState(max_steps=10, global_step=0)
    rest = TrainingArguments(output_dir=str(tmp_path), report_to="none"), state, TrainerControl()
    progress.on_train_begin(*rest)
    state.global_step = 4
    progress.on_step_end(*rest)
    progress.on_log(*rest, logs=dict(LOGS))
    progress.on_log(*rest, logs={"eval_loss": 1.5, "eval_accuracy": 93.0, "epoch": 1.0})
    progress.on_log(*rest, logs={"train_runtime": 3.0})
    progress.on_train_end(*rest)
    progress.stop()
    return stream.getvalue()


def test_a_log_file_gets_one_line_for_each_log(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert lines[0] == (
        "step 4/10  loss 2.5000  L1 2.4000  L2 8.0000  L3 4.0000  defect A 1.250  "
        "defect B 2.500  1234 tokens/s  0:00 left"
    )
    assert lines[1] == "step 4: held-out loss 1.5000  accuracy 93.0000"
    assert len(lines) == 2


def test_a_terminal_gets_a_bar_with_the_same(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for part in ("training", "4/10", "L3 4.0000", "defect B 2.500", "1234 tokens/s", "held-out"):
        assert part in text, part


@pytest.mark.parametrize(
    ("seconds", "want"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03"), (90_000, "25:00:00")]
)
def test_durations_read_like_a_clock(seconds: float, want: str) -> None:
    assert duration(seconds) == want


def test_counting_says_its_name_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with counting(Console(file=stream, force_terminal=False), "base") as report:
        report(1, 2)
    assert stream.getvalue() == "base\n"
