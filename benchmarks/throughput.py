"""Decode throughput: this engine with 8 different KaSA adapters in one batch, against transformers'
`generate` on the bare base with a batch of 8. Same model, prompts and number of tokens; the two
take turns in one process, so that noise hits both alike.

python benchmarks/throughput.py [--model M] [--rounds N] [--tokens N] [--threads N] [--json FILE]

Prints tokens per second of every round, the ratio of each pair, and the ratios' median and range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime, RuntimeConfig
from kasa_runtime.types import GenerationRequest, SamplingParams

CONCURRENCY = 8
PROMPT_TOKENS = 32


def make_adapters(root: Path, base: BaseModel, count: int, r: int = 8) -> list[str]:
    """Random KaSA adapters on all linear layers of the blocks; only their cost matters here."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    names = []
    for i in range(count):
        modules = {
            name: ModuleWeights(normal(r, s.in_features), normal(s.out_features, r), normal(r))
            for name, s in base.modules.items()
            if not name.endswith("lm_head")
        }
        meta = AdapterMeta(TruncationRule.MIN_DIM, base_fingerprint=base.fingerprint)
        names.append(f"a{i}")
        checkpoint.write(
            root / names[-1], Adapter(AdapterConfig(r, 2 * r, "all-linear"), meta, modules)
        )
    return names


class Ours:
    """One round: 8 requests at once, each with the adapter of its number ("" = base)."""

    def __init__(self, runtime: Runtime, prompts: list[list[int]], tokens: int) -> None:
        self.runtime, self.prompts, self.tokens = runtime, prompts, tokens
        self._round = 0

    async def run(self, adapters: list[str]) -> float:
        """Decode tokens per second: all tokens but the first of each request, over the time from
        the moment when every request has its first token."""
        self._round += 1
        firsts: list[float] = []
        await asyncio.gather(*(self._one(i, adapter, firsts) for i, adapter in enumerate(adapters)))
        return CONCURRENCY * (self.tokens - 1) / (time.perf_counter() - max(firsts))

    async def _one(self, i: int, adapter: str, firsts: list[float]) -> None:
        sampling = SamplingParams(max_tokens=self.tokens, ignore_eos=True)
        request = GenerationRequest(
            f"{self._round}-{i}", adapter, token_ids=tuple(self.prompts[i]), sampling=sampling
        )
        waiting = True
        async for _ in self.runtime.generate(request):
            if waiting:
                firsts.append(time.perf_counter())
                waiting = False


def transformers_round(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> float:
    """The same of `generate`: the time of 1 token is subtracted from the time of all."""
    ids = torch.tensor(prompts)

    def seconds(n: int) -> float:
        start = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
        )
        return time.perf_counter() - start

    with torch.inference_mode():
        first = seconds(1)
        return CONCURRENCY * (tokens - 1) / (seconds(tokens) - first)


async def main(args: argparse.Namespace) -> None:
    model_dir = await asyncio.to_thread(resolve, args.model)
    torch.set_num_threads(args.threads)
    bare = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    vocabulary = bare.config.vocab_size
    prompts = torch.randint(
        100, vocabulary, (CONCURRENCY, PROMPT_TOKENS), generator=generator
    ).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        names = make_adapters(Path(scratch), BaseModel(model_dir), CONCURRENCY)
        config = RuntimeConfig(
            model=str(model_dir),
            adapters_dir=Path(scratch),
            native=EngineConfig(threads=args.threads),
        )
        async with await Runtime.create(config) as runtime:
            ours = Ours(runtime, prompts, args.tokens)
            subjects: dict[str, Callable[[], Awaitable[float]]] = {
                "transformers base": lambda: asyncio.to_thread(
                    transformers_round, bare, prompts, args.tokens
                ),
                "ours base": lambda: ours.run([""] * CONCURRENCY),
                "ours 8 mixed": lambda: ours.run(names),
            }
            report(await rounds(subjects, args.rounds), args)


async def rounds(
    subjects: dict[str, Callable[[], Awaitable[float]]], count: int
) -> dict[str, list[float]]:
    """Tokens per second of every subject in every round, after one round that is not counted."""
    results: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(count + 1):
        for name, run in subjects.items():
            value = await run()
            if i:
                results[name].append(value)
                print(f"round {i}: {name:18} {value:7.1f} tokens/s", flush=True)
    return results


def report(results: dict[str, list[float]], args: argparse.Namespace) -> None:
    baseline = results["transformers base"]
    print(f"\nconcurrency {CONCURRENCY}, {args.tokens} tokens, {args.threads} threads, float32")
    for name, values in results.items():
        ratios = [v / b for v, b in zip(values, baseline, strict=True)]
        print(
            f"{name:18} median {statistics.median(values):6.1f} tokens/s, against transformers "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"tokens_per_s": results, "threads": args.threads}, indent=2)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=EngineConfig().num_threads)
    parser.add_argument("--json", type=Path)
    asyncio.run(main(parser.parse_args()))
