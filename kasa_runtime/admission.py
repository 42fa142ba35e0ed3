"""Which requests are in the engine, and which wait in front of it: a flood for one adapter takes
neither the queue, nor the engine's places, nor its adapter slots from the others.

- Requests wait here, where they hold no adapter, by adapter and by virtual token counters
  (`engine/fair_queue.py`, where the bound on the wait is). The engine, in which adapters share
  fairly too, has only as many as it needs to be full, and a reserve: adapters that have less than
  their share inside go there at once.
- When the queue is full and an adapter comes that has less in it than another, the newest waiting
  request of the one that has most is turned away.
- An adapter holds its slot while requests of it are in the engine. When others have waited for a
  slot for `TURN_S`, the one that had its slot longest, and for `TURN_S` at least, lets no more
  requests in; when the last of those inside has ended, the slot is that of who waited longest. So
  of `n` adapters that want a slot beside `m` slots each waits for at most `n / m` turns, rounded
  up: `TURN_S` and the time in which the requests inside end.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from kasa_runtime.engine.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from kasa_runtime.errors import Overloaded
from kasa_runtime.limits import Limits
from kasa_runtime.types import BASE

TURN_S = 1.0
RETRY_S = 1.0


@dataclass(eq=False)
class Visit:
    """One request, from its arrival to its end."""

    adapter: str
    _admission: Admission
    entered: bool = field(default=False, init=False)
    waiting: bool = field(default=False, init=False)
    num_prompt_tokens: int = field(default=0, init=False)
    turn: asyncio.Future[None] = field(init=False)

    def __post_init__(self) -> None:
        self.turn = asyncio.get_running_loop().create_future()

    async def enter(self, num_prompt_tokens: int) -> None:
        """Wait until the request may hold its adapter and go to the engine. Raises LimitExceeded,
        Overloaded."""
        self.num_prompt_tokens = num_prompt_tokens
        self._admission.wait(self)
        try:
            await self.turn
        finally:
            if self.waiting:
                self._admission.give_up(self)

    def charge(self, num_tokens: int) -> None:
        """So many tokens were generated."""
        self._admission.charge(self.adapter, num_tokens)


@dataclass
class Slot:
    """The place of an adapter in the engine."""

    since_s: float
    ending: bool = False  # no more requests are let in


class Admission:
    """Event loop only. `reserve`: how many of the `max_inside` are for adapters with less than
    their share. `always_in_slots`: adapters that hold a slot whatever is asked for."""

    def __init__(
        self,
        limits: Limits,
        *,
        max_in_flight: int,
        max_inside: int,
        reserve: int,
        max_slots: int,
        always_in_slots: Callable[[], Set[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._max_in_flight = max_in_flight
        self._max_inside = max_inside
        self._max_of_one = max_inside - reserve
        self._max_slots = max_slots
        self._always_in_slots = always_in_slots
        self._clock = clock
        self._in_flight: Counter[str] = Counter()
        self._inside: Counter[str] = Counter()
        self._num_inside = 0
        self._queue: FairQueue[Visit] = FairQueue()
        self._slots: dict[str, Slot] = {}  # the one held longest first
        self._slot_wanted: dict[str, float] = {}  # since when; the longest first

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.total()

    @property
    def num_inside(self) -> dict[str, int]:
        """Requests in the engine, by adapter."""
        return dict(self._inside)

    @property
    def num_waiting(self) -> dict[str, int]:
        """Requests that are not in the engine yet, by adapter."""
        return dict(self._in_flight - self._inside)

    @contextmanager
    def visit(self, adapter: str) -> Iterator[Visit]:
        """Count a request, from its arrival to its end. Raises Overloaded, LimitExceeded."""
        self._limits.require_place(adapter, self._in_flight[adapter])
        self._limits.require_tokens(adapter)
        self._make_room(adapter)
        visit = Visit(adapter, self)
        self._in_flight[adapter] += 1
        try:
            yield visit
        finally:
            _count_down(self._in_flight, adapter)
            if visit.entered:
                self._leave(visit)

    def advance(self) -> None:
        """Let in who may enter; to be called when `always_in_slots` changes, too."""
        always = self._always_in_slots()
        self._end_turns(always)
        while self._queue and self._num_inside < self._max_inside:
            adapter = self._queue.first(self._may_enter(always))
            if adapter is None:
                return
            visit = self._queue.pop(adapter)
            self._gone(visit)
            if not visit.turn.done():  # else it was cancelled, and has not run since
                self._enter(visit)

    # --- for visits -------------------------------------------------------------------------------

    def wait(self, visit: Visit) -> None:
        self._limits.require_tokens(visit.adapter)  # others may have come since its arrival
        self._limits.take(visit.adapter, visit.num_prompt_tokens)
        visit.waiting = True
        self._queue.push(visit.adapter, visit)
        if visit.adapter != BASE and visit.adapter not in self._slots:
            self._slot_wanted.setdefault(visit.adapter, self._clock())
        self.advance()

    def give_up(self, visit: Visit) -> None:
        self._queue.remove(visit.adapter, visit)
        self._gone(visit)

    def charge(self, adapter: str, num_tokens: int) -> None:
        self._queue.charge(adapter, OUTPUT_WEIGHT * num_tokens)
        self._limits.take(adapter, num_tokens)

    # --- inside -----------------------------------------------------------------------------------

    def _make_room(self, adapter: str) -> None:
        """In the queue, for one request more."""
        if self.num_in_flight < self._max_in_flight:
            return
        full = (
            f"{self.num_in_flight} requests are running or waiting, the limit is "
            f"{self._max_in_flight}; try again later"
        )
        longest = self._queue.longest()
        if longest is None or self._in_flight[longest] <= self._in_flight[adapter] + 1:
            raise Overloaded(full, retry_after_s=RETRY_S)
        visit = self._queue.pop_newest(longest)
        self._gone(visit)
        if not visit.turn.done():
            visit.turn.set_exception(Overloaded(full, retry_after_s=RETRY_S))

    def _may_enter(self, always: Set[str]) -> Callable[[str], bool]:
        """Of those that wait, who may enter now."""
        share = self._max_of_one / len(self._in_flight)
        is_full = self._num_inside >= self._max_of_one
        num_free = self._max_slots - len(self._slots.keys() | always)
        # Without any slot for others, it is for the lease to say so.
        can_take = num_free > 0 or len(always) >= self._max_slots
        next_in_slot = next(iter(self._slot_wanted), None) if can_take else None

        def may_enter(adapter: str) -> bool:
            if is_full and self._inside[adapter] >= share:
                return False
            slot = self._slots.get(adapter)
            if slot is not None:
                return not slot.ending
            return adapter in (BASE, next_in_slot) or adapter in always

        return may_enter

    def _end_turns(self, always: Set[str]) -> None:
        """Make as many slots free themselves as adapters waited for one for a turn."""
        now_s = self._clock()
        num_wanted = sum(now_s - since_s >= TURN_S for since_s in self._slot_wanted.values())
        num_wanted -= self._max_slots - len(self._slots.keys() | always)
        for adapter, slot in self._slots.items():
            had_turn = now_s - slot.since_s >= TURN_S and adapter not in always
            slot.ending = num_wanted > 0 and (slot.ending or had_turn)
            num_wanted -= slot.ending

    def _enter(self, visit: Visit) -> None:
        adapter = visit.adapter
        if adapter != BASE and adapter not in self._slots:
            self._slot_wanted.pop(adapter, None)
            self._slots[adapter] = Slot(self._clock())
        self._queue.charge(adapter, INPUT_WEIGHT * visit.num_prompt_tokens)
        self._inside[adapter] += 1
        self._num_inside += 1
        visit.entered = True
        visit.turn.set_result(None)

    def _leave(self, visit: Visit) -> None:
        adapter = visit.adapter
        _count_down(self._inside, adapter)
        self._num_inside -= 1
        if adapter in self._slots and adapter not in self._inside:
            del self._slots[adapter]
            if self._queue.num_waiting(adapter):
                self._slot_wanted[adapter] = self._clock()
        self.advance()

    def _gone(self, visit: Visit) -> None:
        """From the queue."""
        visit.waiting = False
        if not self._queue.num_waiting(visit.adapter):
            self._slot_wanted.pop(visit.adapter, None)


def _count_down(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
