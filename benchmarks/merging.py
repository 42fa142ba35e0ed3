"""Merging an adapter into the weights of a running engine, against copying the same bytes once.

python benchmarks/merging.py [--model M] [--adapters DIR --adapter NAME] [--executor E] [--rounds N]
                             [--streams N] [--json FILE]

Every round, in turn: the bytes of the weights that the adapter changes are copied; the adapter is
merged and unmerged with nothing running; and both again while `--streams` requests stream, half of
them for the base. Prints, as median (low to high) over the rounds: seconds of the copy, of merging
and unmerging; merging over copying; the median time between tokens while nothing is changed, the
longest, the longest while merging, and that over its limit: one copy and two steps.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import numpy as np

from benchmarks.peers.bench import machine, save
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import GenerationRequest, SamplingParams

PROMPT = "The capital of France is"
QUIET_S = 2.0
"""How long the streams are watched while nothing is changed."""


@dataclass(frozen=True)
class Round:
    """Seconds; ratios have none."""

    copy_s: float
    merge_s: float
    unmerge_s: float
    merge_over_copy: float
    busy_merge_s: float
    step_s: float
    longest_gap_s: float
    longest_gap_merging_s: float
    gap_over_limit: float


def changed_bytes(model_dir: Path, adapter: Path) -> int:
    """Of the weights that the adapter changes, in float32."""
    base = BaseModel(model_dir)
    shapes = [base.modules[name] for name in checkpoint.read(adapter, base).modules]
    return sum(4 * s.out_features * s.in_features for s in shapes)


def copy_seconds(num_bytes: int) -> float:
    """Of one copy, both ends touched before: the median of five."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    found = []
    for _ in range(5):
        start_s = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - start_s)
    return statistics.median(found)


@asynccontextmanager
async def streams(runtime: Runtime, adapters: Sequence[str]) -> AsyncIterator[list[list[float]]]:
    """Requests that go on and on, one for each of `adapters` ("": the base); when the tokens of
    each came (time.perf_counter)."""
    arrivals: list[list[float]] = [[] for _ in adapters]
    sampling = SamplingParams(max_tokens=512, ignore_eos=True)

    async def stream(index: int) -> None:
        for turn in range(1_000_000):
            request = GenerationRequest(
                f"{index}/{turn}", adapters[index], PROMPT, sampling=sampling
            )
            async with aclosing(runtime.generate(request)) as chunks:
                async for chunk in chunks:
                    arrivals[index] += [time.perf_counter()] * bool(chunk.token_ids)

    tasks = [asyncio.create_task(stream(i)) for i in range(len(adapters))]
    try:
        while not all(len(found) > 3 for found in arrivals):
            await asyncio.sleep(0.01)
        yield arrivals
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def gaps(arrivals: list[list[float]], first_s: float, last_s: float) -> list[float]:
    """Between tokens of one stream, where some of it lies between two times."""
    return [
        after - before
        for found in arrivals
        for before, after in pairwise(found)
        if after > first_s and before < last_s
    ]


async def timed_merge(runtime: Runtime, adapter: str) -> tuple[float, float]:
    """When it began and ended."""
    start_s = time.perf_counter()
    await runtime.merge_adapter(adapter)
    return start_s, time.perf_counter()


async def measure(runtime: Runtime, num_bytes: int, arguments: argparse.Namespace) -> Round:
    copy_s = copy_seconds(num_bytes)
    start_s, merged_s = await timed_merge(runtime, arguments.adapter)
    await runtime.unmerge_adapter()
    unmerge_s, merge_s = time.perf_counter() - merged_s, merged_s - start_s
    adapters = [arguments.adapter if i % 2 else "" for i in range(arguments.streams)]
    async with streams(runtime, adapters) as arrivals:
        quiet_s = time.perf_counter()
        await asyncio.sleep(QUIET_S)
        busy = await timed_merge(runtime, arguments.adapter)
        await asyncio.sleep(0.2)
    await runtime.unmerge_adapter()
    quiet, merging = gaps(arrivals, quiet_s, busy[0]), gaps(arrivals, *busy)
    step_s = statistics.median(quiet)
    return Round(
        copy_s,
        merge_s,
        unmerge_s,
        merge_s / copy_s,
        busy[1] - busy[0],
        step_s,
        max(quiet),
        max(merging),
        max(merging) / (copy_s + 2 * step_s),
    )


async def run(arguments: argparse.Namespace, adapters_dir: Path) -> list[Round]:
    model_dir = resolve(arguments.model)
    num_bytes = changed_bytes(model_dir, adapters_dir / arguments.adapter)
    native = EngineConfig(executor=arguments.executor)
    config = RuntimeConfig(arguments.model, adapters_dir, native=native)
    async with await Runtime.create(config) as runtime:
        print(
            f"{machine()}; {arguments.model} on {runtime.model.executor}, {arguments.adapter}: "
            f"{num_bytes / 2**20:.0f} MiB; {arguments.streams} streams"
        )
        await runtime.load_adapter(arguments.adapter)
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append(await measure(runtime, num_bytes, arguments))
            print("  ".join(f"{k} {v:.3f}" for k, v in asdict(rounds[-1]).items()), flush=True)
        return rounds


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.adapters / arguments.adapter
        copytree(source, Path(scratch, arguments.adapter))
        rounds = asyncio.run(run(arguments, Path(scratch)))
    spreads = {f.name: Spread.of(getattr(r, f.name) for r in rounds) for f in fields(Round)}
    print("\n" + "\n".join(f"{k:22} {show(v, digits=3)}" for k, v in spreads.items()))
    save(arguments, [asdict(r) for r in rounds], spreads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--adapter", default="e2e")
    parser.add_argument("--executor", choices=("auto", "torch", "openvino"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
