"""What a model says on held-out rows: greedy, batched generation, and its metrics.

The base model is given two fair chances: zero-shot, with an instruction through its chat template,
and few-shot, with training rows before the prompt. The adapter sees the prompt alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.training.config import DataSection, EvalSection
from kasa_runtime.training.data import Row, encode_prompt, prompt_ids
from kasa_runtime.training.metrics import References, score

Report = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The metrics of one way to prompt, and what was generated."""

    metrics: dict[str, float]
    predictions: list[str]


class Evaluator:
    """The held-out rows of a run, and how a model is asked about them."""

    def __init__(
        self,
        data: DataSection,
        settings: EvalSection,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        *,
        seed: int,
    ) -> None:
        self.data, self.settings, self.tokenizer = data, settings, tokenizer
        self.rows = sample(rows, settings.rows, seed=seed)
        self.references: References = [self._references(row) for row in self.rows]

    def adapter(self, model: PreTrainedModel, report: Report | None = None) -> Outcome:
        """The prompt as the adapter was trained on it."""
        prompts = [prompt_ids(row, self.data, self.tokenizer) for row in self.rows]
        return self._outcome(model, prompts, stop_at_newline=False, report=report)

    def zero_shot(self, model: PreTrainedModel, report: Report | None = None) -> Outcome:
        """The instruction and the prompt as a user message; the prompt alone for a model without a
        chat template."""
        prompts = []
        for row in self.rows:
            text = row.render(self.data.prompt)
            if self.settings.instruction:
                text = f"{self.settings.instruction}\n\n{text}"
            chat = bool(self.tokenizer.chat_template)
            prompts.append(encode_prompt(text, self.tokenizer, chat=chat, system=self.data.system))
        return self._outcome(model, prompts, stop_at_newline=True, report=report)

    def few_shot(
        self, model: PreTrainedModel, train: Sequence[Row], report: Report | None = None
    ) -> Outcome:
        """`few_shot` rows of `train`, the same for every prompt, each on a line of its own before
        it."""
        shots = "".join(
            f"{row.render(self.data.prompt)}{row.render(self.data.completion)}\n"
            for row in train[: self.settings.few_shot]
        )
        texts = [shots + row.render(self.data.prompt) for row in self.rows]
        prompts = [encode_prompt(text, self.tokenizer, chat=False) for text in texts]
        return self._outcome(model, prompts, stop_at_newline=True, report=report)

    def _references(self, row: Row) -> list[str]:
        field = self.settings.references
        if not field:
            return [row.render(self.data.completion).strip()]
        value = row.fields.get(field)
        texts = [value] if isinstance(value, str) else value
        if not texts or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise row.error(
                f"[eval] references: want a text or a list of texts in {field!r}, got {value!r}"
            )
        return texts

    def _outcome(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        stop_at_newline: bool,
        report: Report | None,
    ) -> Outcome:
        texts = generate(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            stop_at_newline=stop_at_newline,
            report=report,
        )
        return Outcome(score(self.settings.metrics, texts, self.references), texts)


def sample(rows: Sequence[Row], count: int, *, seed: int) -> list[Row]:
    """`count` rows drawn with `seed`, in file order; all rows for 0."""
    if not 0 < count < len(rows):
        return list(rows)
    chosen = random.Random(seed).sample(range(len(rows)), count)
    return [rows[index] for index in sorted(chosen)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_at_newline: bool = False,
    report: Report | None = None,
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
