"""The crash run of `benchmarks/crash.py`, shortened; it runs alone, for it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.crash import Change, State, expected

ROOT = Path(__file__).parent.parent.parent


def test_killed_processes_leave_the_old_state_or_the_new_one(tmp_path):
    command = [sys.executable, "-m", "benchmarks.crash", "--rounds", "15", "--seed", "5"]
    ran = subprocess.run(
        [*command, "--directory", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "15 kills" in ran.stdout


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (Change("upload", "a", "3"), State("3", ("1", "3"), "2")),
        (Change("take_in", "a", "3"), State("3", ("1", "3"), "3")),
        (Change("take_in", "a", "2"), State("1", ("2", "1"), "2")),
        (Change("rollback", "a", "2"), State("2", ("2", "1"), "2")),
        (Change("delete", "a"), None),
    ],
)
def test_what_the_run_expects_of_a_change(change, after):
    before = {"a": State("1", ("2", "1"), "2"), "b": State("7", ("7",))}
    states = expected(before, change)
    assert states.get("a") == after and states["b"] == before["b"]
