"""Auto mode: the policy on a clock of its own, and the switches of a real runtime."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adapter.making import ALL_LINEAR, write_adapter
from engine.making import config, until

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.errors import AdapterNotFound, ConfigError, EngineDead, KasaError
from kasa_runtime.merging import MIN_TOKENS, AutoMerge, MergeConfig, MergePolicy
from kasa_runtime.runtime import Runtime, RuntimeConfig
from kasa_runtime.types import BASE, AdapterState, GenerationRequest, Mode, Observer, SamplingParams

WHILE_S = 0.5
"""Of a window of one second, in which the driver looks ten times."""
SETTINGS = MergeConfig(
    "auto", merge_share=0.8, unmerge_share=0.5, merge_window_s=10.0, merge_dwell_s=20.0
)
A, B = "a@1", "b@1"


class Clock:
    """Stands still until it is moved."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(clock: Clock) -> MergePolicy:
    return MergePolicy(SETTINGS, clock)


def count(policy: MergePolicy, **tokens: int) -> None:
    """Of the adapters a and b, and of the base."""
    for name, number in tokens.items():
        policy.count(BASE if name == "base" else f"{name}@1", number)


# --- policy --------------------------------------------------------------------------------------


def test_an_adapter_with_the_share_is_merged(policy: MergePolicy) -> None:
    count(policy, a=800, b=100, base=100)
    assert policy.shares() == {A: 0.8, B: 0.1, BASE: 0.1}
    assert policy.decide(BASE) == A


@pytest.mark.parametrize("tokens", [{"a": 790, "b": 210}, {"base": 1000}, {"base": 900, "a": 100}])
def test_nothing_is_merged_without_an_adapter_that_dominates(
    policy: MergePolicy, tokens: dict[str, int]
) -> None:
    count(policy, **tokens)
    assert policy.decide(BASE) == BASE


def test_few_tokens_decide_nothing(policy: MergePolicy) -> None:
    count(policy, a=MIN_TOKENS - 1)
    assert policy.shares() == {}
    assert (policy.decide(BASE), policy.decide(B)) == (BASE, B)
    count(policy, a=1)
    assert (policy.decide(BASE), policy.decide(B)) == (A, A)


@pytest.mark.parametrize(("share", "wanted"), [(799, A), (500, A), (499, BASE), (0, BASE)])
def test_a_merged_adapter_stays_between_the_thresholds(
    policy: MergePolicy, share: int, wanted: str
) -> None:
    count(policy, a=share, base=1000 - share)
    assert policy.decide(A) == wanted


def test_one_that_takes_over_is_merged_by_one_switch(policy: MergePolicy) -> None:
    count(policy, a=100, b=900)
    assert policy.decide(A) == B


def test_a_new_version_is_another_adapter(policy: MergePolicy) -> None:
    policy.count("a@2", 900)
    policy.count("a@1", 100)
    assert policy.decide("a@1") == "a@2"


def test_the_next_switch_waits_for_the_dwell_time(policy: MergePolicy, clock: Clock) -> None:
    policy.switched()
    clock.now_s += 19.9
    count(policy, a=1000)
    assert policy.decide(BASE) == BASE
    clock.now_s += 0.1
    assert policy.decide(BASE) == A


def test_only_the_window_counts(policy: MergePolicy, clock: Clock) -> None:
    count(policy, a=1000)
    clock.now_s += 5
    count(policy, b=1000)
    assert policy.shares() == {A: 0.5, B: 0.5}
    clock.now_s += 5
    assert policy.shares() == {B: 1.0}
    clock.now_s += 10
    assert policy.shares() == {}
    assert policy.decide(B) == B, "what is merged stays while there is no traffic"


def test_traffic_at_a_threshold_does_not_switch_to_and_fro(
    policy: MergePolicy, clock: Clock
) -> None:
    merged, switches = BASE, 0
    for second in range(600):
        clock.now_s += 1
        swing = 100 if second // 15 % 2 else -100  # from 70 to 90 %
        count(policy, a=800 + swing, base=200 - swing)
        wanted = policy.decide(merged)
        if wanted != merged:
            merged, switches = wanted, switches + 1
            policy.switched()
    assert (merged, switches) == (A, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "always"},
        {"merge_share": 0.5, "unmerge_share": 0.5},
        {"merge_share": 1.1},
        {"unmerge_share": -0.1},
        {"merge_window_s": 0.0},
        {"merge_dwell_s": -1.0},
        {"merge_share": float("nan")},
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MergeConfig(**changes)


# --- driver --------------------------------------------------------------------------------------


@dataclass
class Manager:
    """Merges, or fails as it is told."""

    merged: str | None = None
    error: KasaError | None = None
    num_calls: int = 0

    async def merge(self, spec: str) -> None:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        self.merged = spec

    async def unmerge(self) -> None:
        self.merged = None


async def test_a_switch_that_fails_waits_for_the_dwell_time(clock: Clock) -> None:
    manager, policy = Manager(error=KasaError("no room")), MergePolicy(SETTINGS, clock)
    fast = MergeConfig("auto", merge_window_s=0.01)
    auto = AutoMerge(fast, manager, Observer(), policy)
    count(policy, a=1000)
    await until(lambda: manager.num_calls == 1)
    await asyncio.sleep(0.02)
    assert manager.num_calls == 1
    manager.error = None
    clock.now_s += 20
    count(policy, a=1000)
    await until(lambda: manager.merged == A)
    await auto.close()


