"""Decode throughput: this engine with 8 different KaSA adapters in one batch, against transformers'
`generate` on the bare base with a batch of the same size. Same model, prompts and number of tokens;
all take turns, so that noise hits them alike. Several executors can be compared in one run.

python benchmarks/throughput.py [--model M] [--executor E ...] [--concurrency N] [--rounds N]
                                [--tokens N] [--threads N] [--device D] [--dtype T] [--json FILE]

Prints tokens per second of every round, the ratio of each pair, and the ratios' median and range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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

NUM_ADAPTERS = 8
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
    """One round: all requests at once, each with the adapter of its number ("" = base)."""

    def __init__(self, runtime: Runtime, prompts: list[list[int]], tokens: int) -> None:
        self.runtime, self.prompts, self.tokens = runtime, prompts, tokens
        self._round = 0

    async def run(self, adapters: list[str]) -> float:
        """Decode tokens per second: all tokens but the first of each request, over the time from
        the moment when every request has its first token."""
        self._round += 1
        firsts: list[float] = []
        await asyncio.gather(*(self._one(i, adapter, firsts) for i, adapter in enumerate(adapters)))
        return len(adapters) * (self.tokens - 1) / (time.perf_counter() - max(firsts))

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
    ids = torch.tensor(prompts, device=model.device)

    def seconds(n: int) -> float:
        start = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        first = seconds(1)
        return len(prompts) * (tokens - 1) / (seconds(tokens) - first)


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, PROMPT_TOKENS)
    return torch.randint(100, vocabulary, shape, generator=generator).tolist()


def serve_transformers(pipe: Connection, model_dir: Path, args: argparse.Namespace) -> None:
    """Child process: one round of the bare base for every message."""
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=args.dtype)
    model = model.to(args.device).eval()
    prompts = make_prompts(args.concurrency, model.config.vocab_size)
    pipe.send("ready")
    while pipe.recv() is not None:
        pipe.send(transformers_round(model, prompts, args.tokens))


def serve_ours(pipe: Connection, model_dir: Path, args: argparse.Namespace, executor: Any) -> None:
    """Child process: one round with the adapters of every message."""
    asyncio.run(_serve_ours(pipe, model_dir, args, executor))


async def _serve_ours(
    pipe: Connection, model_dir: Path, args: argparse.Namespace, executor: Any
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        make_adapters(Path(scratch), BaseModel(model_dir), NUM_ADAPTERS)
        native = EngineConfig(
            executor=executor, threads=args.threads, device=args.device, dtype=args.dtype
        )
        config = RuntimeConfig(str(model_dir), Path(scratch), native=native)
        async with await Runtime.create(config) as runtime:
            prompts = make_prompts(args.concurrency, runtime.model.vocab_size)
            ours = Ours(runtime, prompts, args.tokens)
            pipe.send("ready")
            while (adapters := await asyncio.to_thread(pipe.recv)) is not None:
                pipe.send(await ours.run(adapters))


class Subject:
    """A process of its own, idle between its rounds: in one process the thread pools of the two
    would slow each other down."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args))
        self.process.start()
        self.pipe.recv()

    def run(self, message: list[str]) -> float:
        self.pipe.send(message)
        return float(self.pipe.recv())

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def main(args: argparse.Namespace) -> None:
    model_dir = resolve(args.model)
    theirs = Subject(serve_transformers, model_dir, args)
    names = [f"a{i % NUM_ADAPTERS}" for i in range(args.concurrency)]
    rounds: dict[str, tuple[Subject, list[str]]] = {"transformers base": (theirs, [])}
    for executor in args.executor:
        ours = Subject(serve_ours, model_dir, args, executor)
        rounds[f"{executor} base"] = (ours, [""] * args.concurrency)
        rounds[f"{executor} {len(set(names))} mixed"] = (ours, names)
    results: dict[str, list[float]] = {name: [] for name in rounds}
    for i in range(args.rounds + 1):
        for name, (subject, adapters) in rounds.items():
            value = subject.run(adapters)
            if i:  # the first round warms up
                results[name].append(value)
                print(f"round {i}: {name:18} {value:7.1f} tokens/s", flush=True)
    for subject in {subject for subject, _ in rounds.values()}:
        subject.close()
    report(results, args)


def report(results: dict[str, list[float]], args: argparse.Namespace) -> None:
    baseline = results["transformers base"]
    print(
        f"\nconcurrency {args.concurrency}, {args.tokens} tokens, {args.threads} threads, "
        f"{args.device}, {args.dtype}"
    )
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
    parser.add_argument("--executor", nargs="+", default=["torch", "openvino"])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=EngineConfig().num_threads)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="of both; default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    main(arguments)
