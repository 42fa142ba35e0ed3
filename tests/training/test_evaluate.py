"""Generation and the three ways to ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kasa_runtime.errors import DataError
from kasa_runtime.training import evaluate
from kasa_runtime.training.config import DataSection, EvalSection
from kasa_runtime.training.data import Row, read_rows
from kasa_runtime.training.evaluate import Evaluator, generate, sample

from .making import WriteRows

DATA = DataSection(train=Path("unused"), prompt="{q} =>", completion=" {a}")


def test_batched_generation_equals_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts of other lengths beside it, and the padding they bring, change nothing."""
    prompts = [tokenizer(text)["input_ids"] for text in ("a long prompt", "b", "three", "to")]

    def run(some: Sequence[Sequence[int]], size: int) -> list[str]:
        return generate(model, tokenizer, some, max_new_tokens=10, batch_size=size)

    assert run(prompts, 4) == run(prompts, 2) == [run([prompt], 1)[0] for prompt in prompts]


def test_generation_equals_a_plain_greedy_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("some text")["input_ids"]
    got = generate(model, tokenizer, [ids], max_new_tokens=6, batch_size=1)
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert got == [tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The prompts, as text, that reach generation."""
    seen: list[str] = []

    def fake(_model: Any, _tokenizer: Any, prompts: Sequence[Sequence[int]], **_: Any) -> list[str]:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ["1"] * len(prompts)

    monkeypatch.setattr(evaluate, "generate", fake)
    return seen


def test_each_way_to_ask_has_its_prompt(
    asked: list[str],
    write_rows: WriteRows,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
) -> None:
    rows = read_rows(write_rows("test.jsonl", [{"q": "one", "a": "1"}]))
    shots = read_rows(write_rows("t.jsonl", [{"q": "two", "a": "2"}, {"q": "six", "a": "6"}]))
    settings = EvalSection(metrics=("exact_match",), few_shot=1, instruction="Count.")
    evaluator = Evaluator(DATA, settings, tokenizer, rows, seed=0)
    outcomes = [
        evaluator.adapter(model),
        evaluator.zero_shot(model),
        evaluator.few_shot(model, shots),
    ]
    assert asked == [
        "one =>",
        "<|user|>Count.\n\none =>\n<|assistant|>",
        "two => 2\none =>",
    ]
    assert [outcome.metrics for outcome in outcomes] == [{"exact_match": 100.0}] * 3


@pytest.mark.parametrize("refs", [None, [], [1], 3])
def test_bad_references_are_named_with_file_and_line(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, refs: object
) -> None:
    rows = read_rows(write_rows("test.jsonl", [{"q": "one", "refs": refs}]))
    settings = EvalSection(metrics=("exact_match",), references="refs")
    with pytest.raises(DataError, match=r"test.jsonl:1: .*want a text or a list of texts"):
        Evaluator(DATA, settings, tokenizer, rows, seed=0)


def test_sample_depends_on_the_seed_and_keeps_the_order() -> None:
    rows = [Row(Path("x"), line, {}) for line in range(30)]
    first = [row.line for row in sample(rows, 5, seed=1)]
    assert first == sorted(first) == [row.line for row in sample(rows, 5, seed=1)]
    assert len(sample(rows, 0, seed=1)) == len(sample(rows, 99, seed=1)) == 30