async def test_what_was_deleted_is_forgotten(clock: Clock) -> None:
    """And the next switch does not wait for it."""
    manager, policy = (
        Manager(error=AdapterNotFound("deleted", name="a")),
        MergePolicy(SETTINGS, clock),
    )
    auto = AutoMerge(MergeConfig("auto", merge_window_s=0.01), manager, Observer(), policy)
    count(policy, a=1000)
    await until(lambda: manager.num_calls == 1)
    await asyncio.sleep(0.02)
    assert manager.num_calls == 1
    manager.error = None
    count(policy, b=1000)
    await until(lambda: manager.merged == B)
    await auto.close()


async def test_it_ends_with_the_engine(clock: Clock) -> None:
    manager, policy = Manager(error=EngineDead("gone")), MergePolicy(SETTINGS, clock)
    auto = AutoMerge(MergeConfig("auto", merge_window_s=0.01), manager, Observer(), policy)
    count(policy, a=1000)
    await until(lambda: manager.num_calls == 1)
    await auto.close()
    assert manager.num_calls == 1


# --- runtime -------------------------------------------------------------------------------------


class Decisions(Observer):
    def __init__(self) -> None:
        self.found: list[str] = []

    def merge_decided(self, adapter: str) -> None:
        self.found.append(adapter)


async def start(model_dir: Path, root: Path, observer: Observer, dwell_s: float) -> Runtime:
    for seed, name in enumerate(("alpha", "beta")):
        write_adapter(root / name, BaseModel(model_dir), ALL_LINEAR, seed=seed)
    merging = MergeConfig("auto", merge_window_s=1.0, merge_dwell_s=dwell_s)
    settings = RuntimeConfig(str(model_dir), root, merging=merging, native=config())
    return await Runtime.create(settings, observer)


async def ask(runtime: Runtime, adapter: str) -> set[Mode]:
    """Eight generations at once: 800 tokens in far less than the window, on a busy machine too. How
    the adapter was applied."""

    async def one(number: int) -> Mode:
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        request = GenerationRequest(f"{adapter}/{number}", adapter, prompt="fox", sampling=sampling)
        return [chunk async for chunk in runtime.generate(request)][-1].mode

    return set(await asyncio.gather(*(one(number) for number in range(8))))


async def ask_until_merged(runtime: Runtime, adapter: str) -> None:
    """Send it all the traffic until `adapter` ("": nothing) is merged."""
    async with asyncio.timeout(60):
        while runtime.stats().merged_adapter.partition("@")[0] != adapter:
            await ask(runtime, adapter)


async def ask_for_a_while(runtime: Runtime, adapter: str) -> set[Mode]:
    """Send an adapter all the traffic while the driver looks some times, until its policy saw all
    of it as this adapter's. How the adapter was applied."""
    modes: set[Mode] = set()
    end_s = time.monotonic() + WHILE_S
    async with asyncio.timeout(60):
        while time.monotonic() < end_s or not runtime.stats().token_shares:
            modes |= await ask(runtime, adapter)
    [(key, share)] = runtime.stats().token_shares.items()
    assert (key.partition("@")[0], share) == (adapter, 1.0)
    return modes


async def test_the_adapter_with_the_traffic_is_merged_and_makes_room(
    tiny_chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kasa_runtime.merging")
    observer = Decisions()
    async with await start(tiny_chat_model, tmp_path, observer, dwell_s=0.0) as runtime:
        await ask_until_merged(runtime, "alpha")
        assert await ask_for_a_while(runtime, "alpha") == {Mode.MERGED}
        await ask_until_merged(runtime, "beta")
        await ask_until_merged(runtime, "")
    assert [name for name in observer.found if name] == ["alpha", "beta"]
    assert observer.found[-1] == ""
    assert "merging alpha@" in caplog.text and "merging nothing" in caplog.text


async def test_what_somebody_asks_for_holds_for_the_dwell_time(
    tiny_chat_model: Path, tmp_path: Path
) -> None:
    observer = Decisions()
    async with await start(tiny_chat_model, tmp_path, observer, dwell_s=1000.0) as runtime:
        await runtime.merge_adapter("beta")
        assert await ask_for_a_while(runtime, "alpha") == {Mode.BATCHED}
        await runtime.unmerge_adapter()
        assert await ask_for_a_while(runtime, "alpha") == {Mode.BATCHED}
    assert observer.found == []


async def test_what_nobody_asked_to_merge_need_not_be_unmerged(
    tiny_chat_model: Path, tmp_path: Path
) -> None:
    async with await start(tiny_chat_model, tmp_path, Observer(), dwell_s=1000.0) as runtime:
        await ask_until_merged(runtime, "alpha")
        info = await runtime.unload_adapter("alpha")
        assert info.state is AdapterState.READY
        await runtime.merge_adapter("alpha")
        await runtime.delete_adapter("alpha")
        assert [a.name for a in runtime.list_adapters()] == ["beta"]
        assert runtime.stats().merged_adapter == ""
