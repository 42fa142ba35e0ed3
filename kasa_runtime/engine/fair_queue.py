"""A queue that is fair between clients: the virtual token counter (VTC) of arXiv 2401.00588.

Every client has a queue of its own and a counter of the service it got, in weighted tokens. The
next item is the oldest one of the client with the smallest counter; of equal ones, of the client
that began to wait first. A client that comes back is lifted to the smallest counter of those that
wait (or to that of the client that was served last), so idle time saves nothing up.

Let a client's first item arrive when the smallest counter is `v`, and leave the queue when the
client's own counter is `c`. Then no other client had more than `c - v + 1` items taken in between,
if each item is charged at least 1 as it is taken: it is taken from only while its counter, which
starts at `v` or above, is at most `c`. A client without a debt has `c == v` and waits for one item
of each other client.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a token costs, as in the paper: an output token takes a step of its own."""

MAX_IDLE_CLIENTS = 1024


class FairQueue(Generic[Item]):
    """Items by client. With one client, first in, first out."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Item]] = {}  # in the order in which they began to wait
        self._counters: dict[str, int] = {}
        self._last = ""  # the client that was taken from last

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        for items in self._waiting.values():
            yield from items

    def num_waiting(self, client: str) -> int:
        return len(self._waiting.get(client, ()))

    def counter(self, client: str) -> int:
        """Weighted tokens, on a scale that all clients share."""
        return self._counters.get(client, 0)

    def charge(self, client: str, amount: int) -> None:
        self._counters[client] = self.counter(client) + amount

    def push(self, client: str, item: Item) -> None:
        if client not in self._waiting:
            self._lift(client)
            self._waiting[client] = deque()
            if len(self._counters) > len(self._waiting) + MAX_IDLE_CLIENTS:
                self._forget_idle()
        self._waiting[client].append(item)

    def first(self, allowed: Callable[[str], bool] = lambda _: True) -> str | None:
        """The client whose turn it is among the allowed ones that wait. O(clients that wait)."""
        return min(filter(allowed, self._waiting), key=self.counter, default=None)

    def longest(self) -> str | None:
        """The client with the most items."""
        return max(self._waiting, key=self.num_waiting, default=None)

    def peek(self, client: str) -> Item:
        return self._waiting[client][0]

    def pop(self, client: str) -> Item:
        """The client's oldest item."""
        item = self._waiting[client].popleft()
        self._last = client
        self._forget_if_empty(client)
        return item

    def pop_newest(self, client: str) -> Item:
        """The client's newest item, which gives up."""
        item = self._waiting[client].pop()
        self._forget_if_empty(client)
        return item

    def remove(self, client: str, item: Item) -> None:
        self._waiting[client].remove(item)
        self._forget_if_empty(client)

    def _lift(self, client: str) -> None:
        level = min(map(self.counter, self._waiting or (self._last,)))
        self._counters[client] = max(self.counter(client), level)

    def _forget_idle(self) -> None:
        """Of too many clients that do not wait, keep the half that got most."""
        idle = self._counters.keys() - self._waiting.keys() - {self._last}
        for client in sorted(idle, key=self.counter)[: -MAX_IDLE_CLIENTS // 2]:
            del self._counters[client]

    def _forget_if_empty(self, client: str) -> None:
        if not self._waiting[client]:
            del self._waiting[client]
