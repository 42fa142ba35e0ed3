"""The engines behind one runtime, and what else serves adapters per request: KaSA on the native
engine, the same adapters on vLLM as plain LoRAs of rank r + t, PEFT's mixed batch, and
transformers without adapters. One run, the same prompts, systems that take turns, as in `peers.py`,
whose parts these are.

python benchmarks/engines.py [--concurrency N ...] [--prompt-tokens N] [--tokens N] [--rounds N]
                             [--systems S ...] [--threads N] [--model M] [--out DIR] [--cache DIR]

What truncation costs: `ours mixed / ours-lora mixed` where all adapters share a tail, `ours-vllm
mixed / ours-vllm-lora mixed` where each brings its own; -lora are plain adapters of the same rank.

Prints and writes into --out: report.md, results.json, plot.png, and rounds.jsonl as it goes. Given
the --out of an earlier run, it measures what that one lacks. Two environments are built the first
time, 4.5 GB; of those four systems with vLLM or PEFT each holds 1 to 5 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from benchmarks.peers.bench import Bench, BenchConfig
from benchmarks.peers.cases import Mix
from benchmarks.peers.report import write_report
from benchmarks.peers.systems import SYSTEMS
from kasa_runtime.base_model.source import resolve
from kasa_runtime.home import kasa_home

ENGINES = ("ours", "ours-lora", "ours-vllm", "ours-vllm-lora", "peft", "transformers")


def main(args: argparse.Namespace) -> None:
    config = BenchConfig(
        model_dir=resolve(args.model),
        out=args.out,
        cache=args.cache,
        mixes=args.mixes,
        concurrencies=args.concurrency,
        prompt_tokens=[args.prompt_tokens],
        tokens=args.tokens,
        rounds=args.rounds,
        threads=args.threads,
        timeout_s=args.timeout,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no peer is left
    with Bench(config, [SYSTEMS[name] for name in args.systems]) as bench:
        try:
            bench.measure()
        except KeyboardInterrupt:
            print(f"\ninterrupted; --out {args.out} goes on from here", flush=True)
    print(f"\n{write_report(bench.run, args.out)}\nin {args.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=ENGINES, metavar="S")
    mixes = [Mix.BASE, Mix.MERGED, Mix.MIXED]
    add("--mixes", nargs="+", choices=list(Mix), type=Mix, default=mixes, metavar="M")
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    add("--prompt-tokens", type=int, default=32, metavar="N")
    add("--tokens", type=int, default=64, metavar="N", help="new ones of each request")
    add("--rounds", type=int, default=3, metavar="N")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--model", default="smollm2-135m", help="as of `kasa serve`")
    default_out = Path(f"benchmarks/results/engines-{time.strftime('%Y-%m-%d-%H%M%S')}")
    add("--out", type=Path, default=default_out)
    add("--cache", type=Path, default=kasa_home() / "benchmarks")
    add("--timeout", type=float, default=900.0, metavar="S", help="seconds a round may take")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
