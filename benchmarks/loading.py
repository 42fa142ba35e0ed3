"""Loading adapters: what requests that run meanwhile notice of it, how long it takes from the files
until the engine can run a step with the adapter, and how long PEFT takes to load the same one.

python benchmarks/loading.py [--model M] [--executor E] [--adapters N] [--streams N] [--rounds N]
                             [--no-peft] [--json FILE]

The adapters are KaSA adapters of rank 8 on all linear layers of the blocks, made for the model; the
files are in the page cache, none of the loaded ones is in memory. Every round, in turn: adapters
are loaded with nothing running, and beside one request; then `--streams` requests stream, half of
them with adapters of their own, while all `--adapters` are loaded one after another, with pauses.
Prints, as median (low to high) over the rounds, the times between two tokens of a request with and
without loading, and the median time of a load, in steps too. The steps of a load with nothing
running, or beside one request, are those of one request.

Before that: the first load of the process, which reads the base's tails, and what it takes to
compute them where they are not on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from benchmarks.merging import gaps, streams
from benchmarks.peers.adapters import RANK, adapters_dir
from benchmarks.peers.bench import machine, save
from benchmarks.peers.cases import adapter_name
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from benchmarks.registry import peft_loader
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import AdapterMethod

NUM_COLD = 10
"""Loads of a round with nothing running, and beside one request."""


NUM_BETWEEN_PAUSES = 5
"""Loads, beside streams, after which nothing is loaded for as long: steps take longer as the
streams' contexts grow, so both have to be watched at all lengths."""
SETTLE_S = 0.15
"""A gap between tokens that is part of a pause and of the loads around it counts as the loads'."""


@dataclass(frozen=True)
class Round:
    """Seconds, medians where there are several; ratios have none."""

    step_alone_s: float
    load_idle_s: float
    load_idle_steps: float
    load_beside_one_s: float
    load_beside_one_steps: float
    step_s: float
    load_beside_streams_s: float
    load_beside_streams_steps: float
    gap_p99_s: float
    gap_p99_loading_s: float
    p99_ratio: float
    median_ratio: float
    longest_gap_s: float
    longest_gap_loading_s: float


async def load_seconds(runtime: Runtime, names: Sequence[str]) -> list[float]:
    """Of each, one after the other; none of them is in the engine before."""
    found = []
    for name in names:
        await runtime.unload_adapter(name)
        start_s = time.perf_counter()
        await runtime.load_adapter(name)
        found.append(time.perf_counter() - start_s)
    return found


async def measure(runtime: Runtime, streaming: Sequence[str], loaded: Sequence[str]) -> Round:
    """`streaming`: the adapter of each of the requests, "" for none; `loaded`: others."""
    few = loaded[:NUM_COLD]
    idle_s = statistics.median(await load_seconds(runtime, few))
    async with streams(runtime, streaming[:1]) as arrivals:
        quiet_s = time.perf_counter()
        await asyncio.sleep(1.0)
        busy_s = time.perf_counter()
        beside_one_s = statistics.median(await load_seconds(runtime, few))
    alone_s = statistics.median(gaps(arrivals, quiet_s, busy_s))
    quiet, loading, beside = [], [], []
    async with streams(runtime, streaming) as arrivals:
        await load_seconds(runtime, few)
        pause_s = 1.0
        for first in range(0, len(loaded), NUM_BETWEEN_PAUSES):
            quiet_s = time.perf_counter()
            await asyncio.sleep(pause_s)
            busy_s = time.perf_counter()
            beside += await load_seconds(runtime, loaded[first : first + NUM_BETWEEN_PAUSES])
            end_s = time.perf_counter()
            pause_s = end_s - busy_s
            quiet += gaps(arrivals, quiet_s + SETTLE_S, busy_s - SETTLE_S)
            loading += gaps(arrivals, busy_s, end_s)
    beside_s = statistics.median(beside)
    step_s = statistics.median(quiet)
    p99_s, p99_loading_s = (float(np.percentile(x, 99)) for x in (quiet, loading))
    return Round(
        step_alone_s=alone_s,
        load_idle_s=idle_s,
        load_idle_steps=idle_s / alone_s,
        load_beside_one_s=beside_one_s,
        load_beside_one_steps=beside_one_s / alone_s,
        step_s=step_s,
        load_beside_streams_s=beside_s,
        load_beside_streams_steps=beside_s / step_s,
        gap_p99_s=p99_s,
        gap_p99_loading_s=p99_loading_s,
        p99_ratio=p99_loading_s / p99_s,
        median_ratio=statistics.median(loading) / step_s,
        longest_gap_s=max(quiet),
        longest_gap_loading_s=max(loading),
    )


async def run(arguments: argparse.Namespace, directory: Path) -> tuple[float, list[Round]]:
    """Seconds of the first load of the process, and the rounds."""
    native = EngineConfig(executor=arguments.executor)
    config = RuntimeConfig(arguments.model, directory, native=native)
    async with await Runtime.create(config) as runtime:
        print(
            f"{machine()}; {arguments.model} on {runtime.model.executor}; {arguments.adapters} "
            f"adapters, {arguments.streams} streams"
        )
        names = [adapter_name(i) for i in range(arguments.adapters + arguments.streams)]
        streaming = [names[i] if i % 2 == 0 else "" for i in range(arguments.streams)]
        [first_s] = await load_seconds(runtime, names[:1])
        print(f"first load of the process {first_s:.3f} s", flush=True)
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append(await measure(runtime, streaming, names[arguments.streams :]))
            print("  ".join(f"{k} {v:.3f}" for k, v in asdict(rounds[-1]).items()), flush=True)
        return first_s, rounds


def tail_seconds(tails: TailCache, scratch: Path) -> float:
    """To compute the tails of all layers of the blocks."""
    tails.directory = scratch / "tails"
    start_s = time.perf_counter()
    for name in tails.base.modules:
        if not name.endswith("lm_head"):
            tails.get(name, RANK)
    return time.perf_counter() - start_s


def peft_seconds(model_dir: Path, adapter: Path, rounds: int) -> list[float]:
    """Of PEFT's loads, with a thread on every core."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = peft_loader(model_dir, adapter)
    return [load(index) for index in range(rounds)]


def main(arguments: argparse.Namespace) -> None:
    model_dir = resolve(arguments.model)
    tails = TailCache.for_model(model_dir)
    with tempfile.TemporaryDirectory() as scratch:
        count = arguments.adapters + arguments.streams
        fingerprint = tails.base.fingerprint
        directory = adapters_dir(Path(scratch), model_dir, fingerprint, AdapterMethod.KASA, count)
        first_s, rounds = asyncio.run(run(arguments, directory))
        single = {"first_load_s": first_s, "compute_tails_s": tail_seconds(tails, Path(scratch))}
        found = {f.name: [getattr(r, f.name) for r in rounds] for f in fields(Round)}
        if arguments.peft:
            found["peft_load_s"] = peft_seconds(
                model_dir, directory / adapter_name(0), arguments.rounds
            )
            found["peft_over_load_idle"] = [
                theirs / ours
                for theirs, ours in zip(found["peft_load_s"], found["load_idle_s"], strict=True)
            ]
    spreads = {name: Spread.of(values) for name, values in found.items()}
    print("\n" + "\n".join(f"{name:26} {value:.3f}" for name, value in single.items()))
    print("\n".join(f"{name:26} {show(v, digits=3)}" for name, v in spreads.items()))
    save(arguments, found, spreads, once=single)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--executor", choices=("auto", "torch", "openvino"), default="auto")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
