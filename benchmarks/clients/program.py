"""A foreign program, run to its end: offline, its words in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import end_group, isolated, last_line


def run(command: Sequence[str], folder: Path, log: Path, timeout_s: float) -> None:
    """Its caches are in `folder`, and no hub is asked. Raises RuntimeError, TimeoutExpired."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**isolated(), **offline, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # with the processes that it starts
        )
    try:
        status = process.wait(timeout_s)
    finally:
        end_group(process)
    if status:
        raise RuntimeError(f"{last_line(log)} (status {status}; {log})")
