"""The executor seam: below it, one packed batch of tokens becomes logits.

Scheduler, block manager, sampler and slots are written once above it. An executor owns the model's
weights, the KV cache and the low-rank factors of the resident adapters, and decides how they are
laid out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from kasa_runtime.adapter.kasa import Tail
    from kasa_runtime.adapter.lora import AdapterWeights

NO_SLOT = -1
"""The slot of a row without an adapter."""

Commit = Callable[[], None]
"""The cheap second half of a change of weights; runs on the step thread, between two steps."""


class TailSource(Protocol):
    """Where tails come from; reads files, so never called on the step thread."""

    def get(self, module: str, t: int) -> Tail: ...


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a packed batch: `num_tokens` new tokens after `num_computed` that are
    in the cache."""

    num_tokens: int
    num_computed: int
    block_table: Sequence[int]
    slot: int  # adapter slot or NO_SLOT

    @property
    def context_len(self) -> int:
        return self.num_computed + self.num_tokens


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All tokens of one step, sequence after sequence, without padding."""

    token_ids: Tensor  # (num_tokens,) int64
    positions: Tensor  # (num_tokens,) int64
    sequences: tuple[SequenceSlice, ...]
    logit_rows: Tensor  # (num_logits,) int64, ascending: the tokens whose logits are wanted

    @classmethod
    def pack(
        cls, token_ids: list[int], sequences: Sequence[SequenceSlice], logit_rows: list[int]
    ) -> PackedBatch:
        import torch

        positions = [p for s in sequences for p in range(s.num_computed, s.context_len)]
        return cls(
            torch.tensor(token_ids),
            torch.tensor(positions),
            tuple(sequences),
            torch.tensor(logit_rows, dtype=torch.int64),
        )


class Executor(ABC):
    """`run` and every Commit are called on the step thread; `prepare_*` on any other, one at a
    time."""

    name: str
    dtype: str
    num_blocks: int
    block_size: int  # tokens per block of the KV cache
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    num_layers: int
    num_parameters: int

    @abstractmethod
    def run(self, batch: PackedBatch) -> Tensor:
        """Logits (num_logits, vocab) float32, the caller's to change, and good until the next run;
        keys and values of the new tokens are stored in their blocks."""

    @property
    @abstractmethod
    def layers(self) -> Set[str]:
        """Those that adapters may change."""

    @abstractmethod
    def prepare_slots(
        self, contents: Mapping[int, AdapterWeights | None], tails: TailSource
    ) -> Commit:
        """Make ready the factors of adapters of `layers` in these slots, None: of nothing; the
        commit makes them current. No row of the steps meanwhile is of these slots."""

    @abstractmethod
    def prepare_merge(self, slot: int, tails: TailSource) -> Commit:
        """Make ready weights with the adapter in `slot` merged, computed from the pristine ones."""

    @abstractmethod
    def prepare_unmerge(self) -> Commit:
        """The commit makes the pristine weights current again."""

    def close(self) -> None:
        """Free the model."""
        return None
