"""The virtual token counter: who is next, and how long that can take at most."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_runtime.engine.fair_queue import MAX_IDLE_CLIENTS, FairQueue


def filled(**items: int) -> FairQueue[str]:
    """A queue with so many items of each client."""
    queue: FairQueue[str] = FairQueue()
    for client, count in items.items():
        for i in range(count):
            queue.push(client, f"{client}{i}")
    return queue


def take(queue: FairQueue[str], cost: int = 1) -> str:
    client = queue.first()
    assert client is not None
    queue.charge(client, cost)
    return queue.pop(client)


def test_one_client_is_first_in_first_out() -> None:
    queue = filled(a=4)
    assert [take(queue, cost) for cost in (5, 0, 9, 1)] == ["a0", "a1", "a2", "a3"]
    assert queue.first() is None and not queue


def test_clients_take_turns_by_what_they_cost() -> None:
    queue = filled(a=3, b=3)
    costs = {"a": 2, "b": 1}
    found = []
    while queue:
        found.append(take(queue, costs[queue.first() or ""]))
    assert found == ["a0", "b0", "b1", "a1", "b2", "a2"]


def test_idle_time_saves_nothing_up() -> None:
    queue = filled(a=9)
    for _ in range(5):
        take(queue, 100)
    queue.push("b", "b0")
    queue.push("b", "b1")
    assert [take(queue, 100) for _ in range(4)] == ["a5", "b0", "a6", "b1"]


def test_who_comes_to_an_empty_queue_starts_where_the_last_one_is() -> None:
    queue = filled(a=1)
    take(queue, 70)
    queue.charge("a", 30)  # it runs on
    queue.push("b", "b0")
    assert queue.counter("b") == 100


def test_a_debt_is_not_forgotten() -> None:
    queue = filled(a=2, b=2)
    take(queue, 50)
    take(queue, 10)
    queue.remove("a", "a1")
    queue.push("a", "a2")
    assert [take(queue) for _ in range(2)] == ["b1", "a2"]


def test_the_turn_goes_to_those_that_are_allowed() -> None:
    queue = filled(a=1, b=1)
    assert queue.first(lambda client: client != "a") == "b"
    assert queue.first(lambda client: False) is None


def test_the_newest_of_the_longest_gives_up() -> None:
    queue = filled(a=1, b=3)
    assert queue.longest() == "b"
    assert queue.pop_newest("b") == "b2"
    assert list(queue) == ["a0", "b0", "b1"]


def test_of_many_idle_clients_those_that_got_least_are_forgotten() -> None:
    queue = filled(greedy=1)
    take(queue)
    queue.push("waiting", "x")
    queue.charge("greedy", 10**6)
    for i in range(3 * MAX_IDLE_CLIENTS):
        queue.push(f"{i}", "x")
        queue.charge(f"{i}", 5)
        queue.pop(f"{i}")
    assert len(queue._counters) <= MAX_IDLE_CLIENTS + 2
    assert queue.counter("greedy") == 10**6 + 1 and take(queue) == "x"


@dataclass
class Wait:
    """Of an item: the smallest counter as it came, and what was taken since."""

    level: int
    taken: Counter[str]


OPERATIONS = st.one_of(
    st.tuples(st.just("push"), st.sampled_from("abcd"), st.integers(1, 6)),
    st.tuples(st.just("take"), st.just(""), st.integers(1, 40)),
    st.tuples(st.just("charge"), st.sampled_from("abcd"), st.integers(1, 40)),
    st.tuples(st.just("remove"), st.sampled_from("abcd"), st.integers(0, 5)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, max_size=120))
def test_the_wait_of_every_item_is_bounded_as_the_module_says(
    operations: list[tuple[str, str, int]],
) -> None:
    queue: FairQueue[Wait] = FairQueue()

    def take_one(cost: int) -> None:
        client = queue.first()
        if client is None:
            return
        wait, own = queue.pop(client), queue.counter(client)
        queue.charge(client, cost)
        for other, count in wait.taken.items():
            assert other == client or count <= own - wait.level + 1
        for waiting in queue:
            waiting.taken[client] += 1

    for name, client, number in operations:
        if name == "push":
            for _ in range(number):
                item = Wait(0, Counter())
                queue.push(client, item)
                waiting = [c for c in "abcd" if queue.num_waiting(c)]
                item.level = min(map(queue.counter, waiting))
        elif name == "take":
            take_one(number)
        elif name == "charge":
            queue.charge(client, number)
        elif queue.num_waiting(client) > number:
            for _ in range(number):
                queue.pop_newest(client)
    while queue:
        take_one(1)
