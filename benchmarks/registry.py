"""A thousand registered adapters against one: start of the manager, list, lookup and scan. And the
cold load of an adapter against PEFT's load of the same one.

python benchmarks/registry.py [--model M] [--adapters N] [--rounds N] [--json FILE]

The adapters are KaSA adapters of rank 8 on the query and value projections, made for the model and
put into a directory. What the first start does with them is timed once; the later starts, each a
new manager on a new store, are those compared. The engine is a stand-in that takes weights and
drops them, so that a load is the read, the digest, the checks and the fold, to the point where the
engine would get it. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.bench import machine
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.lora import Adapter, AdapterWeights, ModuleWeights
from kasa_runtime.adapter.manager import AdapterManager
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.types import AdapterMethod, Observer

RANK = 8
TARGETS = ("q_proj", "v_proj")
NUM_CALLS = 50


class NoEngine:
    """Takes weights and drops them."""

    async def load_adapter(
        self, adapter: AdapterWeights, instead_of: str | None = None
    ) -> None: ...
    async def unload_adapter(self, key: str) -> None: ...
    async def merge_adapter(self, key: str) -> None: ...
    async def unmerge_adapter(self) -> None: ...


def write_adapters(root: Path, base: BaseModel, count: int, rank: int = RANK) -> None:
    config = AdapterConfig(rank, 16.0, TARGETS, method=AdapterMethod.KASA)
    meta = AdapterMeta(TruncationRule.MIN_DIM, None, base_fingerprint=base.fingerprint)
    targets = {name: shape for name, shape in base.modules.items() if config.targets(name)}
    for index in range(count):
        draw = torch.Generator().manual_seed(index)
        modules = {
            name: ModuleWeights(
                torch.randn(rank, shape.in_features, generator=draw),
                torch.randn(shape.out_features, rank, generator=draw),
                torch.randn(rank, generator=draw),
            )
            for name, shape in targets.items()
        }
        checkpoint.write(root / f"adapter-{index:05}", Adapter(config, meta, modules))


def new_manager(root: Path, tails: TailCache) -> AdapterManager:
    return AdapterManager(
        AdapterStore(root), tails, NoEngine(), max_slots=4, observer=Observer(), force_polling=True
    )


async def timed(work: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def start(root: Path, tails: TailCache) -> float:
    """Seconds until a new manager knows its adapters."""
    began = time.perf_counter()
    manager = new_manager(root, tails)
    await manager.start()
    elapsed = time.perf_counter() - began
    await manager.close()
    return elapsed


async def calls(root: Path, tails: TailCache) -> dict[str, list[float]]:
    """Seconds of single calls of one manager."""
    manager = new_manager(root, tails)
    await manager.start()
    names = [info.name for info in manager.list()]
    found: dict[str, list[float]] = {"list": [], "get": [], "scan": [], "load": []}
    for index in range(NUM_CALLS):
        name = names[index * 37 % len(names)]
        began = time.perf_counter()
        manager.list()
        found["list"].append(time.perf_counter() - began)
        found["get"].append(await timed(manager.get(name)))
        found["scan"].append(await timed(manager.rescan()))
        await manager.unload(name)
        found["load"].append(await timed(manager.load(name)))
    await manager.close()
    return found


def peft_loader(model_dir: Path, adapter: Path) -> Callable[[int], float]:
    """Seconds in which PEFT adds the adapter to a model that has one already."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, str(adapter), adapter_name="first")

    def load(index: int) -> float:
        began = time.perf_counter()
        peft_model.load_adapter(str(adapter), adapter_name=f"again{index}")
        return time.perf_counter() - began

    return load


async def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Spread]:
    model_dir = resolve(arguments.model)
    tails = TailCache.for_model(model_dir)
    one, many = directory / "one", directory / "many"
    write_adapters(one, tails.base, 1)
    write_adapters(many, tails.base, arguments.adapters)
    for root in (one, many):  # the second start remembers what the first found too new to trust
        first = await start(root, tails)
        print(f"first start with {len(list(root.glob('adapter-*')))}: {first:.2f} s", flush=True)
        time.sleep(2)
        await start(root, tails)
    starts: dict[Path, list[float]] = {one: [], many: []}
    for index in range(arguments.rounds):
        for root in (one, many) if index % 2 else (many, one):
            starts[root].append(await start(root, tails))
    beyond = [b - a for a, b in zip(starts[one], starts[many], strict=True)]
    found = {"start, 1 adapter": starts[one], "start, all": starts[many], "start, beyond 1": beyond}
    few, all_of_them = await calls(one, tails), await calls(many, tails)
    for name, seconds in all_of_them.items():
        found |= {f"{name}, 1 adapter": few[name], f"{name}, all": seconds}
    if arguments.peft:
        load = peft_loader(model_dir, many / "adapter-00000")
        found["load, PEFT"] = [load(index) for index in range(arguments.rounds)]
    return {name: Spread.of(1e3 * s for s in seconds) for name, seconds in found.items()}


def main(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.ERROR)
    print(f"{machine()}; {arguments.model}, {arguments.adapters} adapters of rank {RANK}")
    with tempfile.TemporaryDirectory() as directory:
        spreads = asyncio.run(measure(arguments, Path(directory)))
    print("\nmilliseconds, median (low to high)")
    print("\n".join(f"{name:18} {show(v, digits=3)}" for name, v in spreads.items()))
    if arguments.json:
        report = {name: vars(spread) for name, spread in spreads.items()}
        arguments.json.write_text(json.dumps({"machine": machine(), "milliseconds": report}))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
