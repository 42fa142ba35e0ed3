"""`report.html`: the course of a run as curves."""

from __future__ import annotations

from pathlib import Path


def write_report(work_dir: Path, *, title: str) -> Path:
    """Make `report.html` of the journal in `work_dir`."""
    return work_dir / "report.html"
