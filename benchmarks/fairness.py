"""Time to the first token of a few requests for one adapter behind a flood for another, with and
without a slot for both, against the same few requests alone and at the end of the flood's own
queue. That last is where they would be if all requests had one queue, first come, first served.

python benchmarks/fairness.py [--model M] [--adapters DIR --flooded NAME --other NAME]
                              [--flood N] [--few N] [--tokens N] [--places N] [--rounds N]
                              [--json FILE]

A round has every case once, each on a runtime of its own; what goes first changes. Prints, as
median (low to high) over the rounds, the median of the few requests' seconds to the first token in
every case, the ratios between the cases, and the tokens per second of all requests.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.bench import machine, save
from benchmarks.peers.measures import Spread
from benchmarks.peers.report import show
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import GenerationRequest, SamplingParams

PROMPT = "Play the new record of the band that we heard yesterday in number"


@dataclass(frozen=True)
class Case:
    """What is asked for: `flood` requests for one adapter, then the few for `other`'s or, with
    `own`, for the same adapter; with so many adapter slots."""

    name: str
    flood: bool
    own: bool
    slots: int


CASES = (
    Case("alone", flood=False, own=False, slots=2),
    Case("one queue", flood=True, own=True, slots=2),
    Case("fair", flood=True, own=False, slots=2),
    Case("fair, one slot", flood=True, own=False, slots=1),
)
RATIOS = (("one queue", "fair"), ("one queue", "fair, one slot"), ("fair", "alone"))


@dataclass(frozen=True)
class Found:
    """Of one case: median seconds to the first token of the few, and output tokens per second of
    all."""

    first_token_s: float
    tokens_per_s: float


async def ask(runtime: Runtime, name: str, adapter: str, num_tokens: int) -> float:
    """One request; seconds to its first token."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    request = GenerationRequest(name, adapter, prompt=f"{PROMPT} {name}", sampling=sampling)
    began, first_s = time.perf_counter(), 0.0
    async for chunk in runtime.generate(request):
        if chunk.token_ids and not first_s:
            first_s = time.perf_counter() - began
    return first_s


def length(index: int, num_tokens: int) -> int:
    """Of a request of the flood: from a half to three halves of `num_tokens`, in no order."""
    return num_tokens // 2 + index * 7 % (num_tokens + 1)


async def run(case: Case, arguments: argparse.Namespace) -> Found:
    native = EngineConfig(
        max_num_seqs=arguments.places,
        max_queue=arguments.flood + arguments.few,
        max_slots=case.slots,
    )
    config = RuntimeConfig(arguments.model, arguments.adapters, native=native)
    flooded, num_tokens = arguments.flooded, arguments.tokens
    other = flooded if case.own else arguments.other
    async with await Runtime.create(config) as runtime:
        for adapter in (arguments.other, flooded):  # the flooded one has the slot, if there is one
            await ask(runtime, f"warm {adapter}", adapter, 2)
        began = time.perf_counter()
        num_flood = arguments.flood if case.flood else 0
        lengths = [length(i, num_tokens) for i in range(num_flood)]
        flood = [
            asyncio.create_task(ask(runtime, f"flood {i}", flooded, count))
            for i, count in enumerate(lengths)
        ]
        while flood and not runtime.stats().num_requests_running:
            await asyncio.sleep(0.01)
        few = [ask(runtime, f"few {i}", other, num_tokens) for i in range(arguments.few)]
        first_s = statistics.median(await asyncio.gather(*few))
        await asyncio.gather(*flood)
        elapsed_s = time.perf_counter() - began
    return Found(first_s, (sum(lengths) + arguments.few * num_tokens) / elapsed_s)


Round = Mapping[str, Found]


def report(rounds: Sequence[Round]) -> dict[str, Spread]:
    found = {}
    for case in CASES:
        found[f"{case.name}: first token, s"] = [r[case.name].first_token_s for r in rounds]
        found[f"{case.name}: tokens/s"] = [r[case.name].tokens_per_s for r in rounds]
    for above, below in RATIOS:
        found[f"first token, {above} / {below}"] = [
            r[above].first_token_s / r[below].first_token_s for r in rounds
        ]
    found["tokens/s, fair / one queue"] = [
        r["fair"].tokens_per_s / r["one queue"].tokens_per_s for r in rounds
    ]
    return {name: Spread.of(values) for name, values in found.items()}


def main(arguments: argparse.Namespace) -> None:
    print(
        f"{machine()}; {arguments.model}; {arguments.flood} requests for {arguments.flooded}, then "
        f"{arguments.few}, of about {arguments.tokens} tokens each, in {arguments.places} places"
    )
    rounds: list[Round] = []
    for index in range(arguments.rounds):
        order = CASES if index % 2 == 0 else CASES[::-1]
        found = {case.name: asyncio.run(run(case, arguments)) for case in order}
        rounds.append(found)
        each = (f"{case.name} {found[case.name].first_token_s:.2f} s" for case in CASES)
        print("  ".join(each), flush=True)
    spreads = report(rounds)
    print("\n" + "\n".join(f"{k:45} {show(v, digits=2)}" for k, v in spreads.items()))
    save(arguments, [{name: asdict(found) for name, found in r.items()} for r in rounds], spreads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--flooded", default="snips", help="the adapter that all want")
    parser.add_argument("--other", default="tickets", help="the adapter of the few")
    parser.add_argument("--flood", type=int, default=100, help="requests of the flood")
    parser.add_argument("--few", type=int, default=5, help="requests behind it")
    parser.add_argument("--tokens", type=int, default=16, help="output tokens of a request")
    parser.add_argument("--places", type=int, default=16, help="requests in one step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
