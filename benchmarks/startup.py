"""Start of a server to the first token of a Generate, everything cached, against what no server can
do without: a process that imports the same libraries and reads the weights. Both are new processes,
taking turns, so that noise hits both alike.

python benchmarks/startup.py [--model M] [--rounds N] [--adapters DIR --adapter NAME]
                             [--json FILE]

Prints, of every round and as median (low to high): seconds from the start of the process to the
server's readiness and to the first token, seconds of the baseline, and their ratio. A first start
of each fills the caches, the page cache too, and is not counted.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.peers.bench import machine, save
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from kasa_runtime.base_model.source import resolve
from kasa_runtime.client import Client

PROMPT = "The capital of France is"
LIBRARIES = (
    "numpy",
    "torch",
    "safetensors.torch",
    "tokenizers",
    "openvino.opset13",
    "grpc.aio",
    "grpc_health.v1.health_pb2_grpc",
    "grpc_reflection.v1alpha.reflection",
    "starlette.applications",
    "uvicorn.protocols.http.httptools_impl",
    "pydantic",
    "prometheus_client",
    "click",
    "filelock",
)
"""What serves: no part of this project, and not transformers, which a cached model does without."""

BASELINE = """
import importlib, sys
sys.modules["openvino_telemetry"] = None  # as in the server: it would call its makers
for name in sys.argv[2:]:
    importlib.import_module(name)
buffer = bytearray(16 << 20)
with open(sys.argv[1], "rb", buffering=0) as weights:
    while weights.readinto(buffer):
        pass
print("ready", flush=True)
"""


@dataclass(frozen=True)
class Round:
    """Seconds since the start of a process; `ratio`: first token over baseline."""

    ready_s: float
    first_token_s: float
    baseline_s: float
    ratio: float


def start_server(arguments: argparse.Namespace, adapters: Path) -> tuple[float, float]:
    """Seconds to readiness and to the first token of a server that is then stopped."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "kasa_runtime.cli", "serve", "--model", arguments.model]
    command += ["--adapters-dir", str(adapters), "--host", "127.0.0.1"]
    command += ["--grpc-port", "0", "--http-port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"grpc=(\S+)", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start; see above")
            ready = time.perf_counter()
            with Client(found[1]) as client:
                options: dict[str, Any] = {"adapter": arguments.adapter, "max_tokens": 1}
                next(iter(client.stream(PROMPT, **options)))
            return ready - began, time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)


def start_baseline(weights: Path) -> float:
    """Seconds until a process has imported LIBRARIES and read `weights`."""
    began = time.perf_counter()
    command = [sys.executable, "-c", BASELINE, str(weights), *LIBRARIES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("the baseline did not start; see above")
        return time.perf_counter() - began


def measure(arguments: argparse.Namespace, weights: Path, adapters: Path) -> Iterable[Round]:
    """One round after the other; who goes first alternates."""
    start_server(arguments, adapters)
    start_baseline(weights)
    for index in range(arguments.rounds):
        server, baseline = (0.0, 0.0), 0.0
        for is_server in (True, False) if index % 2 else (False, True):
            if is_server:
                server = start_server(arguments, adapters)
            else:
                baseline = start_baseline(weights)
        yield Round(*server, baseline, server[1] / baseline)


def main(arguments: argparse.Namespace) -> None:
    weights = max(resolve(arguments.model).glob("*.safetensors"), key=lambda p: p.stat().st_size)
    print(f"{machine()}; {arguments.model}, adapter: {arguments.adapter or 'none'}")
    print("weights in the page cache")
    rounds = []
    with tempfile.TemporaryDirectory() as empty:
        for found in measure(arguments, weights, arguments.adapters or Path(empty)):
            rounds.append(found)
            print("  ".join(f"{k} {v:.2f}" for k, v in asdict(found).items()), flush=True)
    spreads = {f.name: Spread.of(getattr(r, f.name) for r in rounds) for f in fields(Round)}
    print("\n" + "\n".join(f"{k:14} {show(v, digits=2)}" for k, v in spreads.items()))
    save(arguments, [asdict(r) for r in rounds], spreads, libraries=LIBRARIES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=Path, help="directory of adapters; default: none")
    parser.add_argument("--adapter", default="", help="whose first token; default: the base's")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
