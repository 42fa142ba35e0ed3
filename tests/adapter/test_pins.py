"""Adapters that always have a slot."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from adapter.bench import Holder, blocked, until
from adapter.making import write_adapter
from kasa_runtime.errors import CapacityExceeded, EngineDead, InvalidRequest
from kasa_runtime.types import AdapterTier


async def use(bench, *names: str) -> None:
    for name in names:
        async with bench.manager.lease(name):
            pass


@pytest.fixture
def abc(put) -> dict[str, str]:
    """Three adapters, their versions by name."""
    return {name: put(name, seed) for seed, name in enumerate("abc")}


class TestPin:
    async def test_is_never_evicted(self, start, abc):
        async with start(max_slots=2) as bench:
            info = await bench.manager.load("a", pin=True)
            assert (info.state, info.pinned) == ("resident", True)
            await use(bench, *"bcbcb")
            await bench.manager.load("c")
            assert bench.loads.count("a") == 1 and bench.tiers()["a"] is AdapterTier.SLOT
            assert bench.manager.always_in_slots() == {"a"}

    async def test_of_one_that_is_loaded_is_a_pin(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a")
            await bench.manager.load("a", pin=True)
            await use(bench, "b", "c")
            assert bench.loads == ["a", "b", "c"] and bench.tiers()["a"] is AdapterTier.SLOT

    async def test_ends_by_unload(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            info = await bench.manager.unload("a")
            assert (info.pinned, info.tier) == (False, AdapterTier.DISK)
            assert bench.manager.always_in_slots() == set()
            await use(bench, "a", "b", "c")
            assert bench.tiers()["a"] is AdapterTier.DISK

    async def test_of_all_slots_is_refused(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            with pytest.raises(CapacityExceeded, match=r"a, b would have slots for good.* 2 slots"):
                await bench.manager.load("b", pin=True)
            assert bench.manager.always_in_slots() == {"a"}
            assert not (await bench.manager.get("b")).pinned
            await bench.manager.load("a", pin=True)  # again
            await bench.manager.unload("a")
            assert (await bench.manager.load("b", pin=True)).pinned

    async def test_of_the_only_slot_is_refused(self, start, abc):
        async with start(max_slots=1) as bench:
            with pytest.raises(CapacityExceeded, match="raise max_slots"):
                await bench.manager.load("a", pin=True)

    async def test_counts_the_merged_one(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.merge("a")
            with pytest.raises(CapacityExceeded):
                await bench.manager.load("b", pin=True)
            await bench.manager.load("a", pin=True)
            with pytest.raises(CapacityExceeded, match="a, b would have slots for good"):
                await bench.manager.merge("b")
            assert bench.manager.merged == f"a@{abc['a']}"
            await use(bench, "b", "c")

    async def test_waits_for_its_slot_and_counts_at_once(self, start, abc):
        async with start(max_slots=2) as bench:
            b, c = [await Holder(bench.manager, name).holding() for name in "bc"]
            pin = asyncio.create_task(bench.manager.load("a", pin=True))
            assert await blocked(pin)
            assert bench.manager.always_in_slots() == {"a"}
            await b.end()
            assert (await pin).tier is AdapterTier.SLOT
            await c.end()

    async def test_that_was_cancelled_is_none(self, start, abc):
        async with start(max_slots=2) as bench:
            held = [await Holder(bench.manager, name).holding() for name in "bc"]
            pin = asyncio.create_task(bench.manager.load("a", pin=True))
            assert await blocked(pin)
            pin.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pin
            assert bench.manager.always_in_slots() == set()
            for holder in held:
                await holder.end()
            assert "a" not in bench.loads

    async def test_that_could_not_be_loaded_is_none(self, start, abc):
        async with start(max_slots=2) as bench:
            bench.host.failing["load"] = EngineDead("no memory")
            with pytest.raises(EngineDead):
                await bench.manager.load("a", pin=True)
            assert bench.manager.always_in_slots() == set()

    async def test_is_of_a_name(self, start, abc):
        async with start(max_slots=2) as bench:
            with pytest.raises(InvalidRequest, match="follows it to new versions") as caught:
                await bench.manager.load(f"a@{abc['a']}", pin=True)
            assert caught.value.field == "pin"

    async def test_ends_with_its_name(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            await bench.manager.delete("a")
            assert bench.manager.always_in_slots() == set()
            assert (await bench.manager.load("b", pin=True)).pinned

    async def test_order_of_those_who_wait_for_slots_is_kept(self, start, abc, put):
        """A pin can be starved by no stream of requests, nor a request by a stream of pins."""
        put("d", 4)
        async with start(max_slots=3) as bench:
            held = [await Holder(bench.manager, name).holding() for name in "bcd"]
            pin = asyncio.create_task(bench.manager.load("a", pin=True))
            await until(lambda: len(bench.manager._residency._waiting) == 1)
            put("e", 5), put("f", 6)
            await bench.manager.rescan(settled=True)
            later = [Holder(bench.manager, name) for name in "ef"]
            await until(lambda: len(bench.manager._residency._waiting) == 3)
            await held[0].end()
            await pin
            for holder, free in zip(later, held[1:], strict=True):
                assert not holder.key
                await free.end()
                await holder.holding()
            for holder in later:
                await holder.end()


class TestFollows:
    async def test_the_new_version_takes_the_slot(self, start, abc, put):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            two = put("a", 9)
            await bench.manager.rescan(settled=True)
            await until(lambda: f"a@{two}" in bench.host.loaded)
            await until(lambda: f"a@{abc['a']}" not in bench.host.loaded)
            info = await bench.manager.get("a")
            assert (info.version, info.pinned) == (two, True)
            assert not (await bench.manager.get(f"a@{abc['a']}")).pinned
            await use(bench, "b", "c", "b")
            assert f"a@{two}" in bench.host.loaded

    async def test_also_by_rollback_while_both_are_held(self, start, abc, put):
        """The old version was to leave with its last request, and is the pinned one again."""
        async with start(max_slots=3) as bench:
            await bench.manager.load("a", pin=True)
            old = await Holder(bench.manager, "a").holding()
            two = put("a", 9)
            await bench.manager.rescan(settled=True)
            new = await Holder(bench.manager, "a").holding()
            assert new.key == f"a@{two}"
            await bench.manager.rollback("a")
            await until(lambda: not bench.manager._residency._keeping)
            await old.end()
            await new.end()
            assert bench.host.loaded.keys() == {old.key}
            await use(bench, "b", "c", "b")
            assert old.key in bench.host.loaded

    async def test_without_waiting_for_the_upload(self, start, abc, base, tmp_path):
        """Publishing returns though no slot is free for the new version yet."""
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            held = [await Holder(bench.manager, name).holding() for name in "ab"]
            info = await bench.upload(write_adapter(tmp_path / "new", base, seed=9), "a")
            assert info.pinned
            await held[1].end()
            await until(lambda: f"a@{info.version}" in bench.host.loaded)
            await held[0].end()
            assert held[0].key not in bench.host.loaded

    async def test_one_that_cannot_be_loaded_is_told(self, start, abc, put, caplog):
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            bench.host.failing["load"] = CapacityExceeded("rank 512")
            put("a", 9)
            await bench.manager.rescan(settled=True)
            await until(lambda: "a is pinned and cannot be loaded: rank 512" in caplog.text)
            assert bench.seen.load_failures == [("a", CapacityExceeded)]
            bench.host.failing.clear()
            await use(bench, "a")


class TestOfTheConfiguration:
    async def test_are_loaded_at_start(self, start, abc):
        async with start(max_slots=3, pinned=("a", "b")) as bench:
            await until(lambda: sorted(bench.loads) == ["a", "b"])
            await until(lambda: not bench.manager._residency._keeping)
        async with start(max_slots=3, pinned=("a",)) as bench:  # known by now
            await until(lambda: bench.tiers()["a"] is AdapterTier.SLOT)

    async def test_one_that_is_not_there_takes_no_slot_until_it_comes(self, start, abc, put):
        async with start(max_slots=2, pinned=("late",)) as bench:
            assert bench.manager.always_in_slots() == set()
            held = [await Holder(bench.manager, name).holding() for name in "ab"]
            version = put("late", 9)
            await bench.manager.rescan(settled=True)
            assert bench.manager.always_in_slots() == {"late"}
            for holder in held:
                await holder.end()
            await until(lambda: f"late@{version}" in bench.host.loaded)

    async def test_stands_though_its_name_was_gone_for_a_while(self, start, abc, put, root):
        async with start(max_slots=2, pinned=("a",)) as bench:
            shutil.rmtree(root / "a")
            await bench.manager.rescan(settled=True)
            assert bench.manager.always_in_slots() == set()
            put("a", 9)
            await bench.manager.rescan(settled=True)
            assert bench.manager.always_in_slots() == {"a"}

    async def test_more_than_slots_less_one_is_refused(self, start, abc):
        with pytest.raises(CapacityExceeded):
            async with start(max_slots=2, pinned=("a", "b")):
                pass

    async def test_closing_leaves_nobody_waiting(self, start, abc):
        async with start(max_slots=2, pinned=("late",)) as bench:
            held = [await Holder(bench.manager, name).holding() for name in "ab"]
            write_adapter(bench.store.root / "late", bench.manager._loader._tails.base, seed=9)
            await bench.manager.rescan(settled=True)
            assert bench.manager._residency._keeping
            await bench.manager._residency.close()
            assert not bench.manager._residency._keeping
            for holder in held:
                await holder.end()


class TestMerge:
    async def test_has_a_slot_kept_for_it_while_it_waits(self, start, abc):
        told = []
        async with start(max_slots=1) as bench:
            bench.manager.when_slots_change(lambda: told.append(bench.manager.always_in_slots()))
            b = await Holder(bench.manager, "b").holding()
            merge = asyncio.create_task(bench.manager.merge("a"))
            assert await blocked(merge)
            assert bench.manager.always_in_slots() == {"a"}
            later = Holder(bench.manager, "c")
            await b.end()
            assert (await merge).state == "merged"
            with pytest.raises(CapacityExceeded, match="has the only slot"):
                await later.task
            await bench.manager.unmerge()
            assert told[0] == {"a"} and told[-1] == set()

    async def test_that_gave_up_waiting_keeps_none(self, start, abc):
        async with start(max_slots=1) as bench:
            b = await Holder(bench.manager, "b").holding()
            merge = asyncio.create_task(bench.manager.merge("a"))
            assert await blocked(merge)
            merge.cancel()
            with pytest.raises(asyncio.CancelledError):
                await merge
            assert bench.manager.always_in_slots() == set()
            c = Holder(bench.manager, "c")
            await b.end()
            await (await c.holding()).end()

    async def test_undone_lets_those_in_who_wait_for_its_slot(self, start, abc):
        async with start(max_slots=2) as bench:
            await bench.manager.merge("a")
            b = await Holder(bench.manager, "b").holding()
            c = Holder(bench.manager, "c")
            assert await blocked(c.task)
            await bench.manager.unmerge()
            await (await c.holding()).end()
            await b.end()

    async def test_leaves_a_slot_to_others_while_its_old_version_is_merged(self, start, abc, put):
        """With two slots, one for the merged version and one for all else."""
        async with start(max_slots=2) as bench:
            await bench.manager.load("a", pin=True)
            await bench.manager.merge("a")
            put("a", 7)
            await bench.manager.rescan(settled=True)
            async with asyncio.timeout(10):
                await use(bench, *"bacb")
            await bench.manager.unmerge()
            await until(lambda: bench.tiers()["a"] is AdapterTier.SLOT)
            await use(bench, *"bcb")
            assert bench.tiers()["a"] is AdapterTier.SLOT
