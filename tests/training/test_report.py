"""report.html: what it shows, and of what it can be made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kasa_runtime.training import report
from kasa_runtime.training.journal import METRICS_FILE, SPECTRA_FILE
from kasa_runtime.training.report import write_report

pytest.importorskip("matplotlib", reason="the extra `train` is not installed")


def write_journal(work_dir: Path, *, kasa: bool = True, num_layers: int = 6) -> None:
    logs: list[dict[str, Any]] = []
    snapshots = []
    for step in range(1, 9):
        line = {"step": step, "loss": 5 / step, "L1": 4 / step, "learning_rate": 1e-3}
        line |= {"grad_norm": 2.0, "tokens_per_s": 100.0}
        if kasa:
            line |= {"L2": 8.0, "L3": 4.0, "defect_A": 1.0, "defect_B": 2.0}
        logs.append(line)
        if step % 4 == 0:
            logs.append({"step": step, "eval_loss": 3 / step, "eval_accuracy": 10.0 * step})
        values = [step / 2, step / 4, step / 8]
        layers = {f"model.layers.{i}.mlp.up_proj": {"values": values} for i in range(num_layers)}
        snapshots.append({"step": step, "layers": layers})
    for name, lines in ((METRICS_FILE, logs), (SPECTRA_FILE, snapshots)):
        (work_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_all_curves_stand_in_one_file_that_needs_no_other(tmp_path: Path) -> None:
    write_journal(tmp_path)
    path = write_report(tmp_path, title="a <b> run", facts={"steps": "8 of 8", "<i>": "&"})
    assert path == tmp_path / "report.html"
    page = path.read_text()
    for text in (
        "a &lt;b&gt; run", "8 of 8", "&lt;i&gt;", "L1, the task", "L2, the singular values",
        "L3, orthogonality", "||A Aᵀ - I||", "Gradient norm", "Learning rate", "Held-out rows",
        "accuracy", "Largest singular value of each layer", "model.layers.0.mlp.up_proj",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") == 6
    assert "http://www.w3.org" in page and "<script" not in page and "src=" not in page


def test_plain_lora_has_no_curves_of_the_penalties(tmp_path: Path) -> None:
    write_journal(tmp_path, kasa=False)
    path = write_report(tmp_path, title="lora")
    assert path
    page = path.read_text()
    assert "L3" not in page and "Orthogonality" not in page


@pytest.mark.parametrize("num_layers", [1, 2, 200])
def test_any_number_of_layers_can_be_shown(tmp_path: Path, num_layers: int) -> None:
    write_journal(tmp_path, num_layers=num_layers)
    assert write_report(tmp_path, title="layers")


def test_a_run_that_failed_before_its_first_log_has_a_report(tmp_path: Path) -> None:
    path = write_report(tmp_path, title="nothing")
    assert path and "No step was logged" in path.read_text()


def test_without_matplotlib_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert write_report(tmp_path, title="x") is None
    assert not list(tmp_path.iterdir())
