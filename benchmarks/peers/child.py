"""The process of one system, as the driver talks to it: one JSON object per line, on standard input
and output.

    {"load": settings}                                       -> {"versions": {package: version}}
    {"prepare": {"num_held": N, "merged": bool}}             -> {"changed": bool}
    {"run": {"prompts": ids, "adapters": names, "tokens": N}}
              -> {"token_s": times, "token_ids": ids, "peak_rss_bytes": N, "resident_bytes": N}

An exception is answered with {"error": text}. The process ends with its input.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KV_CACHE_GIB = 1  # of every system that wants to be told


@dataclass
class Arrivals:
    """When the tokens of each request came, and which they were."""

    num_requests: int
    token_s: list[list[float]] = field(init=False)  # seconds since this object was made
    token_ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.token_s = [[] for _ in range(self.num_requests)]
        self.token_ids = [[] for _ in range(self.num_requests)]
        self._start_s = time.perf_counter()

    def add(self, request: int, token_ids: list[int], at_s: float | None = None) -> None:
        """They came now, or at `at_s` on the clock of `time.perf_counter`."""
        now_s = time.perf_counter() if at_s is None else at_s
        self.token_s[request] += [now_s - self._start_s] * len(token_ids)
        self.token_ids[request] += token_ids


class Peer(ABC):
    """One system with one model. `settings` has `model` (a directory), `threads`, `adapters_dir`
    and how many are in it, `num_adapters`; `scratch_dir`, `max_concurrency`, `max_model_len`, and
    the system's own."""

    packages: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, settings: dict[str, Any]) -> None: ...

    def prepare(self, num_held: int, merged: bool) -> bool:
        """Hold the first `num_held` adapters, the first one merged or not. Returns whether
        something had to be changed."""
        return False

    @abstractmethod
    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        """Send all at once and generate exactly `tokens` for each, greedily."""


def serve(kind: type[Peer]) -> None:
    """Answer the driver until it closes the pipe."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        [(what, message)] = json.loads(line).items()
        try:
            if what == "load":
                peer = kind(message)
                answer: dict[str, Any] = {
                    "versions": {name: importlib.metadata.version(name) for name in kind.packages}
                }
            else:
                assert peer is not None, "the first message is load"
                answer = _answer(peer, what, message)
        except Exception as error:  # the edge of the process
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # some of these libraries wait for threads that never end


def _answer(peer: Peer, what: str, message: dict[str, Any]) -> dict[str, Any]:
    if what == "prepare":
        return {"changed": peer.prepare(**message)}
    _reset_peak_rss()
    arrivals = peer.run(**message)
    _require_complete(arrivals, message["tokens"])
    return {
        "token_s": arrivals.token_s,
        "token_ids": arrivals.token_ids,
        "peak_rss_bytes": _peak_rss_bytes(),
        "resident_bytes": _resident_bytes(),
    }


def _require_complete(arrivals: Arrivals, tokens: int) -> None:
    counts = {len(times) for times in arrivals.token_s}
    if counts != {tokens}:
        raise RuntimeError(f"want {tokens} tokens for every request, got {sorted(counts)}")


def _reset_peak_rss() -> None:
    for process in _processes():
        (process / "clear_refs").write_text("5")


def _peak_rss_bytes() -> int:
    """Of this process and those that it started, added up; pages that they share count twice."""
    return sum(_field_bytes(process / "status", "VmHWM") for process in _processes())


def _resident_bytes() -> int:
    """What they hold now. Memory that they share counts once; pages of files, which other systems
    map too, as in the process that has the most."""
    own = sum(
        _field_bytes(process / "smaps_rollup", name)
        for process in _processes()
        for name in ("Pss_Anon", "Pss_Shmem")
    )
    return own + max(_field_bytes(process / "status", "RssFile") for process in _processes())


def _field_bytes(path: Path, name: str) -> int:
    """0 for a process that is ending and holds none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _processes() -> list[Path]:
    """Of this process group, which the driver made for this system alone."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [Path(f"/proc/{pid}") for pid in numbers if _group_of(pid) == os.getpgrp()]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
