"""Who takes part in the next step, and with how many tokens.

First come, first served. Running sequences go first, each with its pending tokens; what is left of
the token budget admits waiting ones, in chunks if a prompt is longer than the rest. When the cache
is full the sequence that came last gives its blocks back and recomputes later, so the oldest always
finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kasa_runtime.engine.native.block_manager import BlockManager
from kasa_runtime.engine.native.executor import PackedBatch, SequenceSlice
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.types import FinishReason


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The sequences of a step, each with the number of its tokens to compute."""

    entries: tuple[tuple[Sequence, int], ...]

    @property
    def sampling(self) -> list[Sequence]:
        """Those whose last token is in the step, so that the next one can be sampled."""
        return [s for s, num_tokens in self.entries if num_tokens == s.num_pending]

    def pack(self) -> PackedBatch:
        token_ids: list[int] = []
        slices, logit_rows = [], []
        for seq, num_tokens in self.entries:
            token_ids += seq.token_ids[seq.num_computed : seq.num_computed + num_tokens]
            slices.append(SequenceSlice(num_tokens, seq.num_computed, seq.block_table, seq.slot))
            if num_tokens == seq.num_pending:
                logit_rows.append(len(token_ids) - 1)
        return PackedBatch.pack(token_ids, slices, logit_rows)


class Scheduler:
    """Waiting and running sequences, over a block manager. Step thread only."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def expired(self, now_s: float) -> list[tuple[Sequence, FinishReason]]:
        """Sequences that must not go on: cancelled, or past their deadline."""
        found = []
        for seq in (*self.running, *self.waiting):
            deadline_s = seq.request.deadline_s
            if seq.cancelled:
                found.append((seq, FinishReason.CANCELLED))
            elif deadline_s is not None and now_s >= deadline_s:
                found.append((seq, FinishReason.DEADLINE))
        return found

    def schedule(self, now_s: float) -> ScheduledBatch:
        """The next step; empty only when there is no work."""
        entries: list[tuple[Sequence, int]] = []
        preemptions = self.num_preemptions
        budget = self._schedule_running(entries, self._budget)
        if self.num_preemptions == preemptions:  # else the one sent away would come straight back
            self._admit(entries, budget, now_s)
        return ScheduledBatch(tuple(entries))

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        self.blocks.free(seq.block_table)
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def _schedule_running(self, entries: list[tuple[Sequence, int]], budget: int) -> int:
        for seq in tuple(self.running):
            if seq not in self.running or budget == 0:
                continue
            num_tokens = min(seq.num_pending, budget)
            if self._make_room(seq, seq.num_computed + num_tokens):
                self.blocks.grow(seq.block_table, seq.num_computed + num_tokens)
                entries.append((seq, num_tokens))
                budget -= num_tokens
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Preempt from the youngest on until `seq` can grow; False if `seq` itself had to go."""
        while not self.blocks.can_grow(seq.block_table, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq.block_table)
        seq.num_computed = 0
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self, entries: list[tuple[Sequence, int]], budget: int, now_s: float) -> None:
        while self.waiting and budget and len(self.running) < self._max_num_seqs:
            seq = self.waiting[0]
            num_tokens = min(seq.num_pending, budget)
            if not self.blocks.can_grow(seq.block_table, num_tokens):
                return
            self.blocks.grow(seq.block_table, num_tokens)
            self.running.append(self.waiting.popleft())
            if seq.scheduled_s is None:
                seq.scheduled_s = now_s
            entries.append((seq, num_tokens))
            budget -= num_tokens
