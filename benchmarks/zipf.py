"""Many adapters against few: a thousand are registered, and requests are for a hundred of them, or
for eight, by Zipf's law, with slots for sixteen.

python benchmarks/zipf.py --adapters DIR [--model M] [--executor E] [--concurrency N]
                          [--requests N] [--tokens N] [--rounds N] [--json FILE]

DIR is filled the first time, and kept: with KaSA adapters of rank 8 on all linear layers, and for
the names that nobody asks for on query and value projections alone. `--concurrency` clients send
one request after another, of 32 prompt tokens. A round has both sides, in turn; one round before is
not counted. Prints output tokens per second of both and their ratio, as median (low to high).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.adapters import adapters_dir
from benchmarks.peers.bench import machine, save
from benchmarks.peers.cases import FIRST_TOKEN_ID, adapter_name, zipf_choice
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from benchmarks.registry import write_adapters
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import AdapterMethod, GenerationRequest, SamplingParams

NUM_REGISTERED, MANY, FEW = 1000, 100, 8
PROMPT_TOKENS = 32


def registered(directory: Path, model_dir: Path) -> Path:
    """A directory of NUM_REGISTERED adapters."""
    base = BaseModel(model_dir)
    root = adapters_dir(directory, model_dir, base.fingerprint, AdapterMethod.KASA, MANY)
    missing = NUM_REGISTERED - sum(
        (path / "adapter_config.json").exists() for path in root.iterdir()
    )
    if missing > 0:
        write_adapters(root, base, missing)
    return root


def requests(
    arguments: argparse.Namespace, num_adapters: int, seed: int
) -> Iterator[GenerationRequest]:
    generator = random.Random(seed)
    sampling = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
    for index, adapter in enumerate(zipf_choice(arguments.requests, num_adapters, generator)):
        ids = generator.choices(range(FIRST_TOKEN_ID, 40_000), k=PROMPT_TOKENS)
        yield GenerationRequest(
            f"{num_adapters}/{seed}/{index}",
            adapter_name(adapter),
            token_ids=tuple(ids),
            sampling=sampling,
        )


async def tokens_per_s(
    runtime: Runtime, waiting: Iterator[GenerationRequest], clients: int
) -> float:
    """Of all requests, sent by so many clients."""
    num_tokens, start_s = 0, time.perf_counter()

    async def client() -> None:
        nonlocal num_tokens
        for request in waiting:
            async for chunk in runtime.generate(request):
                num_tokens += len(chunk.token_ids)

    await asyncio.gather(*(client() for _ in range(clients)))
    return num_tokens / (time.perf_counter() - start_s)


async def run(arguments: argparse.Namespace, directory: Path) -> dict[str, list[float]]:
    native = EngineConfig(executor=arguments.executor)
    config = RuntimeConfig(arguments.model, directory, native=native)
    found: dict[str, list[float]] = {"many": [], "few": [], "many / few": []}
    async with await Runtime.create(config) as runtime:
        while len(runtime.list_adapters()) < NUM_REGISTERED:  # new ones are taken in beside serving
            await asyncio.sleep(0.1)
        print(
            f"{machine()}; {arguments.model} on {runtime.model.executor}; "
            f"{NUM_REGISTERED} adapters, {native.max_slots} slots, {arguments.concurrency} clients",
            flush=True,
        )
        for index in range(arguments.rounds + 1):
            speed = {}
            for num in (MANY, FEW) if index % 2 else (FEW, MANY):
                load = requests(arguments, num, index)
                speed[num] = await tokens_per_s(runtime, load, arguments.concurrency)
            if index:
                values = (speed[MANY], speed[FEW], speed[MANY] / speed[FEW])
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
                print("  ".join(f"{k} {v[-1]:.3f}" for k, v in found.items()), flush=True)
    return found


def main(arguments: argparse.Namespace) -> None:
    directory = registered(arguments.adapters, resolve(arguments.model))
    found = asyncio.run(run(arguments, directory))
    spreads = {name: Spread.of(values) for name, values in found.items()}
    print("\n" + "\n".join(f"{name:12} {show(v, digits=3)}" for name, v in spreads.items()))
    save(arguments, found, spreads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--executor", choices=("auto", "torch", "openvino"), default="auto")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
