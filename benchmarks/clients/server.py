"""`kasa serve` in a process of its own, at free ports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environments import ROOT, end_group


@contextmanager
def serving(model: str, adapters: Path, flags: list[str], log: Path) -> Iterator[str]:
    """The URL of its HTTP face. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "kasa_runtime.cli", "serve", "--model", model]
    command += ["--adapters-dir", str(adapters), "--host", "127.0.0.1"]
    command += ["--grpc-port", "0", "--http-port", "0", *flags]
    with log.open("a") as messages:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        found = re.search(r"http=(\S+)", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"the server did not start; {log} says why")
        yield f"http://{found[1].removeprefix('http://')}"
    finally:
        end_group(process)
