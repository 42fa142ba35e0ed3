"""What is the native engine's own: its steps, its thread, preemption. What all engines share is in
`test_engine_protocol.py`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.making import (
    MemoryTails,
    Result,
    collect,
    collect_all,
    config,
    few_blocks,
    greedy,
    prompt,
    request,
    running,
    until,
)
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.base import EngineOutput, EngineRequest
from kasa_runtime.engine.native.engine import NativeEngine
from kasa_runtime.engine.native.executor import Commit, PackedBatch
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import EngineDead, KasaError
from kasa_runtime.types import FinishReason

LONG = {"ignore_eos": True}  # the tiny model may end early


class Driven:
    """An engine without its thread: the test takes the steps."""

    def __init__(self, executor: TorchExecutor, tails: Any = None, **changes: Any) -> None:
        self.engine = NativeEngine(config(**changes), lambda: executor, tails)
        self.engine._set_up()
        self.results: dict[str, Result] = {}

    @property
    def scheduler(self) -> Any:
        return self.engine._scheduler

    def add(self, wanted: EngineRequest) -> Sequence:
        seq = Sequence(wanted)
        self.results[wanted.request_id] = Result()
        self.scheduler.add(seq)
        return seq

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.results[output.request_id].outputs.append(output)
        return outputs

    def drain(self) -> None:
        while self.scheduler.has_work:
            self.step()


@pytest.fixture(scope="module")
def executor(tiny_llama: Path) -> TorchExecutor:
    return TorchExecutor(tiny_llama, config())


@pytest.fixture(scope="module")
def small(tiny_llama: Path) -> TorchExecutor:
    """With a cache of 12 blocks of four tokens."""
    executor = TorchExecutor(tiny_llama, config(**few_blocks(12)))
    assert executor.num_blocks == 12
    return executor


@pytest.fixture(scope="module")
def reference(bare: Any) -> Callable[[list[int], int], list[int]]:
    known: dict[tuple[int, ...], list[int]] = {}

    def get(token_ids: list[int], count: int) -> list[int]:
        key = tuple(token_ids)
        if len(known.get(key, ())) < count:
            known[key] = greedy(bare, token_ids, max(count, 40))
        return known[key][:count]

    return get


# --- who runs when -------------------------------------------------------------------------------

ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 7), st.integers(1, 20)), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ARRIVALS)
def test_requests_that_join_and_leave_at_any_step_get_their_tokens(
    small: TorchExecutor,
    reference: Callable[[list[int], int], list[int]],
    arrivals: list[tuple[int, int, int]],
) -> None:
    """Whatever is chunked, mixed, preempted and recomputed on the way."""
    driven = Driven(small, max_num_seqs=4, max_num_batched_tokens=8)
    prompts = {f"{i}": (prompt(2 + 3 * p, seed=p), n) for i, (_, p, n) in enumerate(arrivals)}
    for step in range(13):
        for i, (when, _, _) in enumerate(arrivals):
            if when == step:
                driven.add(request(f"{i}", *prompts[f"{i}"]))
        driven.step()
    driven.drain()
    for i, (ids, count) in prompts.items():
        assert driven.results[i].token_ids == reference(ids, count)
    assert driven.scheduler.blocks.num_free == 12


async def test_when_the_cache_is_too_small_all_finish_with_their_tokens(
    tiny_llama: Path, reference: Callable[[list[int], int], list[int]]
) -> None:
    prompts = {f"{i}": prompt(5 + i, seed=i) for i in range(6)}
    async with running(tiny_llama, **few_blocks(12)) as engine:
        assert engine.limits.context_length == 48
        found = await collect_all(engine, [request(i, ids, 24) for i, ids in prompts.items()])
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    for i, ids in prompts.items():
        assert found[i].token_ids == reference(ids, 24)


async def test_more_requests_than_fit_a_step(
    tiny_llama: Path, reference: Callable[[list[int], int], list[int]]
) -> None:
    prompts = {f"{i}": prompt(3 + i % 5, seed=i % 5) for i in range(20)}
    async with running(tiny_llama, max_num_seqs=3, max_num_batched_tokens=5) as engine:
        found = await collect_all(engine, [request(i, ids, 6) for i, ids in prompts.items()])
    assert all(found[i].token_ids == reference(ids, 6) for i, ids in prompts.items())


async def test_outputs_say_when_a_request_was_first_scheduled(tiny_llama: Path) -> None:
    before_s = time.monotonic()
    async with running(tiny_llama) as engine:
        result = await collect(engine, request("a", prompt(5), 4))
    times = {o.scheduled_s for o in result.outputs}
    assert len(times) == 1
    assert before_s <= times.pop() <= time.monotonic()
    assert [o.finish_reason for o in result.outputs] == [None, None, None, FinishReason.LENGTH]


# --- ends ----------------------------------------------------------------------------------------


async def test_cancelling_frees_the_cache_at_the_next_step(tiny_llama: Path) -> None:
    async with running(tiny_llama) as engine:
        async with aclosing(engine.generate(request("a", prompt(9), 100, **LONG))) as outputs:
            assert (await anext(outputs)).token_ids
            assert engine.stats().kv_cache_usage > 0
        stats = engine.stats()
        assert (stats.kv_cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)
        assert (await collect(engine, request("a", prompt(9), 2))).token_ids, "its id is free again"


def test_a_cancelled_request_is_gone_after_one_step(executor: TorchExecutor) -> None:
    driven = Driven(executor)
    seq = driven.add(request("a", prompt(9), 100, **LONG))
    driven.add(request("b", prompt(5), 100, **LONG))
    waiting = driven.add(request("c", prompt(5), 100, **LONG))
    driven.step()
    seq.cancelled = waiting.cancelled = True
    driven.step()
    assert driven.results["a"].reason is driven.results["c"].reason is FinishReason.CANCELLED
    assert driven.results["b"].reason is None
    assert seq.block_table == [] and len(driven.scheduler.running) == 1


def test_a_deadline_ends_it_in_the_middle(
    executor: TorchExecutor, reference: Callable[[list[int], int], list[int]]
) -> None:
    driven = Driven(executor)
    deadline_s = time.monotonic() + 0.2
    driven.add(request("a", prompt(9), 100, deadline_s=deadline_s, **LONG))
    driven.add(request("b", prompt(5), 30, **LONG))
    for _ in range(3):
        driven.step()
    time.sleep(max(0.0, deadline_s - time.monotonic()))
    driven.drain()
    assert driven.results["a"].reason is FinishReason.DEADLINE
    assert driven.results["a"].token_ids == reference(prompt(9), 3)
    assert len(driven.results["b"].token_ids) == 30


async def test_a_reader_cancelled_twice_leaves_nothing_behind(tiny_llama: Path) -> None:
    """It does not even wait until the step thread has let go."""
    stuck, go = threading.Event(), threading.Event()

    class SlowToStep(TorchExecutor):
        def run(self, batch: PackedBatch) -> Tensor:
            if batch.sequences[0].num_tokens == 9:
                stuck.set()
                assert go.wait(10)
            return super().run(batch)

    async with running(tiny_llama, make=SlowToStep) as engine:
        reading = asyncio.create_task(collect(engine, request("a", prompt(9), 50, **LONG)))
        await until(stuck.is_set)
        for _ in range(2):
            reading.cancel()
            await asyncio.sleep(0.01)
        assert reading.done()
        with pytest.raises(KasaError, match="'a' is in use"):
            await collect(engine, request("a", prompt(4), 3))
        go.set()
        await until(lambda: not engine.stats().num_running + engine.stats().num_waiting)
        assert (await collect(engine, request("a", prompt(4), 3))).token_ids, "its id is free"
        stats = engine.stats()
        assert (stats.kv_cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)


# --- what the outputs say ------------------------------------------------------------------------


async def test_a_seed_gives_the_same_tokens_alone_in_a_crowd_and_after_preemption(
    tiny_llama: Path,
) -> None:
    wanted = {
        f"{seed}": request(f"{seed}", prompt(6, seed=3), 24, temperature=1.0, seed=seed, **LONG)
        for seed in range(5)
    }
    async with running(tiny_llama) as engine:
        alone = {i: (await collect(engine, r)).token_ids for i, r in wanted.items()}
        crowd = await collect_all(engine, list(wanted.values()))
    async with running(tiny_llama, max_num_batched_tokens=16, **few_blocks(12)) as engine:
        small = await collect_all(engine, list(wanted.values()))
        assert engine.stats().num_preemptions > 0
    assert len({tuple(ids) for ids in alone.values()}) == 5
    assert {i: r.token_ids for i, r in crowd.items()} == alone
    assert {i: r.token_ids for i, r in small.items()} == alone


# --- death and closing ---------------------------------------------------------------------------


class Dying(TorchExecutor):
    """Breaks in the step after `doom` was set."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.doom = threading.Event()

    def run(self, batch: PackedBatch) -> Tensor:
        if getattr(self, "doom", None) and self.doom.is_set():
            raise RuntimeError("the device fell off the bus")
        return super().run(batch)


