"""Adapters that are in memory and in no slot."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Callable

import pytest

from adapter.bench import Bench, Holder, until
from adapter.making import edit_tensors
from kasa_runtime.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.errors import AdapterInvalid, AdapterNotFound
from kasa_runtime.types import AdapterTier

PLENTY = 1 << 30


def reads(bench: Bench) -> list[str]:
    return [stage.partition(" ")[0] for stage in bench.seen.stages if stage.endswith(" read")]


async def use(bench: Bench, *names: str) -> None:
    """A request of each, one after another."""
    for name in names:
        async with bench.manager.lease(name):
            pass


async def size_of_one(bench: Bench, name: str) -> int:
    async with bench.manager.lease(name) as lease:
        return bench.host.loaded[lease.key].size_bytes


class TestEviction:
    async def test_from_a_slot_comes_back_without_a_read(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            await use(bench, "a")
            (given,) = bench.host.loaded.values()
            await use(bench, "b")
            assert bench.tiers() == {"a": AdapterTier.HOST, "b": AdapterTier.SLOT}
            assert bench.manager.resident_names() == {"a": "host", "b": "slot"}
            await use(bench, "a")
            assert reads(bench) == ["a", "b"] and bench.loads == ["a", "b", "a"]
            (given_again,) = bench.host.loaded.values()
            assert given_again is given

    async def test_weights_are_in_one_place(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            one = await size_of_one(bench, "a")
            assert bench.manager.host_tier_bytes == 0
            await use(bench, "b", "a", "b")
            assert bench.manager.host_tier_bytes == one

    async def test_the_least_recently_used_leave_memory(self, start, put):
        for seed, name in enumerate("abcd"):
            put(name, seed)
        async with start() as bench:
            one = await size_of_one(bench, "a")
        async with start(max_slots=1, max_host_bytes=2 * one) as bench:
            await use(bench, *"abcd")
            assert [name for name, tier in bench.tiers().items() if tier == "host"] == ["b", "c"]
            assert bench.manager.host_tier_bytes == 2 * one
            await use(bench, "b")  # c and d are beside it now
            bench.seen.stages.clear()
            await use(bench, "c", "d", "b", "a")
            assert reads(bench) == ["a"]

    @pytest.mark.parametrize("max_host_bytes", [0, 100])
    async def test_what_does_not_fit_is_read_again(self, start, put, max_host_bytes):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=max_host_bytes) as bench:
            await use(bench, "a", "b", "a")
            assert reads(bench) == ["a", "b", "a"] and bench.manager.host_tier_bytes == 0
            assert bench.tiers()["b"] is AdapterTier.DISK

    async def test_many_requests_that_come_go_and_are_cancelled(self, start, put):
        """Every version is in one place at most, whatever happens; none is served wrong."""
        for i in range(5):
            put(f"a{i}", i)
        async with start(max_slots=2, max_host_bytes=PLENTY) as bench:
            holders = []
            for i in range(80):
                holder = Holder(bench.manager, f"a{i * 7 % 5}")
                holders.append(holder)
                await asyncio.sleep(i % 3 / 1000)
                if i % 4 == 0:
                    holder.task.cancel()
                else:
                    holder.let_go.set()
                both = set(bench.manager._residency.host_tier) & bench.host.loaded.keys()
                assert not both
            results = await asyncio.gather(*(h.task for h in holders), return_exceptions=True)
            assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
            await until(lambda: all(r.idle for r in bench.manager._residency._resident.values()))
            assert all(key == weights.key for key, weights in bench.host.loaded.items())
            assert len(bench.manager.resident_names()) == 5


class TestLeaving:
    """Memory is given back when the version is not served any more."""

    @pytest.fixture
    async def bench(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            async with bench.manager.lease("a") as lease:
                self.weights = weakref.ref(bench.host.loaded[lease.key])
            await use(bench, "b")
            assert self.weights() is not None and bench.tiers()["a"] is AdapterTier.HOST
            yield bench

    def require_gone(self, bench: Bench) -> None:
        gc.collect()
        assert self.weights() is None and bench.manager.host_tier_bytes == 0

    async def test_replaced(self, bench, put):
        put("a", 3)
        await bench.manager.rescan(settled=True)
        self.require_gone(bench)
        assert bench.tiers()["a"] is AdapterTier.DISK

    async def test_rolled_back(self, bench, put):
        put("a", 3)
        await bench.manager.rescan(settled=True)
        await bench.manager.load("a")
        await use(bench, "b")
        assert bench.manager.host_tier_bytes > 0
        await bench.manager.rollback("a")
        self.require_gone(bench)

    async def test_deleted(self, bench):
        await bench.manager.delete("a")
        self.require_gone(bench)

    async def test_deleted_by_another_server(self, bench, root):
        AdapterStore(root).delete("a")
        await bench.manager.rescan()
        self.require_gone(bench)

    async def test_unloaded(self, bench):
        assert (await bench.manager.unload("a")).tier is AdapterTier.DISK
        self.require_gone(bench)

    async def test_unloaded_from_its_slot(self, bench):
        await use(bench, "a")
        await bench.manager.unload("a")
        gc.collect()
        assert self.weights() is None and bench.tiers()["a"] is AdapterTier.DISK

    async def test_older_version_is_not_kept(self, bench, put, root):
        one = bench.store.current("a").version
        put("a", 3)
        await bench.manager.rescan(settled=True)
        await use(bench, f"a@{one}", "b")
        assert bench.manager.resident_names() == {"b": "slot"}

    async def test_directory_removed(self, bench, root):
        shutil.rmtree(root / "a")
        await bench.manager.rescan(settled=True)
        self.require_gone(bench)


class TestWhatIsServed:
    async def test_is_what_was_checked_though_the_file_changed(self, start, put):
        """The key is the digest of the content, and the content is in memory."""
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            await use(bench, "a")
            (weights,) = bench.host.loaded.values()
            before = [delta.b.clone() for delta in weights.modules.values()]
            await use(bench, "b")
            stored = bench.store.current("a").directory
            edit_tensors(stored, lambda tensors: [t.fill_(0.5) for t in tensors.values()])
            await use(bench, "a")
            (again,) = bench.host.loaded.values()
            assert all(
                (delta.b == b).all()
                for delta, b in zip(again.modules.values(), before, strict=True)
            )
            await bench.manager.unload("a")
            with pytest.raises(AdapterInvalid, match="changed on disk"):
                await use(bench, "a")

    async def test_in_place_on_a_read_only_directory(self, start, put, root):
        """There the files that are served may be overwritten under the server."""
        put("a", 1), put("b", 2)
        (root / ".kasa").write_text("not a directory")
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            await use(bench, "a", "b")
            two = put("a", 3)
            await bench.manager.rescan(settled=True)
            async with bench.manager.lease("a") as lease:
                assert lease.version == two
                assert bench.host.loaded.keys() == {f"a@{two}"}


@pytest.fixture
def slow_read(monkeypatch) -> Callable[[Bench], asyncio.Event]:
    """Makes reads wait for an event."""

    def slow(bench: Bench) -> asyncio.Event:
        let_read = asyncio.Event()
        tier = bench.manager._residency.host_tier
        read = tier._read

        async def wait_and_read(info):
            await let_read.wait()
            return await read(info)

        monkeypatch.setattr(tier, "_read", wait_and_read)
        return let_read

    return slow


class TestPrefetch:
    async def test_takes_a_free_slot(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=2, max_host_bytes=PLENTY) as bench:
            for name in "ab":
                info = await bench.manager.load(name)
                assert (info.state, info.tier, info.in_flight) == ("resident", "slot", 0)

    async def test_takes_the_slot_that_was_idle_for_longest(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=2, max_host_bytes=PLENTY) as bench:
            await use(bench, "a", "b", "a")
            assert (await bench.manager.load("c")).tier is AdapterTier.SLOT
            assert bench.tiers() == {"a": "slot", "b": "host", "c": "slot"}

    async def test_comes_into_memory_while_all_slots_are_held(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            a = await Holder(bench.manager, "a").holding()
            info = await bench.manager.load("b")
            assert (info.state, info.tier) == ("ready", "host")
            assert a.key in bench.host.loaded and bench.loads == ["a"]
            await a.end()
            await use(bench, "b")
            assert reads(bench) == ["a", "b"]

    async def test_without_a_tier_nothing_is_read_for_it(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            a = await Holder(bench.manager, "a").holding()
            assert (await bench.manager.load("b")).tier is AdapterTier.DISK
            assert reads(bench) == ["a"]
            await a.end()

    async def test_leaves_the_slot_to_requests_that_wait_for_one(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            a = await Holder(bench.manager, "a").holding()
            b = Holder(bench.manager, "b")
            await until(lambda: bool(bench.manager._residency._waiting))
            loads = [asyncio.create_task(bench.manager.load("c")) for _ in range(3)]
            await a.end()
            await b.holding()
            assert {(await load).tier for load in loads} == {AdapterTier.HOST}
            assert bench.loads == ["a", "b"]
            await b.end()

    async def test_of_what_is_there_is_a_use(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=2, max_host_bytes=PLENTY) as bench:
            for name in "aba":
                await bench.manager.load(name)
            await use(bench, "c")
            assert bench.tiers() == {"a": "slot", "b": "host", "c": "slot"}

    async def test_many_at_once_and_a_request_read_once(self, start, put, slow_read):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            b = await Holder(bench.manager, "b").holding()
            let_read = slow_read(bench)
            loads = [asyncio.create_task(bench.manager.load("a")) for _ in range(5)]
            await asyncio.sleep(0.01)
            await b.end()
            a = Holder(bench.manager, "a")
            await asyncio.sleep(0.01)
            let_read.set()
            await a.holding()
            await asyncio.gather(*loads)
            assert reads(bench) == ["b", "a"]
            assert bench.tiers()["a"] is AdapterTier.SLOT
            assert bench.manager.host_tier_bytes == bench.host.loaded[a.key].size_bytes  # b's
            await a.end()

    @pytest.mark.parametrize("what", ["unload", "replace", "delete"])
    async def test_what_goes_while_it_is_read_does_not_stay(self, start, put, slow_read, what):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            b = await Holder(bench.manager, "b").holding()
            let_read = slow_read(bench)
            load = asyncio.create_task(bench.manager.load("a"))
            await asyncio.sleep(0.01)
            if what == "unload":
                await bench.manager.unload("a")
            elif what == "delete":
                await bench.manager.delete("a")
            else:
                put("a", 3)
                await bench.manager.rescan(settled=True)
            let_read.set()
            await asyncio.wait([load])
            assert bench.manager.host_tier_bytes == 0
            assert "a" not in bench.manager.resident_names()
            if what == "delete":
                assert isinstance(load.exception(), AdapterNotFound)
            await b.end()

    async def test_cancelled_while_it_is_read_is_finished_and_kept(self, start, put, slow_read):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            b = await Holder(bench.manager, "b").holding()
            let_read = slow_read(bench)
            load = asyncio.create_task(bench.manager.load("a"))
            await asyncio.sleep(0.01)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            let_read.set()
            await until(lambda: bench.tiers()["a"] is AdapterTier.HOST)
            await b.end()

    async def test_error_is_told_and_nothing_stays(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1, max_host_bytes=PLENTY) as bench:
            b = await Holder(bench.manager, "b").holding()
            (bench.store.current("a").directory / WEIGHTS_FILE).write_bytes(b"torn")
            with pytest.raises(AdapterInvalid):
                await bench.manager.load("a")
            assert bench.manager.host_tier_bytes == 0
            put("a", 3)
            assert (bench.store.root / "a" / CONFIG_FILE).exists()
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.load("a")).tier is AdapterTier.HOST
            await b.end()
