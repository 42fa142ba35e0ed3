"""Adapters in one batch, merged and not: every way gives what the adapted model alone gives."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.making import (
    MemoryTails,
    Result,
    collect,
    collect_all,
    config,
    greedy,
    load_adapted,
    logits_of,
    make_deltas,
    prompt,
    request,
    running,
    until,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights, ModuleDelta
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.engine.native.executor import (
    NO_SLOT,
    Commit,
    Executor,
    PackedBatch,
    SequenceSlice,
)
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import CapacityExceeded

COUNT = 12
PROMPTS = {i: prompt(4 + 3 * i, seed=i) for i in range(8)}
TOLERANCE = 2e-4  # float32 sums in another order, through three layers


@pytest.fixture(scope="module")
def adapted(
    tiny_llama: Path, bare: Any, adapters: list[AdapterWeights], tails: MemoryTails
) -> Mapping[str | None, Any]:
    """transformers models: None is the base, the others have the adapter in their weights."""
    models = {a.key: load_adapted(tiny_llama, a, tails) for a in adapters}
    return {None: bare, **models}


@pytest.fixture(scope="module")
def want(adapted: Mapping[str | None, Any]) -> Mapping[tuple[str | None, int], list[int]]:
    return {(k, i): greedy(m, p, COUNT) for k, m in adapted.items() for i, p in PROMPTS.items()}


@pytest.fixture
def loaded(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails, executor_class: Any
) -> Any:
    """An executor whose slots 0, 1, 2 hold the adapters."""
    executor = executor_class(tiny_llama, config())
    for slot, adapter in enumerate(adapters):
        executor.prepare_slots({slot: adapter}, tails)()
    return executor


def logits_by_slot(executor: Executor) -> dict[int, Tensor]:
    """One step with a row for each slot, base included, prompts of different lengths."""
    order = [1, NO_SLOT, 2, 0, NO_SLOT, 1]
    parts = [SequenceSlice(5 + i, 0, range(4 * i, 4 * i + 4), s) for i, s in enumerate(order)]
    tokens = [token for part in parts for token in prompt(part.num_tokens)]
    logits = executor.run(PackedBatch.pack(tokens, parts, list(range(len(tokens))))).clone()
    rows = logits.split([part.num_tokens for part in parts])
    return dict(zip(order, rows, strict=True))  # of a slot that occurs twice, the later row


def assert_exact(executor: Executor, adapted: Mapping[str | None, Any]) -> None:
    keys = [None, "kasa@1", "kasa-wide@1", "lora@1"]  # slots -1, 0, 1, 2
    for slot, logits in logits_by_slot(executor).items():
        reference = logits_of(adapted[keys[slot + 1]], prompt(len(logits)))
        assert float((logits - reference).abs().max()) < TOLERANCE, keys[slot + 1]


def requests(keys: list[str | None]) -> list[Any]:
    return [
        request(f"{key}/{i}", PROMPTS[i], COUNT, key)
        for i, key in enumerate(keys[j % len(keys)] for j in range(len(PROMPTS)))
    ]


def assert_tokens(
    found: Mapping[str, Result], want: Mapping[tuple[str | None, int], list[int]]
) -> None:
    for request_id, result in found.items():
        key, _, i = request_id.rpartition("/")
        assert result.token_ids == want[None if key == "None" else key, int(i)], request_id


def test_the_adapters_differ_visibly(
    adapted: Mapping[str | None, Any], want: Mapping[tuple[str | None, int], list[int]]
) -> None:
    rows = [logits_of(model, PROMPTS[3]) for model in adapted.values()]
    for i, row in enumerate(rows):
        assert all(float((row - other).abs().max()) > 0.5 for other in rows[i + 1 :])
    assert len({tuple(want[key, 3]) for key in adapted}) == len(adapted)


def test_mixed_rows_have_the_logits_of_their_own_models(
    loaded: Any, adapted: Mapping[str | None, Any]
) -> None:
    assert_exact(loaded, adapted)


def test_the_last_layers_adapters_follow_the_rows_whose_logits_are_asked(
    tiny_llama: Path, bare: Any, base: BaseModel, tails: MemoryTails, executor_class: Any
) -> None:
    adapter = make_deltas(base, "head@1", ("lm_head", "v_proj"), r=4, t=2, seed=5)
    executor = executor_class(tiny_llama, config())
    executor.prepare_slots({0: adapter}, tails)()
    parts = [SequenceSlice(5, 0, range(2), NO_SLOT), SequenceSlice(7, 0, range(4, 6), 0)]
    logits = executor.run(PackedBatch.pack(prompt(5) + prompt(7), parts, [4, 10, 11]))
    own = logits_of(load_adapted(tiny_llama, adapter, tails), prompt(7))
    want = torch.cat([logits_of(bare, prompt(5))[4:], own[5:]])
    assert float((logits - want).abs().max()) < TOLERANCE


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_any_row_is_exact_while_an_adapter_is_merged(
    slot: int, loaded: Any, adapted: Mapping[str | None, Any], tails: MemoryTails
) -> None:
    loaded.prepare_merge(slot, tails)()
    assert_exact(loaded, adapted)
    loaded.prepare_unmerge()()
    assert_exact(loaded, adapted)


async def test_batched_equals_one_by_one(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
    executor_class: Any,
) -> None:
    keys = [None, *(a.key for a in adapters)]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        together = await collect_all(engine, requests(keys))
        alone = {r.request_id: await collect(engine, r) for r in requests(keys)}
    assert_tokens(together, want)
    assert_tokens(alone, want)
    assert {mode for r in together.values() for mode in r.modes} == {"base", "batched"}


async def test_merged_equals_batched_and_others_go_on_exactly(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
    executor_class: Any,
) -> None:
    keys = [None, *(a.key for a in adapters)]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        for adapter in adapters:
            await engine.merge_adapter(adapter.key)
            found = await collect_all(engine, requests(keys))
            assert_tokens(found, want)
            modes = {r.partition("/")[0]: set(result.modes) for r, result in found.items()}
            others = {k.key: {"batched"} for k in adapters if k is not adapter}
            assert modes == {"None": {"base"}, adapter.key: {"merged"}, **others}


async def test_merging_while_requests_run_does_not_change_their_tokens(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
    executor_class: Any,
) -> None:
    keys = [None, *(a.key for a in adapters)]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:

        async def swap() -> None:
            for i in range(4):
                await engine.merge_adapter(adapters[i % 3].key)
                await engine.unmerge_adapter() if i % 2 else None

        swapping = asyncio.create_task(swap())
        while not swapping.done():
            assert_tokens(await collect_all(engine, requests(keys)), want)
        await swapping


def test_a_hundred_swaps_leave_the_weights_of_a_fresh_load(
    tiny_llama: Path, loaded: Any, tails: MemoryTails, executor_class: Any
) -> None:
    fresh = executor_class(tiny_llama, config()).weights()
    merged = {}
    for slot in range(3):
        loaded.prepare_merge(slot, tails)()
        merged[slot] = loaded.weights()
        loaded.prepare_unmerge()()
    draw = random.Random(0)
    for i in range(120 if executor_class is TorchExecutor else 6):  # the other compiles each time
        slot = draw.randrange(3)
        loaded.prepare_merge(slot, tails)()
        if i % 10 in (0, 5):
            assert_bitwise(loaded.weights(), merged[slot])
        if draw.random() < 0.5:  # else the next one replaces it without unmerging
            loaded.prepare_unmerge()()
            assert_bitwise(loaded.weights(), fresh)
    loaded.prepare_unmerge()()
    assert_bitwise(loaded.weights(), fresh)
    for slot in range(3):
        loaded.prepare_slots({slot: None}, tails)()
    assert_bitwise(loaded.weights(), fresh)


def test_merging_a_plain_lora_decomposes_nothing(
    tiny_llama: Path,
    base: BaseModel,
    adapters: list[AdapterWeights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KASA_HOME", str(tmp_path))
    tails = TailCache(base)
    executor = TorchExecutor(tiny_llama, config())
    executor.prepare_slots({0: adapters[2]}, tails)()
    executor.prepare_merge(0, tails)()
    assert {tails.cached_rank(name) for name in adapters[2].modules} == {0}


def test_base_weights_are_those_on_disk(loaded: Any, base: BaseModel, tails: MemoryTails) -> None:
    """Loading, unloading and merging leave the pristine weights as they were read."""
    for slot in (0, 1):
        loaded.prepare_slots({slot: None}, tails)()
    assert_bitwise(loaded.weights(), {name: base.weight(name) for name in base.modules})


def assert_bitwise(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


async def test_loading_and_unloading_do_not_disturb_running_requests(
    tiny_llama: Path,
    base: BaseModel,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
    executor_class: Any,
) -> None:
    keys = [None, adapters[0].key]
    passing = [
        make_deltas(base, f"passing-{i}@1", ("q_proj", "up_proj"), r=2 + i, t=9 + i, seed=i)
        for i in range(3)
    ]
    async with running(tiny_llama, tails, adapters[:1], executor_class) as engine:
        ended = False

        async def come_and_go() -> int:
            rounds = 0
            while not ended:
                for adapter in passing:
                    await engine.load_adapter(adapter)
                for adapter in passing:
                    await engine.unload_adapter(adapter.key)
                rounds += 1
            return rounds

        changing = asyncio.create_task(come_and_go())
        for _ in range(3):
            assert_tokens(await collect_all(engine, requests(keys)), want)
        ended = True
        assert await changing >= 1


def test_a_slot_is_reused_cleanly(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    adapted: Mapping[str | None, Any],
    executor_class: Any,
) -> None:
    """Layers of the adapter that was there before do not stay behind."""
    executor = executor_class(tiny_llama, config())
    for adapter in (adapters[0], adapters[1], adapters[0], adapters[2]):
        executor.prepare_slots({0: adapter}, tails)()
        part = SequenceSlice(9, 0, range(4), 0)
        logits = executor.run(PackedBatch.pack(prompt(9), [part], list(range(9))))
        reference = logits_of(adapted[adapter.key], prompt(9))
        assert float((logits - reference).abs().max()) < TOLERANCE
        executor.prepare_slots({0: None}, tails)()


async def test_loading_twice_and_unloading_what_is_not_there_are_no_ops(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails, executor_class: Any
) -> None:
    async with running(tiny_llama, tails, make=executor_class, max_slots=1) as engine:
        await engine.load_adapter(adapters[0])
        await engine.load_adapter(adapters[0])
        await engine.unload_adapter("nobody@1")
        await engine.unmerge_adapter()
        await engine.merge_adapter(adapters[0].key)
        await engine.merge_adapter(adapters[0].key)


class Counting(TorchExecutor):
    """Slow to prepare; fails for adapters named bad."""

    num_changes = 0

    def prepare_slots(self, contents: Mapping[int, AdapterWeights | None], tails: Any) -> Commit:
        time.sleep(0.05)
        self.num_changes += 1
        if any(adapter and adapter.key.startswith("bad") for adapter in contents.values()):
            raise OSError("the disk is gone")
        return super().prepare_slots(contents, tails)


async def test_changes_that_are_wanted_at_once_are_made_at_once(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
) -> None:
    """Those that come while the first is prepared: a load, and one in the place of the first."""
    first, second, third = adapters
    async with running(tiny_llama, tails, make=Counting, max_slots=2) as engine:
        await asyncio.gather(
            engine.load_adapter(first),
            engine.load_adapter(second),
            engine.load_adapter(third, instead_of=first.key),
        )
        assert engine._executor.num_changes == 2  # type: ignore[attr-defined]
        found = await collect_all(engine, requests([None, second.key, third.key]))
        assert_tokens(found, want)
        with pytest.raises(KeyError):
            await collect(engine, request("gone", prompt(3), adapter=first.key))


async def test_one_that_cannot_be_made_takes_no_other_with_it(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
) -> None:
    first, second, third = adapters
    bad = AdapterWeights("bad@1", first.modules)
    async with running(tiny_llama, tails, [first], Counting, max_slots=3) as engine:
        results = await asyncio.gather(
            engine.load_adapter(first),  # is there
            engine.load_adapter(second),
            engine.load_adapter(bad, instead_of=first.key),
            engine.load_adapter(third),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [NoneType, NoneType, OSError, NoneType]
        keys = [None, first.key, second.key, third.key]
        assert_tokens(await collect_all(engine, requests(keys)), want)


async def test_what_does_not_fit_is_refused_and_leaves_the_slot_free(
    tiny_llama: Path,
    base: BaseModel,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    executor_class: Any,
) -> None:
    wide = make_deltas(base, "wide@1", ("q_proj",), r=9)
    delta = ModuleDelta(torch.zeros(2, 64), torch.zeros(64, 2), 0)
    stray = AdapterWeights("stray@1", {"model.layers.9.self_attn.q_proj": delta})
    async with running(tiny_llama, tails, make=executor_class, max_slots=1, max_rank=8) as engine:
        with pytest.raises(CapacityExceeded, match="rank 9"):
            await engine.load_adapter(wide)
        with pytest.raises(CapacityExceeded, match="cannot adapt"):
            await engine.load_adapter(stray)
        await engine.load_adapter(adapters[0])
        with pytest.raises(CapacityExceeded, match="slots are taken"):
            await engine.load_adapter(adapters[1])
        await engine.merge_adapter(adapters[0].key)
        with pytest.raises(CapacityExceeded, match="unmerge it"):
            await engine.unload_adapter(adapters[0].key)
        with pytest.raises(KeyError):
            await engine.merge_adapter("nobody@1")
        with pytest.raises(KeyError):
            await collect(engine, request("a", prompt(3), adapter="nobody@1"))


class SlowToCommit(TorchExecutor):
    """Keeps the step thread inside the first commit after `hold` until `release`."""

    held: threading.Event | None = None
    go = threading.Event()

    def hold(self) -> None:
        self.held, self.go = threading.Event(), threading.Event()

    def release(self) -> None:
        self.go.set()

    def _slow(self, commit: Commit) -> Commit:
        def wait_and_commit() -> None:
            if self.held is not None:
                self.held.set()
                assert self.go.wait(10)
            commit()

        return wait_and_commit

    def prepare_slots(self, *args: Any) -> Commit:
        return self._slow(super().prepare_slots(*args))

    def prepare_merge(self, *args: Any) -> Commit:
        return self._slow(super().prepare_merge(*args))

    def prepare_unmerge(self) -> Commit:
        return self._slow(super().prepare_unmerge())


@pytest.mark.parametrize("operation", ["load", "unload", "merge", "unmerge"])
async def test_a_change_whose_caller_goes_away_is_carried_through(
    operation: str,
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[str | None, int], list[int]],
) -> None:
    """What the engine believes to be loaded and merged stays what the model holds."""
    first, second, third = adapters
    made: list[SlowToCommit] = []

    def make(*args: Any) -> SlowToCommit:
        made.append(SlowToCommit(*args))
        return made[0]

    async with running(tiny_llama, tails, [first], make, max_slots=2) as engine:
        if operation == "unmerge":
            await engine.merge_adapter(first.key)
        changes = {
            "load": lambda: engine.load_adapter(second),
            "unload": lambda: engine.unload_adapter(first.key),
            "merge": lambda: engine.merge_adapter(first.key),
            "unmerge": engine.unmerge_adapter,
        }
        made[0].hold()
        change = asyncio.create_task(changes[operation]())
        await until(lambda: made[0].held is not None and made[0].held.is_set())
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        made[0].release()
        await engine.load_adapter(first)
        await engine.unload_adapter(second.key)
        await engine.load_adapter(third)  # where the second one was, if it was
        found = await collect_all(engine, requests([None, first.key, third.key]))
        assert_tokens(found, want)
        await engine.unmerge_adapter()
        assert_bitwise(made[0].weights(), TorchExecutor(tiny_llama, config()).weights())
