"""Two processes, as `torchrun` and `accelerate launch` start them, train what one does."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kasa_runtime.training.checkpoints import MARK
from kasa_runtime.training.journal import METRICS_FILE, read_lines

from .making import WriteRows
from .runs import ROWS, finished, kasa_train, weights, write_toml

Sections = dict[str, dict[str, Any]]


def torchrun() -> list[str]:
    """On a port of its own, so that runs side by side do not meet."""
    address = f"--rdzv-endpoint=localhost:{free_port()}"
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--rdzv-backend=c10d", address]  # fmt: skip


def accelerate_launch() -> list[str]:
    """Without --cpu, with which it starts one process only, unless there is an mpirun."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
            "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
            f"--main_process_port={free_port()}"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def sections(model_dir: Path, write_rows: WriteRows) -> Sections:
    """24 rows and 8 a step, so that no row is seen twice to fill a batch."""
    write_rows("rows.jsonl", [*ROWS, *ROWS[:2]])
    return {
        "model": {"name": str(model_dir)},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl", "eval": "rows.jsonl",
                 "prompt": "{q} =>", "completion": " {a}"},
        "method": {"r": 4},
        "train": {"epochs": 2, "batch_size": 2, "accumulation": 2, "log_steps": 1, "save_steps": 2,
                  "best_metric": "loss"},
        "eval": {"metrics": ["perplexity"], "baselines": False},
        "output": {"dir": "two", "work_dir": "work-two", "dtype": "float32"},
    }  # fmt: skip


@pytest.mark.parametrize("launcher", [torchrun, accelerate_launch])
def test_two_processes_train_the_adapter_of_one_with_the_same_rows_per_step(
    launcher: Any, sections: Sections, tmp_path: Path
) -> None:
    two = write_toml(tmp_path / "two.toml", sections)
    sections["train"]["accumulation"] = 4
    sections["output"] |= {"dir": "one", "work_dir": "work-one"}
    one = write_toml(tmp_path / "one.toml", sections)

    output = finished(kasa_train(two, launcher=launcher()))
    finished(kasa_train(one))
    got, want = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)
    assert output.count("step 6/6") == 1, output
    assert output.count("report: ") == 1, output
    assert "Warning" not in output, output
    logs = [read_lines(tmp_path / f"work-{name}" / METRICS_FILE) for name in ("two", "one")]
    for left, right in zip(*logs, strict=True):
        for key in left.keys() - {"tokens_per_s", "train_s"}:
            assert left[key] == pytest.approx(right[key], abs=1e-4), key
    card = (tmp_path / "two" / "README.md").read_text()
    assert "6 steps of 8 rows on 2 devices" in card


def test_two_processes_resume_exactly(sections: Sections, tmp_path: Path) -> None:
    """In the middle of the second epoch, where accelerate forgets to pass the epoch on."""
    sections["method"]["dropout"] = 0.2
    sections["train"] |= {"save_steps": 4, "keep_checkpoints": 9, "best_metric": ""}
    run = write_toml(tmp_path / "run.toml", sections)
    finished(kasa_train(run, launcher=torchrun()))
    want = weights(tmp_path / "two")
    (tmp_path / "work-two" / "checkpoint-6" / MARK).unlink()
    finished(kasa_train(run, "--resume", launcher=torchrun()))
    got = weights(tmp_path / "two")
    assert all(torch.equal(want[name], got[name]) for name in want)
