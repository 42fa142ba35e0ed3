"""The scheduler without a model: nobody starves, no block is lost, everybody reads their own."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
    num_blocks: int = 8,
    block_size: int = 4,
    max_num_seqs: int = 4,
    budget: int = 8,
    max_prefill_tokens: int = 0,
    prefix_caching: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_tokens=max_prefill_tokens,
        prefix_caching=prefix_caching,
    )


Content = tuple[str | None, tuple[int, ...]]
"""What a token's keys and values depend on: the adapter, and the tokens up to and with it."""


@dataclass
class World:
    """A scheduler, and an engine that only counts: each sequence ends after its `outputs`. Of the
    cache it knows what is in every place, and with how many merges it was computed."""

    scheduler: Scheduler
    outputs: dict[Sequence, int] = field(default_factory=dict)
    order: list[Sequence] = field(default_factory=list)  # of arrival, unfinished
    admitted: list[Sequence] = field(default_factory=list)  # in order of admission, unfinished
    num_merges: int = 0
    cache: dict[tuple[int, int], tuple[Content, int]] = field(default_factory=dict)

    def add(self, num_prompt_tokens: int, num_outputs: int) -> Sequence:
        return self.add_prompt(range(num_prompt_tokens), num_outputs)

    def add_prompt(
        self,
        token_ids: Iterable[int],
        num_outputs: int,
        adapter: str | None = None,
        client: str = "",
    ) -> Sequence:
        wanted = request("a", list(token_ids), adapter=adapter, client=client)
        seq = Sequence(wanted, num_merges=self.num_merges)
        self.outputs[seq] = num_outputs
        self.order.append(seq)
        self.scheduler.add(seq)
        return seq

    def finish(self, seq: Sequence) -> None:
        self.order.remove(seq)
        if seq in self.admitted:
            self.admitted.remove(seq)
        self.scheduler.finish(seq)
        assert seq.block_table == []

    def step(self) -> ScheduledBatch:
        decoding = [seq for seq in self.scheduler.running if seq.num_pending == 1]
        batch = self.scheduler.schedule(time.monotonic())
        self.admitted += [s for s in self.scheduler.running if s not in self.admitted]
        self.check(batch, decoding)
        sampled = batch.sampling
        self.run(batch)
        self.scheduler.computed(batch)
        for seq in sampled:
            seq.token_ids.append(len(seq.token_ids) % 2)
            if seq.num_output_tokens >= self.outputs[seq]:
                self.finish(seq)
        self.check_blocks()
        return batch

    def run(self, batch: ScheduledBatch) -> None:
        """Write what is computed; then every sequence reads its own context and no other."""
        contexts = {seq: self.places(seq, seq.num_computed + n) for seq, n in batch.entries}
        for seq, _ in batch.entries:
            for place, content in contexts[seq][seq.num_computed :]:
                block = place[0]
                users = [s for s in self.scheduler.running if block in s.block_table]
                assert users == [seq], "a block is written that others read"
                self.cache[place] = (content, self.num_merges)
        for seq, context in contexts.items():
            for place, content in context:
                found, num_merges = self.cache[place]
                assert found == content, "keys and values of something else"
                assert num_merges >= seq.num_merges, "keys and values from before a merge"

    def places(self, seq: Sequence, length: int) -> list[tuple[tuple[int, int], Content]]:
        """Where the first `length` tokens lie in the cache, and what must be there."""
        size = self.scheduler.blocks.block_size
        tokens, adapter = tuple(seq.token_ids), seq.request.adapter
        return [
            ((seq.block_table[i // size], i % size), (adapter, tokens[: i + 1]))
            for i in range(length)
        ]

    def check(self, batch: ScheduledBatch, decoding: list[Sequence]) -> None:
        blocks = self.scheduler.blocks
        running = [seq for seq, _ in batch.entries]
        assert len(set(running)) == len(running)
        assert sum(n for _, n in batch.entries) <= 8
        assert len(self.scheduler.running) <= 4
        assert all(0 < n <= seq.num_pending for seq, n in batch.entries)
        for seq, n in batch.entries:
            assert len(seq.block_table) * blocks.block_size >= seq.num_computed + n
        if self.order:
            assert self.admitted[0] in running, "the one admitted first does not progress"
        for seq in decoding:
            assert seq in running or seq in self.scheduler.waiting, "a stream is stalled"
        self.check_blocks()

    def check_blocks(self) -> None:
        blocks = self.scheduler.blocks
        owned = {b for seq in self.order for b in seq.block_table}
        assert all(len(set(seq.block_table)) == len(seq.block_table) for seq in self.order)
        assert len(owned) + blocks.num_free == blocks.num_blocks, "a block was lost"
        assert owned <= set(range(blocks.num_blocks))
        assert all(not seq.block_table for seq in self.scheduler.waiting)
        assert blocks.usage == pytest.approx(len(owned) / blocks.num_blocks)


ADAPTERS = st.sampled_from([(None, ""), ("a@1", "a"), ("a@2", "a"), ("b@1", "b")])
PROMPTS = st.tuples(st.integers(0, 1), st.integers(1, 12), st.integers(0, 1), st.integers(0, 8))
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 12), ADAPTERS),  # 32 tokens fit alone
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("finish"), st.integers(0, 9)),
    st.tuples(st.just("merge")),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, max_size=40), st.sampled_from([0, 3]), st.booleans())
