"""Greedy, batched generation with transformers, for measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_at_newline: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy continuations of `prompts` (token ids), in their order, without white space around
    them."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    texts = [""] * len(prompts)
    ends = _ends(model, tokenizer)
    if stop_at_newline:
        ends += tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
    )
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _left_padded([prompts[index] for index in indices], tokenizer.eos_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with _alone(model, settings):
            output: Any = model.generate(**batch)  # type: ignore[operator]
        new = output[:, batch["input_ids"].shape[1] :]
        for index, text in zip(
            indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
        if report:
            report(start + len(indices), len(prompts))
    return texts


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and the model's own (the end of a turn)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


@contextlib.contextmanager
def _alone(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`settings` and nothing else: what they leave open, transformers takes from the model, such as
    a repetition penalty."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, longest - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
