"""A system that generates at once, and misbehaves where its settings say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.peers.child import Arrivals, Peer, serve


class FakePeer(Peer):
    def __init__(self, settings: dict[str, Any]) -> None:
        print("a library says something on standard output")
        self.fault = settings.get("fault")
        if self.fault == "load":
            raise ValueError("no such model")
        self.held = 0
        if num_bytes := settings.get("child_bytes", 0):
            code = f"held = b'x' * {num_bytes}; print(flush=True); import time; time.sleep(60)"
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()  # now it holds them

    def prepare(self, num_held: int, merged: bool) -> bool:
        changed, self.held = num_held != self.held, num_held
        return changed

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        if self.fault == "hang":
            time.sleep(60)
        if self.fault == "exit":
            os._exit(3)
        arrivals = Arrivals(len(prompts))
        for token in range(tokens - (self.fault == "short")):
            for i in range(len(prompts)):
                arrivals.add(i, [token])
        return arrivals


if __name__ == "__main__":
    serve(FakePeer)
