"""Who is let into the engine, without an engine: requests end when the test says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_runtime.admission import TURN_S, Admission
from kasa_runtime.errors import LimitExceeded, Overloaded
from kasa_runtime.limits import Limits, LimitsConfig
from kasa_runtime.types import BASE


@dataclass(eq=False)
class Request:
    adapter: str
    task: asyncio.Task[None] = field(init=False)
    end: asyncio.Event = field(default_factory=asyncio.Event)
    entered: bool = False


class World:
    """An admission on a clock of its own, and the requests in it."""

    def __init__(self, limits: LimitsConfig | None = None, **changes: Any) -> None:
        self.now_s = 0.0
        self.merged: set[str] = set()
        bounds = {"max_in_flight": 1000, "max_inside": 4, "reserve": 0, "max_slots": 8}
        self.admission = Admission(
            Limits(limits or LimitsConfig(), self.clock),
            always_in_slots=lambda: self.merged,
            clock=self.clock,
            **(bounds | changes),
        )
        self.requests: list[Request] = []
        self.order: list[Request] = []  # in which they entered

    def clock(self) -> float:
        return self.now_s

    async def add(self, adapter: str, count: int = 1, num_tokens: int = 10) -> list[Request]:
        new = [Request(adapter) for _ in range(count)]
        for request in new:
            request.task = asyncio.create_task(self._live(request, num_tokens))
        self.requests += new
        await self.settle()
        return new

    async def _live(self, request: Request, num_tokens: int) -> None:
        with self.admission.visit(request.adapter) as visit:
            await visit.enter(num_tokens)
            request.entered = True
            self.order.append(request)
            await request.end.wait()
            visit.charge(num_tokens)

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    @property
    def inside(self) -> list[Request]:
        return [r for r in self.order if not r.task.done()]

    async def end(self, count: int = 1, after_s: float = 0.0) -> None:
        """Those that have been inside longest end."""
        self.now_s += after_s
        for request in self.inside[:count]:
            request.end.set()
        await self.settle()

    async def close(self) -> None:
        for request in self.requests:
            request.task.cancel()
        ends = await asyncio.gather(*(r.task for r in self.requests), return_exceptions=True)
        refused = (Overloaded, asyncio.CancelledError)
        assert all(end is None or isinstance(end, refused) for end in ends)
        assert self.admission.num_in_flight == 0
        assert not self.admission._queue and not self.admission._num_inside
        assert not self.admission._slots and not self.admission._slot_wanted


def adapters(requests: list[Request]) -> list[str]:
    return [request.adapter for request in requests]


async def test_one_adapter_enters_in_the_order_of_arrival() -> None:
    world = World(max_inside=2)
    requests = await world.add("a", 6)
    assert world.inside == requests[:2]
    while world.inside:
        await world.end()
    assert world.order == requests
    await world.close()


async def test_requests_are_counted_by_adapter_inside_and_in_front() -> None:
    world = World(max_inside=2)
    await world.add("a", 3)
    await world.add(BASE, 1)
    assert world.admission.num_inside == {"a": 2}
    assert world.admission.num_waiting == {"a": 1, BASE: 1}
    await world.end(2)
    assert world.admission.num_inside == {"a": 1, BASE: 1}
    assert world.admission.num_waiting == {}
    await world.close()


async def test_a_flood_holds_another_adapter_up_for_one_place() -> None:
    world = World()
    await world.add("flood", 200)
    await world.end(4)
    few = await world.add("few", 3)
    base = await world.add(BASE, 1)
    await world.end(4)
    assert all(request.entered for request in few + base)
    await world.close()


async def test_an_adapter_below_its_share_does_not_wait_behind_a_flood() -> None:
    world = World(max_inside=12, reserve=4)
    await world.add("flood", 200)
    assert len(world.inside) == 8
    await world.add("few", 5)
    assert adapters(world.inside) == ["flood"] * 8 + ["few"] * 4, "the reserve, half of 8"
    await world.add("other", 1)
    assert len(world.inside) == 12
    await world.end()
    assert adapters(world.inside)[-1] == "other"
    for _ in range(20):
        await world.end()
    assert adapters(world.inside) == ["flood"] * 8, "the reserve is free again"
    await world.close()


async def test_a_full_queue_turns_away_the_newest_of_the_adapter_that_fills_it() -> None:
    world = World(max_in_flight=10)
    flood = await world.add("flood", 10)
    (refused,) = await world.add("flood")
    with pytest.raises(Overloaded, match="limit is 10"):
        await refused.task
    (other,) = await world.add("other")
    with pytest.raises(Overloaded) as caught:
        await flood[-1].task
    assert caught.value.retry_after_s > 0
    assert not other.task.done() and not any(r.task.done() for r in flood[:-1])
    await world.close()


async def test_a_full_queue_is_shared_and_no_more() -> None:
    world = World(max_in_flight=12, max_inside=2)
    await world.add("a", 12)
    await world.add("b", 12)
    await world.add("c", 12)
    alive = adapters([r for r in world.requests if not r.task.done()])
    assert len(alive) == 12
    assert min(alive.count(name) for name in "abc") >= 3
    await world.close()


async def test_those_inside_are_never_turned_away() -> None:
    world = World(max_in_flight=4)
    inside = await world.add("flood", 4)
    (other,) = await world.add("other")
    with pytest.raises(Overloaded):
        await other.task
    assert world.inside == inside
    await world.close()


async def test_an_adapter_without_a_slot_gets_that_of_the_one_that_floods() -> None:
    world = World(max_slots=1)
    await world.add("flood", 50)
    await world.add("other", 2)
    await world.end(after_s=TURN_S / 2)
    assert adapters(world.inside) == ["flood"] * 4, "it has its turn"
    for _ in range(4):
        await world.end(after_s=TURN_S / 2)
    assert adapters(world.inside) == ["other"] * 2
    await world.end(2)
    assert adapters(world.inside) == ["flood"] * 4
    await world.close()


async def test_a_slot_that_is_free_is_taken_at_once() -> None:
    world = World(max_slots=2)
    await world.add("a", 2)
    await world.add("b", 2)
    assert adapters(world.inside) == ["a", "a", "b", "b"]
    await world.end(2)
    await world.add("c", 1)
    assert adapters(world.inside) == ["b", "b", "c"]
    await world.close()


async def test_the_base_and_the_merged_adapter_need_no_other_slot() -> None:
    world = World(max_slots=2)
    world.merged = {"merged"}
    await world.add("a", 1)
    (waiting,) = await world.add("b", 1)
    await world.add("merged", 1)
    await world.add(BASE, 1)
    assert adapters(world.inside) == ["a", "merged", BASE]
    await world.end(1)
    assert waiting.entered
    await world.close()


async def test_where_the_merged_adapter_has_the_only_slot_others_are_let_through() -> None:
    world = World(max_slots=1)
    world.merged = {"merged"}
    (request,) = await world.add("a")
    assert request.entered  # the lease tells it that there will be no slot
    await world.close()


async def test_a_turn_goes_on_when_nobody_waits_any_more() -> None:
    world = World(max_slots=1)
    await world.add("flood", 8)
    (other,) = await world.add("other")
    await world.end(after_s=2 * TURN_S)
    assert len(world.inside) == 3, "its turn is ending"
    other.task.cancel()
    await world.settle()
    await world.end()
    assert len(world.inside) == 4
    await world.close()


async def test_one_that_is_cancelled_as_it_enters_gives_its_place_back() -> None:
    world = World(max_inside=1)
    first, second, third = await world.add("a", 3)
    first.end.set()
    for _ in range(10):
        if second.entered or third.entered:
            break
        second.task.cancel()
        await asyncio.sleep(0)
    await world.settle()
    assert second.task.cancelled() and third.entered
    await world.close()


async def test_tokens_of_prompts_and_outputs_count_for_the_limit() -> None:
    world = World(LimitsConfig(adapter_limit=("a=:10",)))
    (first,) = await world.add("a", num_tokens=10)
    (second,) = await world.add("a")
    with pytest.raises(LimitExceeded) as caught:
        await second.task
    assert caught.value.retry_after_s == pytest.approx(0.1)
    await world.end()  # and 10 tokens of output
    (third,) = await world.add("a")
    with pytest.raises(LimitExceeded) as caught:
        await third.task
    assert caught.value.retry_after_s == pytest.approx(1.1)
    assert (await world.add("b"))[0].entered
    world.now_s += 1.2
    assert (await world.add("a"))[0].entered and first.entered
    await world.close()


async def test_a_burst_is_let_in_only_as_far_as_there_are_tokens() -> None:
    world = World(LimitsConfig(adapter_tokens_per_s=25.0), max_inside=100)
    await world.add("a", 20, num_tokens=10)
    assert len(world.inside) == 3
    await world.close()


async def test_concurrency_counts_those_that_wait_too() -> None:
    world = World(LimitsConfig(adapter_max_concurrency=3), max_inside=2)
    requests = await world.add("a", 4)
    assert (await world.add("b"))[0].task.done() is False
    with pytest.raises(LimitExceeded):
        await requests[3].task
    await world.end()
    assert not (await world.add("a"))[0].task.done()
    await world.close()


ARRIVALS = st.tuples(st.sampled_from([BASE, *"abcdefg"]), st.integers(1, 12), st.booleans())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(ARRIVALS, min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_wait_is_bounded_whoever_floods(
    arrivals: list[tuple[str, int, bool]], max_slots: int, max_inside: int, reserve: int
) -> None:
    """A flood for adapter "flood" goes on and on; all others still enter, in bounded time."""

    async def check() -> None:
        world = World(max_slots=max_slots, max_inside=max_inside + reserve, reserve=reserve)
        await world.add("flood", 20)
        for adapter, count, ends in arrivals:
            await world.add(adapter, count)
            if ends:
                await world.end(after_s=TURN_S / 4)
        others = [r for r in world.requests if r.adapter != "flood"]
        num_ends = 0
        while not all(r.entered for r in others):
            await world.add("flood", 1)
            await world.end(after_s=TURN_S / 4)
            num_ends += 1
            # Of each request at most one of the flood's, and for each turn those it drains.
            turns = 2 + len(others)
            assert num_ends <= 2 * len(others) + turns * (max_inside + reserve + 8)
        await world.close()

    asyncio.run(check())


async def test_a_pin_gets_a_slot_from_a_stream_that_nobody_else_waits_behind() -> None:
    """It waits for no request's turn, but one has to end for it."""
    world = World(max_slots=2)
    await world.add("a", 1)
    world.now_s += TURN_S / 2
    await world.add("b", 1)
    world.merged = {"pinned"}
    await world.add("a", 1)
    assert adapters(world.inside) == ["a", "b", "a"], "it had no turn yet"
    world.now_s += TURN_S / 2
    late = await world.add("a", 2) + await world.add("b", 1)
    assert adapters(world.inside) == ["a", "b", "a", "b"], "a had its slot longest"
    await world.end(3)
    assert adapters(world.inside) == ["b"], "a's slot is free for the pinned one"
    assert not any(request.entered for request in late[:2])
    await world.add("pinned", 1)
    assert adapters(world.inside) == ["b", "pinned"]
    await world.end(after_s=TURN_S)
    assert [request.entered for request in late] == [True] * 3, "b's slot is a's again"
    await world.close()


async def test_those_who_wait_are_let_in_when_a_slot_is_given_up() -> None:
    world = World(max_slots=2)
    world.merged = {"merged"}
    await world.add("a", 1)
    (waits,) = await world.add("b", 1)
    assert not waits.entered
    world.merged = set()
    world.admission.advance()
    await world.settle()
    assert waits.entered and adapters(world.inside) == ["a", "b"]
    await world.close()
