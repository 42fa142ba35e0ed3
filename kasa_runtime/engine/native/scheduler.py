"""Who takes part in the next step, and with how many tokens.

Every running sequence that decodes gets its token in every step. What is left of the token budget
goes to prompts, in the order in which they were admitted, in chunks if they are longer; while
others decode, only so much of it that they do not wait long. A prompt's beginning that is in the
cache is not computed again, as far as no logits of it are wanted: those of its last token always
are, those before it where log-probabilities of the prompt are. When the cache is full the sequence
that was admitted last gives its blocks back and recomputes later, before others are admitted, so
the one admitted first always finishes.

Who is admitted next is fair between clients (`fair_queue.py`): of the client that got the fewest
tokens, its oldest request. So every request waits a bounded time. Let its client's counter be `c`
when it is admitted, and the smallest counter of those waiting have been `v` when it came: at most
`c - v + 1` requests of each other client are admitted in between, one if its client was idle
before. The sequence that was admitted first has tokens in every step, so in as many steps as the
context has tokens one ends: with `n` admitted in between, a request waits for at most
`(max_num_seqs + n) * context_length` steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kasa_runtime.engine.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from kasa_runtime.engine.native.block_manager import BlockManager
from kasa_runtime.engine.native.executor import PackedBatch, SequenceSlice
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.types import FinishReason

MAX_SCORED_TOKENS = 256
"""Most prompt tokens of a step that give log-probabilities: the logits of each are as many as the
vocabulary has tokens."""


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
            first = len(token_ids) - num_tokens - seq.num_computed
            logit_rows += [first + position for position in seq.scoring(num_tokens)]
            if num_tokens == seq.num_pending:
                logit_rows.append(len(token_ids) - 1)
        return PackedBatch.pack(token_ids, slices, logit_rows)


class Scheduler:
    """Waiting and running sequences, over a block manager. Step thread only."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # prompt tokens looked for in the cache
        self.prefix_cache_hits = 0  # and found
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._max_prefill_tokens = max_prefill_tokens or max_num_batched_tokens
        self._prefix_caching = prefix_caching
        self._preempted: deque[Sequence] = deque()  # in order of admission, all before the queue
        self._queue: FairQueue[Sequence] = FairQueue()

    def add(self, seq: Sequence) -> None:
        self._queue.push(seq.request.client, seq)

    @property
    def waiting(self) -> list[Sequence]:
        """The preempted ones first, then client by client."""
        return [*self._preempted, *self._queue]

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._preempted or self._queue)

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
        budget = self._schedule_running(entries, self._prefill_budget())
        if self.num_preemptions == preemptions:  # else the one sent away would come straight back
            self._admit(entries, budget, now_s)
        return ScheduledBatch(tuple(entries))

    def computed(self, batch: ScheduledBatch) -> None:
        """The batch has run: its keys and values are in the cache, full blocks for all to find."""
        for seq, num_tokens in batch.entries:
            if num_tokens == seq.num_pending:
                self._queue.charge(seq.request.client, OUTPUT_WEIGHT)
            seq.num_computed += num_tokens
            if self._prefix_caching:
                self._publish(seq)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        self.blocks.free(seq.block_table)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self._preempted:
            self._preempted.remove(seq)
        else:
            self._queue.remove(seq.request.client, seq)

    def _prefill_budget(self) -> int:
        """Prompt tokens of the next step."""
        num_decoding = sum(seq.num_pending == 1 for seq in self.running)
        budget = self._budget - num_decoding
        return min(budget, self._max_prefill_tokens) if num_decoding else budget

    def _schedule_running(self, entries: list[tuple[Sequence, int]], budget: int) -> int:
        """Returns what is left of the budget of prompt tokens."""
        for seq in self.running:  # which may lose its end on the way
            decodes = seq.num_pending == 1
            num_tokens = 1 if decodes else self._chunk(seq, budget, entries)
            if num_tokens and self._make_room(seq, seq.num_computed + num_tokens):
                self.blocks.grow(seq.block_table, seq.num_computed + num_tokens)
                entries.append((seq, num_tokens))
                budget -= 0 if decodes else num_tokens
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Preempt, the last admitted first, until `seq` can grow; False if it had to go itself."""
        while not self.blocks.can_grow(seq.block_table, num_tokens):
            victim = self.running.pop()
            self._take_blocks(victim)
            self._preempted.appendleft(victim)
            self.num_preemptions += 1
            if victim is seq:
                return False
        return True

    def _admit(self, entries: list[tuple[Sequence, int]], budget: int, now_s: float) -> None:
        while budget and len(self.running) < self._max_num_seqs:
            seq = self._next()
            if seq is None:
                return
            if self._prefix_caching:
                self._share_prefix(seq)
            num_tokens = self._chunk(seq, budget, entries)
            has_room = self.blocks.can_grow(seq.block_table, seq.num_computed + num_tokens)
            if not num_tokens or not has_room:
                self._take_blocks(seq)
                return
            self.blocks.grow(seq.block_table, seq.num_computed + num_tokens)
            self.running.append(seq)
            if self._preempted:
                self._preempted.popleft()
            else:
                self._queue.pop(seq.request.client)
                self._first_scheduled(seq, now_s)
            entries.append((seq, num_tokens))
            budget -= num_tokens

    def _chunk(self, seq: Sequence, budget: int, entries: list[tuple[Sequence, int]]) -> int:
        """How many tokens of a prompt are computed beside `entries`."""
        num_tokens = min(seq.num_pending, budget)
        if wanted := seq.scoring(num_tokens):
            room = MAX_SCORED_TOKENS - sum(len(other.scoring(n)) for other, n in entries)
            if len(wanted) > room:
                return wanted[room] - seq.num_computed
        return num_tokens

    def _next(self) -> Sequence | None:
        """Who is to be admitted next."""
        if self._preempted:
            return self._preempted[0]
        client = self._queue.first()
        return None if client is None else self._queue.peek(client)

    def _first_scheduled(self, seq: Sequence, now_s: float) -> None:
        seq.scheduled_s = now_s
        seq.num_cached_tokens = seq.num_computed
        num_new_tokens = seq.num_prompt_tokens - seq.num_cached_tokens
        self._queue.charge(seq.request.client, INPUT_WEIGHT * num_new_tokens)
        if self._prefix_caching and not seq.prompt_logprobs:  # of which nothing was looked for
            self.prefix_cache_queries += seq.num_prompt_tokens
            self.prefix_cache_hits += seq.num_cached_tokens

    def _share_prefix(self, seq: Sequence) -> None:
        """Begin with the blocks that others have computed."""
        size = self.blocks.block_size
        hashes = seq.block_hashes(seq.first_wanted // size, size)
        self.blocks.share(seq.block_table, hashes)
        seq.num_published = len(seq.block_table)
        seq.num_computed = seq.num_published * size

    def _publish(self, seq: Sequence) -> None:
        num_full = seq.num_computed // self.blocks.block_size
        if num_full > seq.num_published:
            hashes = seq.block_hashes(num_full, self.blocks.block_size)
            for i in range(seq.num_published, num_full):
                self.blocks.publish(seq.block_table[i], hashes[i])
            seq.num_published = num_full

    def _take_blocks(self, seq: Sequence) -> None:
        self.blocks.free(seq.block_table)
        seq.num_computed = seq.num_published = 0
