"""KaSA Runtime's embedded engine against its peers on this machine's CPU, in one run: all systems
hold the same model, each in a process and an environment of its own, and take turns, so that noise
hits them alike. All get the same token ids at once and generate the same number of tokens,
greedily, in float32 (but those that are named int8).

python benchmarks/peers.py [--short] [--systems S ...] [--mixes M ...] [--concurrency N ...]
                           [--prompt-tokens N ...] [--tokens N] [--rounds N] [--threads N]
                           [--ours NAME FIELD=VALUE ...] [--model M] [--out DIR] [--cache DIR]

Prints and writes into --out: report.md, results.json, plot.png, and rounds.jsonl as it goes. Given
the --out of an earlier run, it measures what that one lacks. Ctrl-C reports what there is.
"Resident" is what a system's processes hold after a round, peak RSS the most since it began.

On two cores --short takes 80 s. The first time it builds three environments and converts the model,
another 2.5 minutes where wheels come fast, and 4 GB on disk. vLLM's takes 3.4 GB; llama.cpp is
compiled, 8 minutes. A system whose environment cannot be built is skipped; the report says why.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.bench import Bench, BenchConfig
from benchmarks.peers.cases import Mix
from benchmarks.peers.report import write_report
from benchmarks.peers.systems import SYSTEMS, ours
from kasa_runtime.base_model.source import resolve
from kasa_runtime.home import kasa_home

FULL: dict[str, Any] = {
    "systems": [
        "ours",
        "transformers",
        "peft",
        "vllm",
        "vllm-lora",
        "openvino-genai",
        "llama.cpp",
    ],
    "mixes": list(Mix),
    "concurrency": [1, 8, 32],
    "prompt_tokens": [32, 256],
    "tokens": 64,
    "rounds": 5,
}
SHORT: dict[str, Any] = {
    "systems": ["ours", "transformers", "openvino-genai"],
    "mixes": [Mix.BASE, Mix.MERGED, Mix.MIXED],
    "concurrency": [1, 8],
    "prompt_tokens": [32],
    "tokens": 32,
    "rounds": 3,
}


def main(args: argparse.Namespace) -> None:
    systems = [SYSTEMS[name] for name in args.systems]
    systems += [ours(f"ours-{name}", dict(map(engine_field, rest))) for name, *rest in args.ours]
    config = BenchConfig(
        model_dir=resolve(args.model),
        out=args.out,
        cache=args.cache,
        mixes=args.mixes,
        concurrencies=args.concurrency,
        prompt_tokens=args.prompt_tokens,
        tokens=args.tokens,
        rounds=args.rounds,
        threads=args.threads,
        timeout_s=args.timeout,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no peer is left
    with Bench(config, systems) as bench:
        interrupted = False
        try:
            bench.measure()
        except KeyboardInterrupt:
            interrupted = True
            print(f"\ninterrupted; --out {args.out} goes on from here", flush=True)
    print(f"\n{write_report(bench.run, args.out)}\nin {args.out}")
    if interrupted:
        raise SystemExit(128 + signal.SIGINT)


def engine_field(text: str) -> tuple[str, Any]:
    """`threads=2` -> ("threads", 2): a field of EngineConfig; what is no number is text."""
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--short", action="store_true", help="what `make bench` runs")
    add("--systems", nargs="+", choices=SYSTEMS, metavar="S", help=f"of {', '.join(SYSTEMS)}")
    add("--mixes", nargs="+", choices=list(Mix), type=Mix, metavar="M", help=", ".join(Mix))
    add("--concurrency", nargs="+", type=positive, metavar="N", help="requests at once")
    add("--prompt-tokens", nargs="+", type=positive, metavar="N")
    add("--tokens", type=positive, metavar="N", help="new ones of each request, at least 2")
    add("--rounds", type=positive, metavar="N")
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N")
    add(
        "--ours",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FIELD=VALUE"),
        help="one more of ours, called ours-NAME, with these fields of EngineConfig",
    )
    add("--model", default="smollm2-135m", help="as of `kasa serve`")
    add(
        "--out",
        type=Path,
        default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d-%H%M%S')}"),
        help="directory of the results; that of an earlier run: go on with it",
    )
    add(
        "--cache",
        type=Path,
        default=kasa_home() / "benchmarks",
        help="where environments, converted models and adapters are kept",
    )
    add("--timeout", type=float, default=900.0, metavar="S", help="seconds a round may take")
    args = parser.parse_args()
    for name, value in (SHORT if args.short else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.tokens < 2:
        parser.error("--tokens: want at least 2, for the first is not decoded")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"want a number of at least 1, got {number}")
    return number


if __name__ == "__main__":
    main(parse())
