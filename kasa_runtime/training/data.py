"""Rows of JSONL files -> token ids of prompt and completion -> batches.

The loss is on the completion and the end-of-sequence token alone. A row that cannot be used is an
error that names its file and line, or, where it is only too long, is left out and counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from kasa_runtime.errors import DataError
from kasa_runtime.training.config import DataSection

IGNORED = -100
"""The label of a position that has no loss."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file."""

    path: Path
    line: int
    fields: dict[str, Any]

    def render(self, template: str) -> str:
        """`template` with `{field}`s filled in. Raises DataError for a field that the row lacks."""
        try:
            return template.format_map(self.fields)
        except KeyError as error:
            raise self.error(
                f"no field {error}, which {template!r} needs; has {', '.join(self.fields)}"
            ) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise self.error(f"cannot fill in the template {template!r} ({error})") from None

    def error(self, description: str) -> DataError:
        return DataError(f"{self.path}:{self.line}: {description}")


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row. The completion ends in the end-of-sequence token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class Examples(Dataset[dict[str, list[int]]]):
    """Encoded rows, in the form that the Trainer samples from. `num_too_long` rows were left
    out."""

    def __init__(self, examples: Sequence[Example], num_too_long: int) -> None:
        self.examples = examples
        self.num_too_long = num_too_long

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        labels = [IGNORED] * len(example.prompt_ids) + list(example.completion_ids)
        return {"input_ids": [*example.prompt_ids, *example.completion_ids], "labels": labels}

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    def describe(self) -> str:
        text = f"{len(self)} rows, {self.num_tokens} tokens"
        return (
            f"{text} ({self.num_too_long} rows left out as too long)" if self.num_too_long else text
        )


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file. Raises DataError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); see the comments of run.toml on getting the data"
        ) from error
    rows = [
        Row(path, number, _parse(path, number, line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: want at least one row, found none")
    return rows


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}:{number}: want a JSON object, got {type(fields).__name__}")
    return fields


def shuffled(rows: Sequence[Row], *, seed: int, limit: int = 0) -> list[Row]:
    """The rows in an order that depends on `seed` alone; the first `limit` of them (0: all)."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:limit] if limit else order


def prompt_ids(row: Row, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a caller would send for this row, as tokens."""
    return encode_prompt(row.render(data.prompt), tokenizer, chat=data.chat, system=data.system)


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool, system: str = ""
) -> list[int]:
    """A plain prompt with the tokenizer's special tokens, or a user message through its chat
    template."""
    if not chat:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def encode(rows: Sequence[Row], data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise rows. Raises DataError for an empty completion, or where every row is longer than
    max_length."""
    examples = []
    for row in rows:
        completion = row.render(data.completion)
        if not completion.strip():
            raise row.error(f"the completion {data.completion!r} is empty")
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        examples.append(
            Example(tuple(prompt_ids(row, data, tokenizer)), (*ids, tokenizer.eos_token_id))
        )
    short = [example for example in examples if example.num_tokens <= data.max_length]
    if not short:
        raise DataError(
            f"{rows[0].path}: all {len(rows)} rows are longer than max_length = "
            f"{data.max_length} tokens; the shortest has {min(x.num_tokens for x in examples)}"
        )
    return Examples(short, len(examples) - len(short))


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right to the longest row of a batch."""

    pad_id: int

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)

        def padded(key: str, value: int) -> Tensor:
            rows = [feature[key] + [value] * (longest - len(feature[key])) for feature in features]
            return torch.tensor(rows)

        input_ids = padded("input_ids", self.pad_id)
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        attention_mask = (torch.arange(longest) < lengths[:, None]).long()
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": padded("labels", IGNORED),
        }
