"""Token ids of rows, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""The label of a position that has no loss."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. `labels`: per token its own id or IGNORED (causal tasks), or one number or
    class index (encoders). `positions` counts from 0 in each of the packed sequences; empty where
    nothing is packed."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | int | float
    positions: tuple[int, ...] = ()
    token_type_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class Examples(Dataset[dict[str, Any]]):
    """Encoded rows, in the form that the Trainer samples from. `num_too_long` rows were left
    out."""

    def __init__(
        self, examples: Sequence[Example], *, num_rows: int, num_too_long: int = 0
    ) -> None:
        self.examples = examples
        self.num_rows = num_rows  # that are in the examples; packing puts several into one
        self.num_too_long = num_too_long

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "example": example}

    @property
    def num_tokens(self) -> int:
        return sum(len(example) for example in self.examples)

    def describe(self) -> str:
        text = f"{self.num_rows} rows, {self.num_tokens} tokens"
        if len(self) != self.num_rows:
            text += f" in {len(self)} sequences"
        if self.num_too_long:
            text += f" ({self.num_too_long} rows left out as too long)"
        return text


def packed(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Several examples in one sequence, first fit in their order, so that little of a batch is
    padding. Positions start anew for each, and no token attends to another example's."""
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        open_bins = range(max(0, len(bins) - _OPEN_BINS), len(bins))
        index = next((i for i in open_bins if room[i] >= len(example)), None)
        if index is None:
            bins.append([])
            room.append(max_length)
            index = len(bins) - 1
        bins[index].append(example)
        room[index] -= len(example)
    return [_joined(group) for group in bins]


_OPEN_BINS = 64
"""How many unfinished sequences packing looks at: it stays linear in the number of rows."""


def _joined(group: Sequence[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in group:
        assert isinstance(example.labels, tuple)
        ids += example.input_ids
        labels += (IGNORED, *example.labels[1:])  # what stands before it is another example's
        positions += range(len(example))
    return Example(tuple(ids), tuple(labels), tuple(positions))


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right to the longest sequence of a batch."""

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        examples: list[Example] = [feature["example"] for feature in features]
        longest = max(map(len, examples))
        batch = {
            "input_ids": _padded([e.input_ids for e in examples], longest, self.pad_id),
            "labels": self._labels(examples, longest),
        }
        if any(e.token_type_ids for e in examples):
            batch["token_type_ids"] = _padded([e.token_type_ids for e in examples], longest, 0)
        if any(e.positions for e in examples):
            # Without a mask, transformers tells packed sequences apart by their positions; padding
            # is one more of them.
            batch["position_ids"] = torch.stack([_positions(e, longest) for e in examples])
        else:
            lengths = torch.tensor([len(e) for e in examples])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch

    def _labels(self, examples: Sequence[Example], longest: int) -> Tensor:
        if isinstance(examples[0].labels, tuple):
            return _padded([e.labels for e in examples], longest, IGNORED)  # type: ignore[misc]
        return torch.tensor([e.labels for e in examples])


def _padded(rows: Sequence[Sequence[int]], longest: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _positions(example: Example, longest: int) -> Tensor:
    positions = example.positions or tuple(range(len(example)))
    return torch.tensor([*positions, *range(longest - len(example))])