def test_sequences_read_their_own_keys_and_values_no_block_is_lost_and_all_finish(
    operations: list[tuple[Any, ...]], max_prefill_tokens: int, prefix_caching: bool
) -> None:
    """Whatever is shared, preempted, evicted and given up on the way."""
    world = World(scheduler(max_prefill_tokens=max_prefill_tokens, prefix_caching=prefix_caching))
    for name, *arguments in operations:
        if name == "add":
            (first, first_len, second, second_len), num_outputs, (adapter, client) = arguments
            token_ids = [first] * first_len + [second] * second_len
            world.add_prompt(token_ids, num_outputs, adapter, client)
        elif name == "step":
            for _ in range(arguments[0]):
                world.step()
        elif name == "merge":
            world.num_merges += 1
        elif world.order:
            world.finish(world.order[arguments[0] % len(world.order)])
        world.check_blocks()
    bound = 32 * len(world.order)  # the one admitted first takes at most one step a token
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
    found = [taken(world.step()) for _ in range(3)]
    assert found == [[(5, 5), (6, 3)], [(5, 1), (6, 3), (2, 2)], [(5, 1), (6, 1), (2, 1)]]


def taken(batch: ScheduledBatch) -> list[tuple[int, int]]:
    """Prompt length and tokens in the step, of each sequence."""
    return [(seq.num_prompt_tokens, n) for seq, n in batch.entries]


@pytest.mark.parametrize(("max_prefill_tokens", "chunk"), [(3, 3), (0, 6), (100, 6)])
def test_a_long_prompt_is_taken_in_chunks_between_the_tokens_of_running_streams(
    max_prefill_tokens: int, chunk: int
) -> None:
    world = World(scheduler(num_blocks=40, max_prefill_tokens=max_prefill_tokens))
    streams = [world.add(2, 50), world.add(2, 50)]
    world.step()
    long = world.add(24, 2)
    num_steps = 24 // chunk
    for i in range(num_steps):
        assert taken(world.step()) == [(2, 1), (2, 1), (24, chunk)]
        assert [s.num_output_tokens for s in streams] == [i + 2] * 2, "a stream was stalled"
    assert long.num_output_tokens == 1


def test_a_prompt_that_nobody_waits_behind_takes_the_whole_step() -> None:
    world = World(scheduler(max_prefill_tokens=3))
    world.add(24, 2)
    assert taken(world.step()) == [(24, 8)]


