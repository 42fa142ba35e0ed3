"""Resident memory over many loads and unloads of adapters, and what a loaded adapter takes of it.

python benchmarks/memory.py [--model M] [--executor E] [--cycles N] [--json FILE]

KaSA adapters of rank 8 on all linear layers of the blocks, made for the model, are loaded and
unloaded one after another, with no request running. Prints the resident memory after a hundred
cycles and after all of them, and their ratio; then with as many adapters as the engine has slots
for, and after all of these were unloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.peers.adapters import adapters_dir
from benchmarks.peers.bench import machine
from benchmarks.peers.cases import adapter_name
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import AdapterMethod

NUM_FIRST = 100
"""Cycles after which memory should have reached its size."""
HUGE_PAGES_S = 5.0
"""In which the weights have come to lie on huge pages, which takes memory of its own meanwhile."""


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def cycle(runtime: Runtime, names: list[str], count: int) -> float:
    """Load and unload `count` times, in turn. Seconds."""
    start_s = time.perf_counter()
    for index in range(count):
        await runtime.load_adapter(names[index % len(names)])
        await runtime.unload_adapter(names[index % len(names)])
    return time.perf_counter() - start_s


async def run(arguments: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Megabytes, and ratios."""
    native = EngineConfig(executor=arguments.executor)
    config = RuntimeConfig(arguments.model, directory, native=native)
    async with await Runtime.create(config) as runtime:
        print(f"{machine()}; {arguments.model} on {runtime.model.executor}", flush=True)
        names = [adapter_name(i) for i in range(native.max_slots)]
        await asyncio.sleep(HUGE_PAGES_S)
        found = {"started": resident_mb()}
        await cycle(runtime, names, NUM_FIRST)
        found["first cycles"] = resident_mb()
        elapsed_s = await cycle(runtime, names, arguments.cycles - NUM_FIRST)
        found["all cycles"] = resident_mb()
        found["all cycles / first cycles"] = found["all cycles"] / found["first cycles"]
        found["ms per cycle"] = 1e3 * elapsed_s / (arguments.cycles - NUM_FIRST)
        for name in names:
            await runtime.load_adapter(name)
        found["all loaded"] = resident_mb()
        for name in names:
            await runtime.unload_adapter(name)
        found["all unloaded"] = resident_mb()
        return found


def main(arguments: argparse.Namespace) -> None:
    model_dir = resolve(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        fingerprint = BaseModel(model_dir).fingerprint
        count = EngineConfig().max_slots
        directory = adapters_dir(Path(scratch), model_dir, fingerprint, AdapterMethod.KASA, count)
        found = asyncio.run(run(arguments, directory))
    print("\n".join(f"{name:26} {value:.3f}" for name, value in found.items()))
    if arguments.json:
        settings = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
        report = {"machine": machine(), "settings": settings, "found": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--executor", choices=("auto", "torch", "openvino"), default="auto")
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
