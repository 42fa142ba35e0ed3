"""What integer weights cost in quality: perplexity of the answers, and the share of greedy tokens
that stay the same, of the base and of adapters, against float32 on the same rows.

python benchmarks/quantization.py [--data NAME[=FILE] ...] [--quantization Q ...] [--rows N]
                                  [--tokens N] [--model M] [--threads N] [--json FILE]

Q is int8 or int4, with activations rounded too, or int8/float32 or int4/float32, without.

NAME is an adapter of this repository, trained by examples/NAME/run.toml, which also says how rows
become prompts; FILE has its test rows where they are not beside it. Perplexity is over the tokens
of the answers; the standard error of its change is that of paired rows. Agreement is over the
first N tokens of each answer, or up to where float32 ends it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import fold
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.factory import make_executor
from kasa_runtime.engine.native.executor import NO_SLOT, Executor, PackedBatch, SequenceSlice
from kasa_runtime.training import reader
from kasa_runtime.training.rows import Row, read_rows

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16


@dataclass(frozen=True)
class Task:
    """Prompts and answers as token ids, and the slot of the adapter that was trained for them."""

    name: str
    slot: int
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Measured:
    losses: Tensor  # (rows,) nats
    num_tokens: Tensor  # (rows,) of the answers
    greedy: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.sum() / self.num_tokens.sum()))

    def change(self, want: Measured) -> tuple[float, float]:
        """Of the perplexity, relative to `want`'s, and its standard error."""
        by_row, total = self.losses - want.losses, self.num_tokens.sum()
        mean = by_row.sum() / total
        error = (by_row - mean * self.num_tokens).norm() / total
        return math.expm1(float(mean)), float(error)

    def agreement(self, want: list[list[int]]) -> float:
        """The share of the tokens in `want` that are the same here."""
        pairs = [p for f, w in zip(self.greedy, want, strict=True) for p in zip(f, w, strict=False)]
        return sum(found == wanted for found, wanted in pairs) / sum(map(len, want))


def load_task(spec: str, slot: int, tokenizer: Any, num_rows: int) -> Task:
    name, _, file = spec.partition("=")
    config = reader.load(
        ROOT / "examples" / name / "run.toml", [f"data.test={file}"] if file else []
    )
    assert config.data.test is not None
    rows = read_rows(config.data.test)
    rows = rows[:: max(1, len(rows) // num_rows)][:num_rows]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [ids(row.render(config.data.prompt)) for row in rows]
    answers = [[*ids(answer(row, config.data.completion)), tokenizer.eos_token_id] for row in rows]
    return Task(name, slot, prompts, answers)


def answer(row: Row, template: str) -> str:
    """The first of several, where a row has a list of them."""
    first = {"ref": row.fields["refs"][0]} if "refs" in row.fields else {}
    return row.render(template, **first)


def load_adapters(executor: Executor, base: BaseModel, tasks: list[Task]) -> None:
    tails = TailCache(base)
    for task in tasks:
        adapter = checkpoint.read(ROOT / "adapters" / task.name, base)
        executor.prepare_slots({task.slot: fold(adapter, f"{task.name}@1")}, tails)()


def measure(executor: Executor, task: Task, slot: int, num_tokens: int) -> Measured:
    losses, greedy = list[float](), list[list[int]]()
    for i in range(0, len(task.prompts), BATCH):
        prompts, answers = task.prompts[i : i + BATCH], task.answers[i : i + BATCH]
        losses += [
            negative_log_likelihood(executor, *p, slot) for p in zip(prompts, answers, strict=True)
        ]
        greedy += generate(executor, prompts, slot, num_tokens)
    lengths = torch.tensor([len(answer) for answer in task.answers])
    return Measured(torch.tensor(losses), lengths, greedy)


def negative_log_likelihood(
    executor: Executor, prompt: list[int], answer: list[int], slot: int
) -> float:
    """Of all tokens of the answer together, in nats."""
    logits = step(executor, [[*prompt, *answer[:-1]]], [0], slot, num_rows=len(answer))
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return -float(chosen.sum())


def generate(
    executor: Executor, prompts: list[list[int]], slot: int, num_tokens: int
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to its end of sequence."""
    new, computed, found = prompts, [0] * len(prompts), [list[int]() for _ in prompts]
    for _ in range(num_tokens):
        drawn = step(executor, new, computed, slot).argmax(-1).tolist()
        computed = [c + len(n) for c, n in zip(computed, new, strict=True)]
        new = [[token] for token in drawn]
        for own, token in zip(found, drawn, strict=True):
            if not own or own[-1] not in executor.eos_ids:
                own.append(token)
    return found


def step(
    executor: Executor, new: list[list[int]], computed: list[int], slot: int, num_rows: int = 1
) -> Tensor:
    """Logits of the last `num_rows` of each sequence's new tokens; every sequence has as many
    blocks of the cache as the longest may ever need."""
    width = executor.num_blocks // BATCH
    parts = [
        SequenceSlice(len(tokens), before, range(i * width, (i + 1) * width), slot)
        for i, (tokens, before) in enumerate(zip(new, computed, strict=True))
    ]
    ends = torch.tensor([len(tokens) for tokens in new]).cumsum(0)
    rows = [row for end in ends.tolist() for row in range(end - num_rows, end)]
    return executor.run(PackedBatch.pack([t for tokens in new for t in tokens], parts, rows))


def main(args: argparse.Namespace) -> None:
    model_dir = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tasks = [load_task(spec, i, tokenizer, args.rows) for i, spec in enumerate(args.data)]
    cases = {
        f"{task.name}, {who}": (task, slot)
        for task in tasks
        for who, slot in (("base", NO_SLOT), ("adapter", task.slot))
    }
    found: dict[str, dict[str, Measured]] = {}
    for spec in ("none", *args.quantization):
        quantization, _, activations = spec.partition("/")
        config = EngineConfig(
            executor="openvino",
            quantization=quantization,
            activations=activations or "int8",
            threads=args.threads,
            max_num_seqs=BATCH,
            max_model_len=1024,
        )
        executor = make_executor(model_dir, config)
        load_adapters(executor, BaseModel(model_dir), tasks)
        found[spec] = {
            case: measure(executor, task, slot, args.tokens) for case, (task, slot) in cases.items()
        }
        executor.close()
        report(spec, found)
    if args.json:
        args.json.write_text(json.dumps(summary(found), indent=2))


def report(spec: str, found: dict[str, dict[str, Measured]]) -> None:
    for case, values in summary(found)[spec].items():
        print(
            f"{spec:12} {case:18} perplexity {values['perplexity']:8.4f} "
            f"({values['change']:+.2%} ± {values['error']:.2%})   "
            f"agreement {values['agreement']:.1%}",
            flush=True,
        )


def summary(found: dict[str, dict[str, Measured]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        spec: {
            case: {
                "perplexity": one.perplexity,
                **dict(zip(("change", "error"), one.change(found["none"][case]), strict=True)),
                "agreement": one.agreement(found["none"][case].greedy),
            }
            for case, one in cases.items()
        }
        for spec, cases in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", default=["tickets"], metavar="NAME[=FILE]")
    parser.add_argument("--quantization", nargs="+", default=["int8", "int4"])
    parser.add_argument("--rows", type=int, default=100, help="of each test set, evenly spaced")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=EngineConfig().num_threads)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
