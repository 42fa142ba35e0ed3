"""Thousands of requests under random schedules, each against what its version gives alone.

    python -m oracle [--seed N] [--rounds N] [--requests N] [--executor torch|openvino|both]
                     [--mode manual|auto|both]

run in tests/. A round is a schedule with a seed of its own, on a new runtime; the seed and the
schedule are printed where something is wrong, and `--seed N --rounds 1` plays it again. In auto
mode the runtime also merges and unmerges by itself, as often as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

EXECUTORS = ("torch", "openvino")
MODES = ("manual", "auto")


def main(arguments: argparse.Namespace) -> None:
    from tiny import save_tiny_chat_model

    from oracle.reference import TIE, Reference
    from oracle.run import play
    from oracle.schedule import make_schedule

    executors = EXECUTORS if arguments.executor == "both" else (arguments.executor,)
    modes = MODES if arguments.mode == "both" else (arguments.mode,)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("KASA_HOME", str(Path(scratch, "home")))
        model_dir = save_tiny_chat_model(Path(scratch, "model"))
        reference = Reference(model_dir, Path(scratch, "contents"))
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            for executor, mode in product(executors, modes):
                start_s = time.monotonic()
                settings = {"seed": seed, "num_requests": arguments.requests, "mode": mode}
                outcome = asyncio.run(play(model_dir, reference, executor, **settings))
                total += outcome.counts
                elapsed_s = time.monotonic() - start_s
                counts = ", ".join(f"{k} {v}" for k, v in sorted(outcome.counts.items()))
                run = f"seed {seed}, {executor}, {mode}"
                print(f"{run}, {elapsed_s:.0f} s: {counts}", flush=True)
                if outcome.wrong:
                    print(*make_schedule(seed, arguments.requests), *outcome.wrong, sep="\n")
                    raise SystemExit(f"{run}: {len(outcome.wrong)} wrong")
    print(
        f"all right; {total['requests with a tie']} of {total['stop'] + total['length']} requests "
        f"chose between logits within {TIE:g}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of a round")
    parser.add_argument("--executor", choices=(*EXECUTORS, "both"), default="both")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="of merging")
    main(parser.parse_args())