def test_streams_go_on_behind_an_older_prompt() -> None:
    """A preempted sequence recomputes, and those that came later decode meanwhile."""
    wanted = scheduler(num_blocks=40, prefix_caching=False)
    old, young = sequence(24), sequence(3)
    for seq in (old, young):
        wanted.blocks.grow(seq.block_table, len(seq.token_ids))
        wanted.running.append(seq)
    young.num_computed = 2
    assert wanted.schedule(0.0).entries == ((old, 7), (young, 1))


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


# --- fairness between clients ---------------------------------------------------------------------


FLOODS = ("a", "b", "c")
ARRIVALS = st.one_of(
    st.tuples(st.sampled_from(FLOODS), st.integers(1, 12), st.integers(1, 12), st.integers(1, 9)),
    st.tuples(st.just("new"), st.integers(1, 12), st.integers(1, 12), st.just(1)),
    st.tuples(st.just(""), st.integers(1, 6), st.just(0), st.just(0)),  # steps
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(ARRIVALS, min_size=1, max_size=30), st.integers(1, 4), st.booleans())
def test_a_client_that_was_idle_waits_for_one_request_of_each_other_whatever_they_flood(
    arrivals: list[tuple[str, int, int, int]], max_num_seqs: int, prefix_caching: bool
) -> None:
    world = World(scheduler(max_num_seqs=max_num_seqs, prefix_caching=prefix_caching))
    newcomers: dict[Sequence, int] = {}  # to the number admitted before they came
    waited: dict[Sequence, int] = {}  # steps
    admitted: list[Sequence] = []

    def step() -> None:
        world.step()
        admitted.extend(s for s in world.scheduler.running if s not in admitted)
        admitted.extend(s for s in waited if s.scheduled_s is not None and s not in admitted)
        for seq in waited:
            waited[seq] += seq not in admitted

    for client, num_prompt_tokens, num_outputs, count in arrivals:
        for _ in range(num_prompt_tokens if not client else 0):
            step()
        for _ in range(count):
            name = f"new {len(newcomers)}" if client == "new" else client
            seq = world.add_prompt(range(num_prompt_tokens), num_outputs, client=name)
            waited[seq] = 0
            if client == "new":
                newcomers[seq] = len(admitted)
    while world.order:
        step()
    for seq, num_before in newcomers.items():
        between = [s.request.client for s in admitted[num_before : admitted.index(seq)]]
        assert len(set(between)) == len(between), "another client had two turns"
        assert waited[seq] <= 32 * (max_num_seqs + len(between))


def test_a_flood_of_one_client_holds_no_other_up() -> None:
    world = World(scheduler(num_blocks=40, max_num_seqs=2))
    for _ in range(50):
        world.add_prompt(range(2), 4, client="flood")
    for _ in range(10):
        world.step()
    other = world.add_prompt(range(2), 4, client="other")
    num_steps = 0
    while not other.num_output_tokens:
        world.step()
        num_steps += 1
    assert num_steps <= 5  # one of the two running sequences ends after four
    drain(world)


def test_clients_share_tokens_whatever_the_length_of_their_requests() -> None:
    world = World(scheduler(num_blocks=40, max_num_seqs=4, prefix_caching=False))
    num_tokens = dict.fromkeys(("long", "short"), 0)
    for _ in range(60):
        world.add_prompt(range(2), 10, client="long")
    for _ in range(300):
        world.add_prompt(range(2), 2, client="short")
    for _ in range(120):
        for seq, _ in world.step().entries:
            num_tokens[seq.request.client] += 1
    ratio = num_tokens["long"] / num_tokens["short"]
    assert 0.5 < ratio < 2  # in the order of arrival, the long ones would have all places


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    world = World(scheduler(num_blocks=40, max_num_seqs=2))
    seqs = [world.add_prompt(range(1 + i % 3), 1 + i % 4, client="a") for i in range(12)]
    drain(world)
    times = [seq.scheduled_s or 0.0 for seq in seqs]
    assert times == sorted(times)


# --- equal beginnings ----------------------------------------------------------------------------


