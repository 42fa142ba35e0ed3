"""Greedy, batched generation with transformers, for measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    ends = [tokenizer.eos_token_id]
    if stop_at_newline:
        ends += tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _left_padded([prompts[index] for index in indices], tokenizer.eos_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        output: Any = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for index, text in zip(
            indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
        if report:
            report(start + len(indices), len(prompts))
    return texts


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, longest - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