class DyingInCommit(TorchExecutor):
    def prepare_merge(self, *args: Any) -> Commit:
        def commit() -> None:
            raise RuntimeError("half merged")

        return commit


@pytest.mark.parametrize("failure", ["step", "commit"])
async def test_death_fails_all_requests_and_all_later_calls(
    failure: str, tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    first, second = adapters[:2]
    kind = {"step": Dying, "commit": DyingInCommit}[failure]
    made: list[Any] = []

    def make(*args: Any) -> TorchExecutor:
        made.append(kind(*args))
        return made[0]

    changes = {"max_num_seqs": 2, "max_num_batched_tokens": 8}
    async with asyncio.timeout(10), running(tiny_llama, tails, [first], make, **changes) as engine:
        # two run, the third waits
        wanted = [request(f"{i}", prompt(5), 100, **LONG) for i in range(3)]
        reading = [asyncio.create_task(collect(engine, w)) for w in wanted]
        await until(lambda: engine.stats().num_running == 2)
        if failure == "step":
            made[0].doom.set()
        else:
            with pytest.raises(RuntimeError, match="half merged"):
                await engine.merge_adapter(first.key)
        for task in reading:
            with pytest.raises(EngineDead, match="restart") as caught:
                await task
            assert isinstance(caught.value.__cause__, RuntimeError)
        assert not engine.alive
        later: Mapping[str, Callable[[], Any]] = {
            "generate": lambda: collect(engine, request("d", prompt(5))),
            "load": lambda: engine.load_adapter(second),
            "load again": lambda: engine.load_adapter(first),
            "unload": lambda: engine.unload_adapter(first.key),
            "merge": lambda: engine.merge_adapter(first.key),
            "unmerge": engine.unmerge_adapter,
        }
        for name, call in later.items():
            with pytest.raises(EngineDead):
                await call()
                pytest.fail(f"{name} did not raise")
        assert engine.stats().num_steps > 0


async def test_death_fails_a_change_that_waits_for_its_turn(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    made: list[Dying] = []
    stuck = threading.Event()

    class DyingLate(Dying):
        def run(self, batch: PackedBatch) -> Tensor:
            if getattr(self, "doom", None) and self.doom.is_set():
                stuck.set()
                time.sleep(0.2)  # the change arrives meanwhile
            return super().run(batch)

    def make(*args: Any) -> Dying:
        made.append(DyingLate(*args))
        return made[0]

    async with asyncio.timeout(10), running(tiny_llama, tails, make=make) as engine:
        made[0].doom.set()
        reading = asyncio.create_task(collect(engine, request("a", prompt(5))))
        await until(stuck.is_set)
        with pytest.raises(EngineDead):
            await engine.load_adapter(adapters[0])
        with pytest.raises(EngineDead):
            await reading


async def test_calls_while_it_closes_are_refused_and_do_not_hang(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    class SlowToClose(TorchExecutor):
        def close(self) -> None:
            time.sleep(0.3)
            super().close()

    async with (
        asyncio.timeout(10),
        running(tiny_llama, tails, adapters[:1], SlowToClose) as engine,
    ):
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.1)
        with pytest.raises(EngineDead):
            await collect(engine, request("late", prompt(5)))
        with pytest.raises(EngineDead):
            await engine.load_adapter(adapters[1])
        await closing


async def test_a_change_that_is_prepared_while_it_closes_fails_as_such(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    preparing = threading.Event()

    class SlowToPrepare(TorchExecutor):
        def prepare_slots(self, *args: Any) -> Commit:
            preparing.set()
            time.sleep(0.2)
            return super().prepare_slots(*args)

    async with asyncio.timeout(10), running(tiny_llama, tails, make=SlowToPrepare) as engine:
        loading = asyncio.create_task(engine.load_adapter(adapters[0]))
        await until(preparing.is_set)
        await engine.close()
        with pytest.raises(EngineDead):
            await loading