def drain(world: World) -> None:
    while world.order:
        world.step()


def test_equal_beginnings_are_computed_once() -> None:
    world = World(scheduler(num_blocks=20))
    world.add(7, 1)
    drain(world)
    again = world.add(7, 1)
    assert taken(world.step()) == [(7, 3)]  # one block of four was found
    assert again.num_cached_tokens == 4
    assert (world.scheduler.prefix_cache_queries, world.scheduler.prefix_cache_hits) == (14, 4)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    world = World(scheduler(num_blocks=20))
    world.add(8, 1)
    drain(world)
    assert world.add(8, 1) and taken(world.step()) == [(8, 4)]
    assert world.add(9, 1) and taken(world.step()) == [(9, 1)]


def test_a_prompt_goes_on_from_the_output_of_another() -> None:
    world = World(scheduler(num_blocks=20))
    first = world.add(6, 8)
    drain(world)
    follow_up = world.add_prompt([*first.token_ids, 9], 1)
    world.step()
    assert follow_up.num_cached_tokens == 12  # the 14th token was sampled, and never computed


def test_what_runs_is_shared_as_far_as_it_is_written() -> None:
    world = World(scheduler(num_blocks=20))
    first = world.add(16, 9)
    second = world.add(16, 9)
    assert taken(world.step()) == [(16, 8)]
    assert taken(world.step()) == [(16, 8)]
    assert taken(world.step()) == [(16, 1), (16, 4)]
    assert first.block_table[:3] == second.block_table[:3]
    assert first.block_table[3] != second.block_table[3]
    drain(world)


def test_sequences_of_one_step_do_not_share_what_it_writes() -> None:
    world = World(scheduler(num_blocks=20))
    world.add(4, 1)
    world.add(4, 1)
    assert taken(world.step()) == [(4, 4), (4, 4)]


@pytest.mark.parametrize("adapter", [None, "a@2", "b@1"])
def test_adapters_and_the_base_share_nothing(adapter: str | None) -> None:
    world = World(scheduler(num_blocks=20))
    world.add_prompt(range(8), 1, "a@1")
    drain(world)
    other = world.add_prompt(range(8), 1, adapter)
    world.step()
    same = world.add_prompt(range(8), 1, "a@1")
    world.step()
    assert (other.num_cached_tokens, same.num_cached_tokens) == (0, 4)


def test_nothing_from_before_a_merge_is_found_after_it() -> None:
    world = World(scheduler(num_blocks=20))
    running = world.add(5, 20)
    world.step()
    world.num_merges += 1
    for expected in (0, 4):
        seq = world.add(5, 1)
        world.step()
        assert seq.num_cached_tokens == expected
    drain(world)
    follow_up = world.add_prompt(running.token_ids, 1)  # computed before and after
    world.step()
    assert follow_up.num_cached_tokens == 4


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    world = World(scheduler(num_blocks=6))
    world.add(8, 12)
    young = world.add(8, 12)
    young.token_ids[0] = 99  # nothing in common
    while not world.scheduler.num_preemptions:
        world.step()
    assert young in world.scheduler.waiting
    while young not in world.scheduler.running:
        world.step()
    assert young.num_computed > 0
    assert young.num_cached_tokens == 0, "it is the prompt's, at the first time"
    drain(world)


def test_a_cancelled_sequence_leaves_what_it_computed() -> None:
    world = World(scheduler(num_blocks=20))
    cancelled = world.add(20, 5)
    world.step()
    world.finish(cancelled)
    assert world.scheduler.blocks.num_free == 20
    seq = world.add(20, 1)
    world.step()
    assert seq.num_cached_tokens == 8


def test_without_prefix_caching_nothing_is_found() -> None:
    world = World(scheduler(num_blocks=20, prefix_caching=False))
    for _ in range(2):
        seq = world.add(8, 1)
        assert taken(world.step()) == [(8, 8)]
        assert seq.num_cached_tokens == 0
    assert world.scheduler.prefix_cache_queries == 0
