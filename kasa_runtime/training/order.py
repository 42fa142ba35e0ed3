"""The order in which a run sees its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from kasa_runtime.training.examples import Examples


class EpochOrder(Sampler[int]):
    """Rows in an order that depends on the seed and the epoch alone, so a resumed run sees what an
    unbroken one would. `epoch` is asked whenever an order is made: accelerate's loaders forget to
    pass the epoch on where they skip batches on several devices.

    Rows of like length stand together, in groups of `group` rows (a step's, over all devices) that
    are shuffled, the longest first: a batch that does not fit fails at once."""

    def __init__(
        self, examples: Examples, *, group: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = [len(example) for example in examples.examples]
        self.group, self.seed, self.epoch = group, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.group * _GROUPS_SORTED_TOGETHER
        spans = [order[start : start + span] for start in range(0, len(order), span)]
        by_length = [i for s in spans for i in sorted(s, key=lambda i: -self.lengths[i])]
        groups = [by_length[i : i + self.group] for i in range(0, len(by_length), self.group)]
        whole = [g for g in groups if len(g) == self.group]
        rest = [g for g in groups if len(g) < self.group]
        shuffle = torch.randperm(len(whole), generator=generator).tolist()
        longest = max(range(len(whole)), key=lambda g: self.lengths[whole[g][0]], default=0)
        first = [whole[longest]] if whole else []
        others = [whole[g] for g in shuffle if g != longest]
        return iter([i for g in [*first, *others, *rest] for i in g])


_GROUPS_SORTED_TOGETHER = 50
