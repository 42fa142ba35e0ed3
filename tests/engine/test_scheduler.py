"""Scheduler and block manager without a model: no block is shared or lost, nobody starves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.making import request
from kasa_runtime.engine.native.block_manager import BlockManager
from kasa_runtime.engine.native.scheduler import ScheduledBatch, Scheduler
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.types import FinishReason


def sequence(num_prompt_tokens: int, name: str = "a", **options: object) -> Sequence:
    return Sequence(request(name, range(num_prompt_tokens), **options))  # type: ignore[arg-type]


def scheduler(
    num_blocks: int = 8, block_size: int = 4, max_num_seqs: int = 4, budget: int = 8
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


@dataclass
class World:
    """A scheduler, and an engine that only counts: each sequence ends after its `outputs`."""

    scheduler: Scheduler
    outputs: dict[Sequence, int] = field(default_factory=dict)
    order: list[Sequence] = field(default_factory=list)  # of arrival, unfinished

    def add(self, num_prompt_tokens: int, num_outputs: int) -> None:
        seq = sequence(num_prompt_tokens)
        self.outputs[seq] = num_outputs
        self.order.append(seq)
        self.scheduler.add(seq)

    def finish(self, seq: Sequence) -> None:
        self.order.remove(seq)
        self.scheduler.finish(seq)
        assert seq.block_table == []

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule(time.monotonic())
        self.check(batch)
        sampled = batch.sampling
        for seq, num_tokens in batch.entries:
            seq.num_computed += num_tokens
        for seq in sampled:
            seq.token_ids.append(7)
            if seq.num_output_tokens >= self.outputs[seq]:
                self.finish(seq)
        return batch

    def check(self, batch: ScheduledBatch) -> None:
        blocks = self.scheduler.blocks
        running = [seq for seq, _ in batch.entries]
        assert len(set(running)) == len(running)
        assert sum(n for _, n in batch.entries) <= 8
        assert len(self.scheduler.running) <= 4
        assert all(0 < n <= seq.num_pending for seq, n in batch.entries)
        for seq, n in batch.entries:
            assert len(seq.block_table) * blocks.block_size >= seq.num_computed + n
        if self.order:
            assert self.order[0] in running, "the oldest does not progress"
        self.check_blocks()

    def check_blocks(self) -> None:
        blocks = self.scheduler.blocks
        owned = [b for seq in self.order for b in seq.block_table]
        assert len(set(owned)) == len(owned), "a block has two owners"
        assert len(owned) + blocks.num_free == blocks.num_blocks, "a block was lost"
        assert set(owned) <= set(range(blocks.num_blocks))
        assert all(not seq.block_table for seq in self.scheduler.waiting)
        assert blocks.usage == pytest.approx(len(owned) / blocks.num_blocks)


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 12)),  # 32 tokens fit alone
    st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("finish"), st.integers(0, 9), st.just(0)),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, max_size=40))
def test_blocks_are_never_shared_or_lost_and_all_finish(
    operations: list[tuple[str, int, int]],
) -> None:
    world = World(scheduler())
    for name, first, second in operations:
        if name == "add":
            world.add(first, second)
        elif name == "step":
            for _ in range(first):
                world.step()
        elif world.order:
            world.finish(world.order[first % len(world.order)])
        world.check_blocks()
    bound = 32 * len(world.order)  # the oldest takes at most one step a token
    for _ in range(bound):
        if world.order:
            world.step()
    assert not world.order and not world.scheduler.has_work
    assert world.scheduler.blocks.num_free == 8


def test_running_sequences_go_before_waiting_ones_and_prompts_are_cut_into_chunks() -> None:
    world = World(scheduler(budget=8))
    world.add(5, 3)
    world.add(6, 3)
    world.add(2, 3)
    taken = [[(len(s.request.prompt_ids), n) for s, n in world.step().entries] for _ in range(3)]
    assert taken == [[(5, 5), (6, 3)], [(5, 1), (6, 3), (2, 2)], [(5, 1), (6, 1), (2, 1)]]


def test_no_more_run_than_max_num_seqs() -> None:
    world = World(scheduler(num_blocks=20, max_num_seqs=2))
    for _ in range(4):
        world.add(1, 2)
    assert [len(world.step().entries) for _ in range(4)] == [2, 2, 2, 2]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    world = World(scheduler(num_blocks=4, block_size=2))
    world.add(3, 5)
    world.add(3, 3)
    world.step()
    world.add(1, 1)
    old, young, waiting = world.order
    while not world.scheduler.num_preemptions:
        world.step()
    assert young.num_computed == 0 and young.block_table == []
    assert world.scheduler.running == [old]
    assert list(world.scheduler.waiting) == [young, waiting]
    assert len(young.token_ids) > 3, "what was generated is kept"
    while world.order:
        world.step()


def test_a_preempted_sequence_is_not_admitted_in_the_same_step() -> None:
    world = World(scheduler(num_blocks=3, block_size=2))
    world.add(2, 4)
    world.add(2, 4)
    while not world.scheduler.num_preemptions:
        batch = world.step()
    assert len(batch.entries) == 1


def test_expired_names_the_cancelled_and_the_late() -> None:
    late = sequence(2, "late", deadline_s=10.0)
    cancelled = sequence(2, "cancelled")
    cancelled.cancelled = True
    both = sequence(2, "both", deadline_s=10.0)
    both.cancelled = True
    wanted = scheduler()
    for seq in (late, sequence(2, "fine"), cancelled, both, sequence(2, "early", deadline_s=10.1)):
        wanted.add(seq)
    assert wanted.expired(10.0) == [
        (late, FinishReason.DEADLINE),
        (cancelled, FinishReason.CANCELLED),
        (both, FinishReason.CANCELLED),
    ]


def test_packing_lays_sequences_one_after_the_other() -> None:
    first, second = sequence(5), sequence(3)
    first.num_computed, first.block_table = 2, [7, 3]
    second.block_table, second.slot = [1], 2
    batch = ScheduledBatch(((first, 2), (second, 3))).pack()
    assert batch.token_ids.tolist() == [2, 3, 0, 1, 2]
    assert batch.positions.tolist() == [2, 3, 0, 1, 2]
    assert batch.logit_rows.tolist() == [4]  # the first one's prompt goes on in the next step
    assert [(s.num_tokens, s.num_computed, s.slot) for s in batch.sequences] == [
        (2, 2, -1),
        (3, 0, 2),
    ]


def test_schedule_records_when_a_sequence_first_entered() -> None:
    wanted = scheduler()
    seq = sequence(12)
    wanted.add(seq)
    wanted.schedule(5.0)
    assert seq.scheduled_s == 5.0
    seq.num_computed = 8
    wanted.schedule(6.0)
    assert seq.scheduled_s == 5.0


def test_blocks_are_counted_by_need() -> None:
    blocks = BlockManager(3, 4)
    table: list[int] = []
    assert blocks.num_missing(table, 4) == 1 and blocks.num_missing(table, 5) == 2
    assert blocks.can_grow(table, 12) and not blocks.can_grow(table, 13)
    blocks.grow(table, 5)
    assert (len(table), blocks.num_free, blocks.num_missing(table, 8)) == (2, 1, 0)
    blocks.grow(table, 3)
    assert len(table) == 2, "shrinking is not asked for"
    blocks.free(table)
    assert (table, blocks.num_free, blocks.usage) == ([], 3, 0.0)
