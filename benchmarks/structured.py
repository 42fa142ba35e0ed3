"""Decode throughput with a JSON schema against that without: the same prompts, as many tokens, the
same engine, which has both kinds of requests in turn.

python benchmarks/structured.py [--model M] [--requests N] [--tokens N] [--rounds N] [--json FILE]

A round has both kinds once; what goes first changes. Decoding counts from the moment when every
request has its first token, to the last one. The schema is an array of at least so many records
that no output ends before its tokens are counted. Prints the tokens per second of both, and their
ratio, as median (low to high) over the rounds; and what the first request with a schema took, which
reads the vocabulary and compiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.bench import machine, save
from benchmarks.peers.measures import Spread, measures
from benchmarks.peers.report import show
from kasa_runtime.runtime import Runtime, RuntimeConfig
from kasa_runtime.types import GenerationRequest, SamplingParams, StructuredOutput

PROMPT = (
    "Employees of the company, as JSON, each with name, email, age, role, city and skills. Page"
)
TEXT = {"type": "string", "maxLength": 40}
EMPLOYEE = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "email": {"type": "string", "pattern": "^[a-z.]{3,20}@[a-z]{3,10}\\.com$"},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "role": {"enum": ["engineer", "manager", "designer", "analyst"]},
        "address": {
            "type": "object",
            "properties": {"city": TEXT, "postcode": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "skills": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4},
        "since": {"type": "string", "format": "date"},
    },
    "required": ["name", "email", "age", "role", "address", "skills"],
    "additionalProperties": False,
}
SCHEMA = StructuredOutput(
    json_schema=json.dumps({"type": "array", "items": EMPLOYEE, "minItems": 1000})
)
KINDS = {"text": None, "schema": SCHEMA}


@dataclass(frozen=True)
class Found:
    """Of one round."""

    text: float  # tokens per second
    schema: float


async def ask(
    runtime: Runtime, name: str, form: StructuredOutput | None, num_tokens: int
) -> list[float]:
    """When each token came."""
    sampling = SamplingParams(
        max_tokens=num_tokens, ignore_eos=True, temperature=0.7, seed=hash(name) & 0xFFFF
    )
    request = GenerationRequest(
        name, prompt=f"{PROMPT} {name}:\n", sampling=sampling, structured_output=form
    )
    token_s: list[float] = []
    async for chunk in runtime.generate(request):
        token_s += [time.perf_counter()] * len(chunk.token_ids)
    assert len(token_s) == num_tokens, f"{name} ended after {len(token_s)} tokens"
    return token_s


async def throughput(
    runtime: Runtime, form: StructuredOutput | None, arguments: argparse.Namespace
) -> float:
    asked = (ask(runtime, f"{i}", form, arguments.tokens) for i in range(arguments.requests))
    token_s = await asyncio.gather(*asked)
    return measures(token_s, peak_rss_bytes=0, resident_bytes=0).decode_tokens_per_s


async def run(arguments: argparse.Namespace) -> tuple[list[Found], float]:
    """The rounds, and how long the first token of the first request with a schema took."""
    rounds: list[Found] = []
    with tempfile.TemporaryDirectory() as nothing:
        async with await Runtime.create(RuntimeConfig(arguments.model, Path(nothing))) as runtime:
            await throughput(runtime, None, arguments)
            began = time.perf_counter()
            [first] = await ask(runtime, "first", SCHEMA, 1)
            for index in range(arguments.rounds):
                order = list(KINDS) if index % 2 == 0 else list(KINDS)[::-1]
                found = {kind: await throughput(runtime, KINDS[kind], arguments) for kind in order}
                rounds.append(Found(**found))
                print(f"text {found['text']:.1f}  schema {found['schema']:.1f}", flush=True)
    return rounds, first - began


def report(rounds: Sequence[Found]) -> dict[str, Spread]:
    return {
        "text, tokens/s": Spread.of([r.text for r in rounds]),
        "schema, tokens/s": Spread.of([r.schema for r in rounds]),
        "schema / text": Spread.of([r.schema / r.text for r in rounds]),
    }


def main(arguments: argparse.Namespace) -> None:
    print(f"{machine()}; {arguments.model}; {arguments.requests} x {arguments.tokens} tokens")
    rounds, first_s = asyncio.run(run(arguments))
    spreads = report(rounds)
    print(f"first request with a schema, s      {first_s:.2f}")
    print("\n".join(f"{name:35} {show(value, digits=2)}" for name, value in spreads.items()))
    save(arguments, [vars(r) for r in rounds], spreads, first_s=first_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--requests", type=int, default=8, help="at the same time")
    parser.add_argument("--tokens", type=int, default=96, help="of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
