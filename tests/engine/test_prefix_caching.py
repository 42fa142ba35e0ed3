"""Equal beginnings over a real tiny model: what is found in the cache changes nothing but time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from engine.making import (
    MemoryTails,
    collect,
    collect_all,
    few_blocks,
    greedy,
    load_adapted,
    prompt,
    request,
    running,
)
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.native.executor import Executor
from kasa_runtime.engine.native.torch_executor import TorchExecutor

COUNT = 6
SHARED = prompt(64, seed=5)  # whole blocks of both executors
PROMPTS = [SHARED + prompt(3 + i, seed=i) for i in range(3)]
Key = str | None


@pytest.fixture(scope="module")
def want(
    tiny_llama: Path, bare: Any, adapters: list[AdapterWeights], tails: MemoryTails
) -> Mapping[tuple[Key, int], list[int]]:
    """Greedy tokens of transformers; None is the base."""
    models = {a.key: load_adapted(tiny_llama, a, tails) for a in adapters}
    return {
        (key, i): greedy(model, ids, COUNT)
        for key, model in {None: bare, **models}.items()
        for i, ids in enumerate(PROMPTS)
    }


async def ask(engine: Any, i: int, key: Key = None, salt: str = "") -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were found."""
    result = await collect(engine, request("a", PROMPTS[i], COUNT, key, cache_salt=salt))
    [num_cached] = {output.num_cached_tokens for output in result.outputs}
    return result.token_ids, num_cached


async def test_what_is_found_gives_the_same_tokens(
    tiny_llama: Path, executor_class: type[Executor], want: Mapping[tuple[Key, int], list[int]]
) -> None:
    async with running(tiny_llama, make=executor_class) as engine:
        assert await ask(engine, 0) == (want[None, 0], 0)
        assert await ask(engine, 1) == (want[None, 1], 64)
        repeated, num_cached = await ask(engine, 0)
        assert repeated == want[None, 0] and 64 <= num_cached < len(PROMPTS[0])
        together = await collect_all(engine, [request(f"{i}", PROMPTS[i], COUNT) for i in range(3)])
        stats = engine.stats()
    assert all(together[f"{i}"].token_ids == want[None, i] for i in range(3))
    assert stats.kv_cache_usage == 0
    asked = [PROMPTS[i] for i in (0, 1, 0, 0, 1, 2)]
    assert stats.prefix_cache_queries == sum(map(len, asked))
    assert stats.prefix_cache_hits >= 5 * 64


async def test_adapters_and_the_base_never_get_each_others(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    executor_class: type[Executor],
    want: Mapping[tuple[Key, int], list[int]],
) -> None:
    keys: list[Key] = [None, *(a.key for a in adapters)]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        for key in keys:
            assert await ask(engine, 0, key) == (want[key, 0], 0)
        for key in reversed(keys):
            assert await ask(engine, 1, key) == (want[key, 1], 64)


async def test_a_merge_or_an_unmerge_begins_anew(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    executor_class: type[Executor],
    want: Mapping[tuple[Key, int], list[int]],
) -> None:
    keys: list[Key] = [None, adapters[0].key, adapters[1].key]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        for change in (
            lambda: engine.merge_adapter(adapters[0].key),
            lambda: engine.merge_adapter(adapters[1].key),
            engine.unmerge_adapter,
        ):
            for key in keys:
                assert await ask(engine, 0, key) == (want[key, 0], 0)
            for key in keys:
                assert await ask(engine, 1, key) == (want[key, 1], 64)
            await change()
        assert await ask(engine, 0) == (want[None, 0], 0)


async def test_salts_never_get_each_others(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    executor_class: type[Executor],
    want: Mapping[tuple[Key, int], list[int]],
) -> None:
    keys: list[Key] = [None, adapters[0].key, adapters[1].key]
    salts = ["", "tenant a", "tenant b"]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        for key in keys:
            for salt in salts:
                assert await ask(engine, 0, key, salt) == (want[key, 0], 0)
        for key in keys:
            for salt in salts:
                assert await ask(engine, 1, key, salt) == (want[key, 1], 64)


async def test_an_adapter_that_comes_back_finds_its_own_and_its_slots_next_user_does_not(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    want: Mapping[tuple[Key, int], list[int]],
) -> None:
    first, second = adapters[:2]
    async with running(tiny_llama, tails, max_slots=1) as engine:
        for adapter, i, num_cached in ((first, 0, 0), (second, 0, 0), (first, 1, 64)):
            await engine.load_adapter(adapter)
            assert await ask(engine, i, adapter.key) == (want[adapter.key, i], num_cached)
            await engine.unload_adapter(adapter.key)


async def test_what_a_cancelled_request_computed_is_found(
    tiny_llama: Path, want: Mapping[tuple[Key, int], list[int]]
) -> None:
    async with running(tiny_llama) as engine:
        cancelled = request("a", PROMPTS[0], 50, ignore_eos=True)
        async with aclosing(engine.generate(cancelled)) as outputs:
            await anext(outputs)
        assert engine.stats().kv_cache_usage == 0
        assert await ask(engine, 1) == (want[None, 1], 64)


async def test_a_small_cache_evicts_preempts_and_gives_the_same_tokens(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
) -> None:
    keys: list[Key] = [None, adapters[0].key, adapters[2].key]
    wanted = [
        request(f"{i}", SHARED[:24] + prompt(i % 5, seed=i), 20, keys[i % 3]) for i in range(18)
    ]
    found = {}
    for caching in (True, False):
        async with running(
            tiny_llama, tails, adapters, max_num_seqs=6, prefix_caching=caching, **few_blocks(32)
        ) as engine:
            results = await collect_all(engine, wanted)
            stats = engine.stats()
        assert stats.num_preemptions > 0 and stats.kv_cache_usage == 0
        assert (stats.prefix_cache_hits > 0) == caching
        found[caching] = {i: result.token_ids for i, result in results.items()}
    assert found[True] == found[False]


async def test_turned_off_it_finds_nothing(tiny_llama: Path) -> None:
    async with running(tiny_llama, make=TorchExecutor, prefix_caching=False) as engine:
        for _ in range(2):
            assert (await ask(engine, 0))[1] == 0
        assert engine.stats().prefix_cache_queries == 0


def test_the_adapters_differ(want: Mapping[tuple[Key, int], list[int]]) -> None:
    assert len({tuple(ids) for (_, i), ids in want.items() if i == 0}) == 4
