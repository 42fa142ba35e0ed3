"""Residency over a fake engine: who holds which version; what is loaded, merged and served."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter.bench import Bench, Holder, blocked, until
from adapter.making import LAYER, edit_json, edit_tensors, make_adapter, write_adapter
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.checkpoint import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.errors import (
    AdapterInUse,
    AdapterInvalid,
    AdapterNotFound,
    AdapterQuarantined,
    BaseMismatch,
    CapacityExceeded,
    DigestMismatch,
    EngineDead,
    InvalidRequest,
    StoreReadOnly,
    VersionConflict,
)
from kasa_runtime.types import (
    AdapterMethod,
    AdapterState,
    AdapterTier,
    ManifestFile,
    UploadManifest,
)


class TestLease:
    async def test_loads_the_fold_of_the_version(self, start, put):
        version = put("a", alpha=16.0)
        async with start() as bench:
            async with bench.manager.lease("a") as lease:
                assert (lease.key, lease.name, lease.version) == (f"a@{version}", "a", version)
                delta = bench.host.loaded[lease.key].modules[LAYER]
                assert delta.a.shape == (4, 64) and delta.t == 4
            assert bench.seen.stages == ["a read", "a tail", "a slot"]

    async def test_stays_loaded_for_the_next_request(self, start, put):
        version = put("a")
        async with start() as bench:
            for spec in ("a", f"a@{version}", f"a@{version[:6]}"):
                async with bench.manager.lease(spec) as lease:
                    assert lease.key == f"a@{version}"
            assert bench.host.calls == [f"load a@{version}"]

    async def test_many_at_once_load_once(self, start, put):
        version = put("a")
        async with start() as bench:
            let_load = bench.host.hold("load")
            holders = [Holder(bench.manager, "a") for _ in range(20)]
            await until(lambda: bool(bench.host.calls))
            info = await bench.manager.get("a")
            assert (info.state, info.in_flight) == (AdapterState.LOADING, 20)
            assert not any(holder.key for holder in holders)
            let_load.set()
            for holder in holders:
                await holder.holding()
            info = await bench.manager.get("a")
            assert (info.state, info.in_flight) == (AdapterState.RESIDENT, 20)
            for holder in holders:
                await holder.end()
            assert (await bench.manager.get("a")).in_flight == 0
            assert bench.host.calls == [f"load a@{version}"]

    async def test_different_adapters_load_side_by_side(self, start, put):
        put("a"), put("b")
        async with start() as bench:
            let_load = bench.host.hold("load")
            holders = [Holder(bench.manager, name) for name in "ab"]
            await until(lambda: len(bench.host.calls) == 2)
            let_load.set()
            for holder in holders:
                await (await holder.holding()).end()

    async def test_names_what_there_is_when_there_is_no_such_adapter(self, start, put):
        put("a")
        async with start() as bench:
            for spec in ("b", "", "a/../a", "b@0123", "../names/a@0123", "a\0@0123", "@", "a@ffff"):
                with pytest.raises(AdapterNotFound):
                    await Holder(bench.manager, spec).task
            with pytest.raises(AdapterNotFound, match=r"no adapter 'b'; there are \['a'\]"):
                await bench.manager.load("b")

    async def test_older_version_is_served_by_its_number(self, start, put):
        one = put("a", seed=1)
        async with start() as bench:
            two = put("a", seed=2)
            await bench.manager.rescan(settled=True)
            async with bench.manager.lease("a") as lease:
                assert lease.version == two
            async with bench.manager.lease(f"a@{one}") as lease:
                assert lease.version == one
            assert (await bench.manager.get(f"a@{one[:8]}")).version == one

    async def test_older_version_is_inspected_once(self, start, put, monkeypatch):
        one = put("a", seed=1)
        async with start() as bench:
            two = put("a", seed=2)
            await bench.manager.rescan(settled=True)
            reads: list[Path] = []
            read = checkpoint.read
            monkeypatch.setattr(
                checkpoint, "read", lambda d, b, **o: reads.append(d) or read(d, b, **o)
            )
            infos = await asyncio.gather(*(bench.manager.get(f"a@{one}") for _ in range(10)))
            assert {info.version for info in infos} == {one} and len(reads) == 1
            for _ in range(3):
                async with bench.manager.lease(f"a@{one}"):
                    pass
            assert len(reads) == 2, "the second is the load"
            assert (await bench.manager.get("a")).version == two
        async with start():
            assert len(reads) == 2, "the index still has the current version"

    async def test_older_version_is_looked_for_again_when_the_record_changed(self, start, put):
        one = put("a", seed=0)
        async with start() as bench:
            for seed in (1, 2, 3):
                put("a", seed=seed)
                await bench.manager.rescan(settled=True)
                if seed < 3:
                    assert (await bench.manager.get(f"a@{one}")).version == one
            with pytest.raises(AdapterNotFound):
                await bench.manager.get(f"a@{one}")

    async def test_unknown_version_is_looked_for_at_every_request(self, start, put, base, root):
        """Another server may have published it meanwhile."""
        put("a", seed=1)
        async with start() as bench:
            other = AdapterStore(root)
            with other.staging() as staged:
                write_adapter(staged, base, seed=2)
                version = content_digest(staged)
                with pytest.raises(AdapterNotFound):
                    await bench.manager.get(f"a@{version}")
                other.publish("a", staged)
            assert (await bench.manager.get(f"a@{version}")).version == version

    async def test_error_of_the_request_releases_it(self, start, put):
        put("a")
        async with start() as bench:
            with pytest.raises(EngineDead):
                async with bench.manager.lease("a"):
                    raise EngineDead("stopped")
            assert (await bench.manager.get("a")).in_flight == 0


class TestFailedLoad:
    async def test_releases_all_waiters_and_is_tried_again(self, start, put):
        version = put("a")
        async with start(max_slots=1) as bench:
            bench.host.failing["load"] = EngineDead("no memory")
            holders = [Holder(bench.manager, "a") for _ in range(5)]
            for holder in holders:
                with pytest.raises(EngineDead, match="no memory"):
                    await holder.task
            assert bench.states() == {f"a@{version}": AdapterState.READY}
            bench.host.failing.clear()
            async with bench.manager.lease("a"):
                pass
            assert bench.host.calls == [f"load a@{version}"] * 2

    async def test_frees_its_slot_for_others(self, start, put):
        put("a"), put("b")
        async with start(max_slots=1) as bench:
            bench.host.failing["load"] = EngineDead("no memory")
            let_load = bench.host.hold("load")
            first = Holder(bench.manager, "a")
            await until(lambda: bool(bench.host.calls))
            second = Holder(bench.manager, "b")
            assert await blocked(second.task)
            let_load.set()
            with pytest.raises(EngineDead):
                await first.task
            bench.host.failing.clear()
            await (await second.holding()).end()

    async def test_files_that_changed_after_the_check_are_not_served(self, start, put):
        version = put("a")
        async with start() as bench:
            edit_tensors(bench.store.current("a").directory, lambda ts: ts.popitem()[1].fill_(0.5))
            with pytest.raises(AdapterInvalid, match=f"a@{version}: its files changed on disk"):
                await bench.manager.load("a")
            assert bench.host.calls == []

    async def test_with_all_waiters_gone_it_is_tried_again(self, start, put):
        put("a")
        async with start(max_slots=1) as bench:
            let_load = bench.host.hold("load")
            bench.host.failing["load"] = EngineDead("no memory")
            holder = Holder(bench.manager, "a")
            await until(lambda: bool(bench.host.calls))
            await holder.cancel()
            let_load.set()
            await until(lambda: not bench.manager._residency._resident)
            bench.host.failing.clear()
            await bench.manager.load("a")


class TestSlots:
    async def test_least_recently_used_is_evicted(self, start, put):
        versions = {name: put(name, seed) for seed, name in enumerate("abc")}
        async with start(max_slots=2) as bench:
            for name in "aba":
                await bench.manager.load(name)
            await bench.manager.load("c")
            assert bench.host.calls[-2:] == [f"unload b@{versions['b']}", f"load c@{versions['c']}"]
            assert bench.manager.resident_names() == {"a": "slot", "c": "slot"}
            assert (await bench.manager.get("b")).state is AdapterState.READY

    async def test_held_ones_are_not_evicted(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=2) as bench:
            a = await Holder(bench.manager, "a").holding()
            await bench.manager.load("b")
            await bench.manager.load("c")
            assert bench.manager.resident_names() == {"a": "slot", "c": "slot"}
            await a.end()

    async def test_waits_while_all_are_held_and_goes_on_at_a_release(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=2) as bench:
            a, b = Holder(bench.manager, "a"), Holder(bench.manager, "b")
            await a.holding()
            await b.holding()
            waiting = [Holder(bench.manager, "c") for _ in range(3)]
            assert await blocked(waiting[0].task)
            assert len(bench.host.calls) == 2
            await b.end()
            for holder in waiting:
                await holder.holding()
            assert bench.manager.resident_names().keys() == {"a", "c"}
            for holder in (a, *waiting):
                await holder.end()

    async def test_every_waiter_gets_its_turn(self, start, put):
        for seed in range(6):
            put(f"a{seed}", seed)
        async with start(max_slots=1) as bench:
            holders = [Holder(bench.manager, f"a{i}") for i in range(6)]
            for holder in holders:
                holder.let_go.set()
            await asyncio.gather(*(holder.task for holder in holders))
            assert len(bench.host.calls) == 11

    async def test_waiter_that_gave_up_takes_no_slot(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=1) as bench:
            a = await Holder(bench.manager, "a").holding()
            gone = Holder(bench.manager, "b")
            stays = Holder(bench.manager, "c")
            assert await blocked(gone.task)
            await gone.cancel()
            await a.end()
            await (await stays.holding()).end()
            assert not any("load b" in call for call in bench.host.calls)

    async def test_load_that_nobody_waits_for_any_more_is_finished_and_kept(self, start, put):
        version = put("a")
        async with start() as bench:
            let_load = bench.host.hold("load")
            holder = Holder(bench.manager, "a")
            await until(lambda: bool(bench.host.calls))
            await holder.cancel()
            assert (await bench.manager.get("a")).state is AdapterState.LOADING
            let_load.set()
            await until(lambda: bool(bench.host.loaded))
            await bench.manager.load("a")
            assert bench.host.calls == [f"load a@{version}"]

    async def test_what_is_being_loaded_is_not_evicted(self, start, put):
        """Though the request for it is gone: the engine could not unload what it has not got."""
        put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            let_load = bench.host.hold("load")
            gone = Holder(bench.manager, "a")
            await until(lambda: bool(bench.host.calls))
            await gone.cancel()
            second = Holder(bench.manager, "b")
            assert await blocked(second.task)
            let_load.set()
            await (await second.holding()).end()
            assert [call.split("@")[0] for call in bench.host.calls] == [
                "load a",
                "unload a",
                "load b",
            ]

    async def test_what_is_being_loaded_and_replaced_leaves_when_it_has_arrived(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            let_load = bench.host.hold("load")
            gone = Holder(bench.manager, "a")
            await until(lambda: bool(bench.host.calls))
            await gone.cancel()
            put("a", 2)
            await bench.manager.rescan(settled=True)
            assert bench.host.calls == [f"load a@{one}"]
            let_load.set()
            await until(lambda: not bench.manager._residency._resident)
            assert bench.host.calls == [f"load a@{one}", f"unload a@{one}"]

    @pytest.mark.parametrize("times", [1, 2])
    async def test_request_cancelled_while_it_evicts_leaves_the_books_right(
        self, start, put, times
    ):
        """The engine goes on unloading; the manager may not believe the adapter is still there."""
        put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            await bench.manager.load("a")
            let_unload = bench.host.hold("unload")
            evicting = Holder(bench.manager, "b")
            await until(lambda: len(bench.host.calls) == 2)
            waiting = Holder(bench.manager, "a")
            for _ in range(times):
                evicting.task.cancel()
                await asyncio.sleep(0.01)
            let_unload.set()
            with pytest.raises(asyncio.CancelledError):
                await evicting.task
            assert (await waiting.holding()).key in bench.host.loaded
            await waiting.end()

    @pytest.mark.parametrize("times", [1, 2])
    async def test_request_cancelled_while_it_unloads_what_it_held_last(self, start, put, times):
        one = put("a", 1)
        async with start(max_slots=1) as bench:
            holder = await Holder(bench.manager, "a").holding()
            put("a", 2)
            await bench.manager.rescan(settled=True)
            let_unload = bench.host.hold("unload")
            holder.let_go.set()
            await until(lambda: len(bench.host.calls) == 2)
            again = Holder(bench.manager, f"a@{one}")
            for _ in range(times):
                holder.task.cancel()
                await asyncio.sleep(0.01)
            let_unload.set()
            with pytest.raises(asyncio.CancelledError):
                await holder.task
            assert (await again.holding()).key in bench.host.loaded
            await again.end()

    async def test_many_requests_that_come_go_and_are_cancelled(self, start, put):
        """Whatever happens, requests hold what is loaded; `start` compares the books at the end."""
        for i in range(5):
            put(f"a{i}", i)
        async with start(max_slots=2) as bench:
            draw = torch.Generator().manual_seed(1)
            holders = []
            for _ in range(60):
                i, delay = (int(x) for x in torch.randint(0, 5, (2,), generator=draw))
                holder = Holder(bench.manager, f"a{i}")
                holders.append(holder)
                await asyncio.sleep(delay / 1000)
                if delay % 2:
                    holder.task.cancel()
                else:
                    holder.let_go.set()
            results = await asyncio.gather(*(h.task for h in holders), return_exceptions=True)
            assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
            await until(lambda: all(r.idle for r in bench.manager._residency._resident.values()))


class TestReplacing:
    async def test_requests_in_flight_keep_their_version_to_the_end(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            old = await Holder(bench.manager, "a").holding()
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            new = await Holder(bench.manager, "a").holding()
            assert (old.key, new.key) == (f"a@{one}", f"a@{two}")
            assert bench.host.loaded.keys() == {old.key, new.key}
            await new.end()
            assert old.key in bench.host.loaded
            await old.end()
            assert bench.host.calls[-1] == f"unload a@{one}"
            assert bench.host.loaded.keys() == {new.key}

    async def test_replaced_version_leaves_with_the_last_of_several(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            holders = [await Holder(bench.manager, "a").holding() for _ in range(3)]
            put("a", 2)
            await bench.manager.rescan(settled=True)
            for holder in holders[:2]:
                await holder.end()
                assert f"a@{one}" in bench.host.loaded
            await holders[2].end()
            assert bench.host.loaded == {}

    async def test_idle_replaced_version_leaves_at_once(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            await bench.manager.load("a")
            put("a", 2)
            await bench.manager.rescan(settled=True)
            assert bench.host.calls == [f"load a@{one}", f"unload a@{one}"]

    async def test_unload_waits_for_the_request_in_flight(self, start, put):
        version = put("a")
        async with start() as bench:
            holder = await Holder(bench.manager, "a").holding()
            info = await bench.manager.unload("a")
            assert (info.state, info.in_flight) == (AdapterState.RESIDENT, 1)
            await holder.end()
            assert bench.host.calls == [f"load a@{version}", f"unload a@{version}"]
            assert (await bench.manager.get("a")).state is AdapterState.READY

    async def test_unload_of_an_idle_one_is_done_when_it_returns(self, start, put):
        put("a")
        async with start() as bench:
            assert (await bench.manager.load("a")).state is AdapterState.RESIDENT
            assert (await bench.manager.unload("a")).state is AdapterState.READY
            assert (await bench.manager.unload("a")).state is AdapterState.READY
            assert bench.host.loaded == {}

    async def test_request_ends_well_though_the_engine_stopped_under_it(self, start, put):
        put("a", 1)
        async with start() as bench:
            holder = await Holder(bench.manager, "a").holding()
            put("a", 2)
            await bench.manager.rescan(settled=True)
            bench.host.failing["unload"] = EngineDead("closed")
            await holder.end()
            bench.host.loaded.clear()


class TestRollback:
    async def test_goes_back_one_version_at_a_time(self, start, put):
        versions = [put("a", 1)]
        async with start() as bench:
            for seed in (2, 3):
                versions.append(put("a", seed))
                await bench.manager.rescan(settled=True)
            for want in (versions[1], versions[0]):
                assert (await bench.manager.rollback("a")).version == want
                assert (await bench.manager.get("a")).version == want
            with pytest.raises(AdapterNotFound, match=f"no version before {versions[0]}"):
                await bench.manager.rollback("a")

    async def test_to_a_version_and_forward_again(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.rollback("a", one[:6])).version == one
            assert (await bench.manager.rollback("a", two)).version == two

    async def test_requests_in_flight_keep_their_version(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            holder = await Holder(bench.manager, "a").holding()
            await bench.manager.rollback("a")
            async with bench.manager.lease("a") as lease:
                assert lease.version == one
            assert f"a@{two}" in bench.host.loaded
            await holder.end()
            assert f"a@{two}" not in bench.host.loaded

    async def test_stays_after_a_restart_and_a_rescan(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            put("a", 2)
            await bench.manager.rescan(settled=True)
            await bench.manager.rollback("a")
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.get("a")).version == one
        async with start() as bench:
            assert (await bench.manager.get("a")).version == one

    async def test_unknown_name_or_version_changes_nothing(self, start, put):
        version = put("a")
        async with start() as bench:
            with pytest.raises(AdapterNotFound):
                await bench.manager.rollback("b")
            with pytest.raises(AdapterNotFound):
                await bench.manager.rollback("a", "ffff")
            with pytest.raises(InvalidRequest):
                await bench.manager.rollback("../a")
            assert (await bench.manager.get("a")).version == version

    async def test_to_a_damaged_version_is_refused_and_changes_nothing(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            (bench.store.version("a", one).directory / WEIGHTS_FILE).write_bytes(b"torn")
            with pytest.raises(AdapterInvalid):
                await bench.manager.rollback("a")
            assert (await bench.manager.get("a")).version == two
            assert bench.store.current("a").version == two


class TestVersions:
    async def test_are_what_can_be_rolled_back_to_latest_first(self, start, put):
        versions = [put("a", 1)]
        async with start() as bench:
            for seed in (2, 3):
                versions.append(put("a", seed))
                await bench.manager.rescan(settled=True)
            found = await bench.manager.versions("a")
            assert [version.version for version in found] == versions[::-1]
            assert [version.current for version in found] == [True, False, False]
            for version in found:
                info = await bench.manager.get(f"a@{version.version}")
                assert version.size_bytes == info.size_bytes > 0
                assert version.create_time == info.create_time > 0
            await bench.manager.rollback("a")
            found = await bench.manager.versions("a")
            assert [version.version for version in found if version.current] == [versions[1]]
            assert len(found) == 3

    async def test_say_where_they_are_and_who_holds_them(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            async with bench.manager.lease(f"a@{one}"):
                newer, older = await bench.manager.versions("a")
            assert (newer.version, newer.state, newer.in_flight) == (two, AdapterState.READY, 0)
            assert (newer.tier, older.tier) == (AdapterTier.DISK, AdapterTier.SLOT)
            assert (older.version, older.state) == (one, AdapterState.RESIDENT)
            assert older.in_flight == 1

    async def test_of_what_is_not_served(self, start, put, root):
        put("a")
        put("broken")
        (root / "broken" / WEIGHTS_FILE).write_bytes(b"torn")
        async with start() as bench:
            with pytest.raises(AdapterNotFound, match=r"there are \['a'\]"):
                await bench.manager.versions("b")
            with pytest.raises(AdapterQuarantined):
                await bench.manager.versions("broken")
            with pytest.raises(InvalidRequest):
                await bench.manager.versions("a@0123")


class TestDelete:
    async def test_request_in_flight_ends_and_new_ones_find_nothing(self, start, put, root):
        version = put("a")
        async with start() as bench:
            holder = await Holder(bench.manager, "a").holding()
            await bench.manager.delete("a")
            with pytest.raises(AdapterNotFound):
                await bench.manager.load("a")
            assert bench.host.loaded.keys() == {f"a@{version}"}
            await holder.end()
            assert bench.host.loaded == {}
            assert bench.manager.list() == [] and not (root / "a").exists()
            await bench.manager.rescan(settled=True)
            assert bench.manager.list() == []

    async def test_takes_all_versions_out_of_the_engine(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            put("a", 2)
            await bench.manager.rescan(settled=True)
            await bench.manager.load(f"a@{one}")
            await bench.manager.load("a")
            await bench.manager.delete("a")
            assert bench.host.loaded == {}

    async def test_unknown_or_illegal_name(self, start):
        async with start() as bench:
            with pytest.raises(AdapterNotFound):
                await bench.manager.delete("a")
            with pytest.raises(InvalidRequest):
                await bench.manager.delete("../a")

    async def test_quarantined_one(self, start, put, root):
        put("a")
        edit_json(root / "a" / CONFIG_FILE, use_dora=True)
        async with start() as bench:
            await bench.manager.delete("a")
            assert bench.manager.list() == [] and not (root / "a").exists()

    async def test_name_can_come_again(self, start, put):
        put("a", 1)
        async with start() as bench:
            await bench.manager.delete("a")
            version = put("a", 1)
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.load("a")).version == version


class TestMerge:
    async def test_loads_and_merges(self, start, put):
        version = put("a")
        async with start() as bench:
            info = await bench.manager.merge("a")
            assert info.state is AdapterState.MERGED
            assert bench.host.calls == [f"load a@{version}", f"merge a@{version}"]
            assert bench.manager.merged == f"a@{version}"
            assert bench.seen.merges == ["a"]
            await bench.manager.unmerge()
            assert (await bench.manager.get("a")).state is AdapterState.RESIDENT
            assert bench.seen.merges == ["a", ""]

    async def test_one_replaces_another_by_one_switch(self, start, put):
        put("a", 1), put("b", 2)
        async with start() as bench:
            await bench.manager.merge("a")
            await bench.manager.merge("b")
            assert [call.split("@")[0] for call in bench.host.calls] == [
                "load a",
                "merge a",
                "load b",
                "merge b",
            ]
            assert (await bench.manager.get("a")).state is AdapterState.RESIDENT

    async def test_unmerge_of_nothing_is_nothing(self, start):
        async with start() as bench:
            await bench.manager.unmerge()
            assert bench.host.calls == []

    async def test_merged_one_is_never_evicted(self, start, put):
        for seed, name in enumerate("abc"):
            put(name, seed)
        async with start(max_slots=2) as bench:
            await bench.manager.merge("a")
            for name in "bcb":
                await bench.manager.load(name)
            assert bench.manager.resident_names().keys() == {"a", "b"}
            await bench.manager.unmerge()
            await bench.manager.load("c")
            assert "a" not in bench.manager.resident_names()

    async def test_merged_one_can_be_neither_deleted_nor_unloaded(self, start, put, root):
        put("a")
        async with start() as bench:
            await bench.manager.merge("a")
            with pytest.raises(AdapterInUse, match="unmerge it before deleting it"):
                await bench.manager.delete("a")
            with pytest.raises(AdapterInUse, match="unmerge it first"):
                await bench.manager.unload("a")
            assert (root / "a").is_dir()
            await bench.manager.unmerge()
            await bench.manager.delete("a")
            assert bench.host.loaded == {}

    async def test_replaced_version_stays_merged_and_leaves_when_it_is_unmerged(self, start, put):
        one = put("a", 1)
        async with start() as bench:
            await bench.manager.merge("a")
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            assert bench.manager.merged == f"a@{one}"
            async with bench.manager.lease("a") as lease:
                assert lease.version == two
            with pytest.raises(AdapterInUse):
                await bench.manager.delete("a")
            await bench.manager.unmerge()
            assert bench.host.loaded.keys() == {f"a@{two}"}

    async def test_removed_directory_leaves_it_merged(self, start, put, root):
        version = put("a")
        async with start() as bench:
            await bench.manager.merge("a")
            shutil.rmtree(root / "a")
            await bench.manager.rescan(settled=True)
            assert bench.manager.list() == []
            assert bench.manager.merged == f"a@{version}"
            await bench.manager.unmerge()
            assert bench.host.loaded == {}

    async def test_failed_merge_leaves_the_one_before(self, start, put):
        one, _ = put("a", 1), put("b", 2)
        async with start() as bench:
            await bench.manager.merge("a")
            bench.host.failing["merge"] = EngineDead("stopped")
            with pytest.raises(EngineDead):
                await bench.manager.merge("b")
            assert bench.manager.merged == bench.host.merged == f"a@{one}"
            assert (await bench.manager.get("b")).in_flight == 0

    async def test_cancelled_merge_leaves_manager_and_engine_agreed(self, start, put):
        put("a")
        async with start() as bench:
            let_merge = bench.host.hold("merge")
            merging = asyncio.create_task(bench.manager.merge("a"))
            await until(lambda: len(bench.host.calls) == 2)
            merging.cancel()
            await asyncio.sleep(0)
            let_merge.set()
            with pytest.raises(asyncio.CancelledError):
                await merging
            assert bench.manager.merged == bench.host.merged

    async def test_cancelled_unmerge_leaves_manager_and_engine_agreed(self, start, put):
        put("a")
        async with start() as bench:
            await bench.manager.merge("a")
            let_unmerge = bench.host.hold("unmerge")
            unmerging = asyncio.create_task(bench.manager.unmerge())
            await until(lambda: len(bench.host.calls) == 3)
            unmerging.cancel()
            await asyncio.sleep(0)
            let_unmerge.set()
            with pytest.raises(asyncio.CancelledError):
                await unmerging
            assert bench.manager.merged is bench.host.merged is None

    async def test_in_the_only_slot_others_are_told_rather_than_left_to_wait(self, start, put):
        put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            await bench.manager.merge("a")
            with pytest.raises(CapacityExceeded, match="has the only slot; unmerge it or raise"):
                await Holder(bench.manager, "b").task
            assert (await bench.manager.load("b")).state is AdapterState.READY  # only a hint
            with pytest.raises(CapacityExceeded):
                await bench.manager.merge("b")
            await bench.manager.load("a")
            await bench.manager.unmerge()
            await bench.manager.load("b")


class TestDirectory:
    async def test_is_taken_in_at_start(self, start, put, base):
        put("a", 1, r=8, alpha=16.0)
        put("b", 2, targets=("k_proj", "up_proj"), kasa=False)
        async with start() as bench:
            a, b = bench.manager.list()
            assert (a.name, a.rank, a.alpha, a.method) == ("a", 8, 16.0, AdapterMethod.KASA)
            assert (a.truncation_rank, a.truncation_rule) == (8, "min_dim")
            assert a.target_modules == ("q_proj",) and b.target_modules == ("k_proj", "up_proj")
            assert (b.method, b.truncation_rank, b.truncation_rule) == ("lora", 0, "none")
            assert a.size_bytes > 8 * 128 * 4 and a.create_time > 1e9
            assert a.base_fingerprint == "" and a.state is AdapterState.READY
            assert a.create_time >= b.create_time - 60

    async def test_new_one_is_served_without_a_restart(self, start, put):
        async with start() as bench:
            put("a")
            await bench.manager.rescan()
            await bench.manager.rescan()
            await bench.manager.load("a")

    async def test_half_copied_one_is_not_served(self, start, put, root, base, tmp_path):
        """Files that still grow between two looks are left alone, without a word."""
        source = write_adapter(tmp_path / "source", base)
        async with start() as bench:
            (root / "a").mkdir()
            shutil.copy(source / CONFIG_FILE, root / "a")
            weights = (source / WEIGHTS_FILE).read_bytes()
            for end in range(100, len(weights), 500):
                (root / "a" / WEIGHTS_FILE).write_bytes(weights[:end])
                await bench.manager.rescan()
                assert bench.manager.list() == []
            shutil.copy(source / META_FILE, root / "a")
            (root / "a" / WEIGHTS_FILE).write_bytes(weights)
            await bench.manager.rescan()
            assert bench.manager.list() == []
            await bench.manager.rescan()
            assert (await bench.manager.get("a")).state is AdapterState.READY

    async def test_copy_that_stopped_half_way_is_quarantined_and_recovers(self, start, put, root):
        async with start() as bench:
            version = put("a")
            whole = (root / "a" / WEIGHTS_FILE).read_bytes()
            (root / "a" / WEIGHTS_FILE).write_bytes(whole[:300])
            for _ in range(3):
                await bench.manager.rescan()
            assert "is torn or not" in (await bench.manager.get("a")).reason
            (root / "a" / WEIGHTS_FILE).write_bytes(whole)
            for _ in range(2):
                await bench.manager.rescan()
            assert (await bench.manager.get("a")).version == version

    async def test_removed_one_is_no_longer_served(self, start, put, root):
        put("a")
        async with start() as bench:
            await bench.manager.load("a")
            shutil.rmtree(root / "a")
            await bench.manager.rescan()
            assert (await bench.manager.get("a")).state is AdapterState.RESIDENT
            await bench.manager.rescan()
            assert bench.manager.list() == [] and bench.host.loaded == {}
            assert bench.seen.lists[-1] == []

    async def test_one_that_was_only_being_replaced_is_kept(self, start, put, root):
        version = put("a")
        async with start() as bench:
            shutil.move(root / "a", root.parent / "aside")
            await bench.manager.rescan()
            shutil.move(root.parent / "aside", root / "a")
            await bench.manager.rescan()
            await bench.manager.rescan()
            assert (await bench.manager.get("a")).version == version

    async def test_removed_while_nobody_looked_is_not_served_after_the_restart(
        self, start, put, root
    ):
        put("a")
        async with start():
            pass
        shutil.rmtree(root / "a")
        async with start() as bench:
            assert bench.manager.list() == []

    async def test_replaced_while_nobody_looked(self, start, put):
        put("a", 1)
        async with start():
            pass
        two = put("a", 2)
        async with start() as bench:
            assert (await bench.manager.get("a")).version == two

    @pytest.mark.parametrize("force_polling", [False, True])
    async def test_is_looked_at_again_and_again(self, root, tails, put, force_polling):
        bench = Bench(root, tails, 2, force_polling=force_polling)
        bench.manager._watcher._poll_interval_s = 0.01
        await bench.manager.start()
        put("a")
        await until(lambda: bool(bench.manager.list()))
        await bench.manager.close()

    async def test_watcher_outlives_what_nobody_foresaw(
        self, root, tails, put, monkeypatch, caplog
    ):
        bench = Bench(root, tails, 2, force_polling=True)
        bench.manager._watcher._poll_interval_s = 0.01
        await bench.manager.start()
        with monkeypatch.context() as patch:
            for error in (PermissionError("root"), RuntimeError("a bug")):
                patch.setattr(bench.store, "scan", lambda error=error: (_ for _ in ()).throw(error))
                await until(lambda error=error: str(error) in caplog.text)
        put("a")
        await until(lambda: bool(bench.manager.list()))
        await bench.manager.close()

    async def test_in_read_only_mode_is_served_where_it_lies(self, start, put, root, base):
        version = put("a")
        (root / ".kasa").write_text("not a directory")
        async with start() as bench:
            await bench.manager.load("a")
            assert bench.host.loaded.keys() == {f"a@{version}"}
            for change in (
                bench.manager.delete("a"),
                bench.manager.rollback("a", version),
                bench.upload(root / "a", "b"),
            ):
                with pytest.raises(StoreReadOnly):
                    await change
            two = put("a", 2)
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.load("a")).version == two
            assert bench.host.loaded.keys() == {f"a@{two}"}


class TestQuarantine:
    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda d: edit_json(d / CONFIG_FILE, use_dora=True), "use_dora"),
            (lambda d: edit_json(d / CONFIG_FILE, layers_to_transform=1.5), "layers_to_transform"),
            (lambda d: edit_json(d / CONFIG_FILE, lora_alpha=10**400), "lora_alpha"),
            (lambda d: edit_json(d / CONFIG_FILE, target_modules="(" * 5000), "regular expression"),
            (lambda d: edit_json(d / META_FILE, base_fingerprint="ab" * 32), "abababab"),
            (lambda d: (d / WEIGHTS_FILE).write_bytes(b""), "is torn or not"),
            (lambda d: (d / WEIGHTS_FILE).unlink(), "it is missing"),
            (lambda d: (d / CONFIG_FILE).write_text("{"), "not JSON"),
        ],
    )
    async def test_tells_the_reason_and_recovers_when_fixed(self, start, put, root, damage, reason):
        put("a"), put("good")
        damage(root / "a")
        async with start() as bench:
            info = await bench.manager.get("a")
            assert info.state is AdapterState.QUARANTINED and reason in info.reason
            with pytest.raises(AdapterQuarantined, match="a was refused: ") as caught:
                await bench.manager.load("a")
            assert reason in str(caught.value) and caught.value.name == "a"
            assert bench.seen.lists[-1] == bench.manager.list()
            await bench.manager.load("good")
            version = put("a")
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.load("a")).version == version
            assert [i.name for i in bench.manager.list()] == ["a", "good"]

    async def test_good_version_is_served_beside_a_bad_directory(self, start, put, root):
        good = put("a")
        async with start() as bench:
            put("a", 2)
            edit_json(root / "a" / CONFIG_FILE, use_dora=True)
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.load("a")).version == good
            assert [i.state for i in bench.manager.list()] == ["quarantined", "resident"]
            put("a")  # back to what is served
            await bench.manager.rescan(settled=True)
            assert [i.state for i in bench.manager.list()] == ["resident"]
            assert [i.version for i in bench.seen.lists[-1]] == [good]

    async def test_is_not_read_again_until_it_changes(self, start, put, root, monkeypatch):
        put("a")
        edit_json(root / "a" / CONFIG_FILE, use_dora=True)
        async with start() as bench:
            reads: list[Path] = []
            read = checkpoint.read
            monkeypatch.setattr(
                checkpoint,
                "read",
                lambda d, b, **options: reads.append(d) or read(d, b, **options),
            )
            await bench.manager.rescan(settled=True)
            assert reads == []
            edit_json(root / "a" / CONFIG_FILE, use_dora=False, use_qalora=True)
            await bench.manager.rescan(settled=True)
            assert len(reads) == 1
            assert "use_qalora" in (await bench.manager.get("a")).reason

    async def test_ends_when_the_directory_goes(self, start, put, root):
        put("a")
        edit_json(root / "a" / CONFIG_FILE, use_dora=True)
        async with start() as bench:
            shutil.rmtree(root / "a")
            await bench.manager.rescan(settled=True)
            assert bench.manager.list() == []

    async def test_directory_that_cannot_be_read_is_tried_again(
        self, start, put, root, monkeypatch
    ):
        put("a")
        async with start() as bench:
            put("b")
            with monkeypatch.context() as patch:
                patch.setattr(
                    bench.store, "take_in", lambda *_: (_ for _ in ()).throw(OSError("stale"))
                )
                await bench.manager.rescan(settled=True)
                assert (await bench.manager.get("b")).reason == "stale"
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.get("b")).state is AdapterState.READY

    async def test_directory_that_could_not_be_read_and_is_gone_is_forgotten(
        self, start, put, root, monkeypatch
    ):
        async with start() as bench:
            put("b")
            with monkeypatch.context() as patch:
                patch.setattr(
                    bench.store, "take_in", lambda *_: (_ for _ in ()).throw(OSError("stale"))
                )
                await bench.manager.rescan(settled=True)
            shutil.rmtree(root / "b")
            await bench.manager.rescan(settled=True)
            assert bench.manager.list() == []

    async def test_recorded_version_is_checked_again_at_start(self, start, put, root, base):
        put("a", base_fingerprint=base.fingerprint)
        put("b", 1)
        async with start() as bench:
            stored = bench.store.current("a").directory
        edit_json(stored / META_FILE, base_fingerprint="ab" * 32)
        async with start() as bench:
            assert "abababab" in (await bench.manager.get("a")).reason
            await bench.manager.load("b")

    async def test_illegal_directory_name_stops_nobody(self, start, put):
        put("a..b"), put("good")
        async with start() as bench:
            assert [i.name for i in bench.manager.list()] == ["good"]

    async def test_damaged_record_is_named_and_stops_nobody(self, start, put, root):
        put("a"), put("b")
        async with start():
            pass
        (root / ".kasa" / "names" / "a.json").write_text("{")
        async with start() as bench:
            assert "a.json is damaged" in (await bench.manager.get("a")).reason
            await bench.manager.load("b")
            await bench.manager.delete("a")


class TestUpload:
    @pytest.fixture
    def source(self, base, tmp_path) -> Callable[..., Path]:
        return lambda seed=0, **options: write_adapter(
            tmp_path / f"source{seed}", base, seed=seed, **options
        )

    async def test_is_served_at_once_and_after_a_restart(self, start, source):
        async with start() as bench:
            info = await bench.upload(source(), "a")
            assert info.version == content_digest(source())
            assert (await bench.manager.load("a")).version == info.version
        async with start() as bench:
            assert (await bench.manager.get("a")).version == info.version
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.get("a")).version == info.version

    async def test_replaces_and_keeps_requests_in_flight(self, start, source):
        async with start() as bench:
            one = await bench.upload(source(1), "a")
            holder = await Holder(bench.manager, "a").holding()
            two = await bench.upload(source(2), "a", expected=one.version)
            assert (await bench.manager.load("a")).version == two.version
            assert holder.key in bench.host.loaded
            await holder.end()
            assert bench.host.loaded.keys() == {f"a@{two.version}"}

    async def test_expected_version(self, start, source):
        async with start() as bench:
            with pytest.raises(VersionConflict, match="expected version '0123', current is 'none'"):
                await bench.upload(source(1), "a", expected="0123")
            one = await bench.upload(source(1), "a", expected="")
            with pytest.raises(VersionConflict, match=f"'none', current is '{one.version}'"):
                await bench.upload(source(2), "a", expected="")
            with pytest.raises(VersionConflict):
                await bench.upload(source(2), "a", expected=one.version[:8])
            await bench.upload(source(2), "a", expected=one.version)
            assert bench.seen.rejected == ["VersionConflict"] * 3

    async def test_of_two_that_expect_the_same_version_one_wins(self, start, source):
        async with start() as bench:
            one = await bench.upload(source(1), "a")
            results = await asyncio.gather(
                *(bench.upload(source(seed), "a", expected=one.version) for seed in (2, 3, 4)),
                return_exceptions=True,
            )
            assert sorted(type(result).__name__ for result in results) == [
                "AdapterInfo",
                "VersionConflict",
                "VersionConflict",
            ]
            assert len(bench.store.versions("a")) == 2

    @pytest.mark.parametrize(
        ("damage", "error"),
        [
            (lambda d: edit_json(d / CONFIG_FILE, use_dora=True), AdapterInvalid),
            (lambda d: edit_json(d / META_FILE, base_fingerprint="ab" * 32), BaseMismatch),
            (lambda d: (d / WEIGHTS_FILE).write_bytes(b"torn"), AdapterInvalid),
            (lambda d: (d / "optimizer.pt").write_bytes(b""), InvalidRequest),
        ],
    )
    async def test_refused_one_leaves_nothing(self, start, source, root, damage, error):
        async with start() as bench:
            good = await bench.upload(source(1), "a")
            damage(bad := source(2))
            with pytest.raises(error):
                await bench.upload(bad, "a")
            assert (await bench.manager.get("a")).version == good.version
            assert bench.seen.rejected == [error.__name__]
            assert list((root / ".kasa" / "staging").iterdir()) == []
            assert bench.store.versions("a") == (good.version,)

    async def test_left_without_commit_leaves_nothing(self, start, root):
        manifest = UploadManifest(
            "a",
            tuple(ManifestFile(path, 1, "0" * 64) for path in (CONFIG_FILE, WEIGHTS_FILE)),
        )
        async with start() as bench:
            async with bench.manager.upload(manifest) as upload:
                await upload.write(CONFIG_FILE, 0, b"{")
            with pytest.raises(DigestMismatch):
                async with bench.manager.upload(manifest) as upload:
                    await upload.write(CONFIG_FILE, 0, b"{}")
            assert list((root / ".kasa" / "staging").iterdir()) == []
            assert bench.manager.list() == []
            assert bench.seen.rejected == ["DigestMismatch"]

    async def test_ends_the_quarantine_of_its_name(self, start, source, put, root):
        put("a", 9)
        edit_json(root / "a" / CONFIG_FILE, use_dora=True)
        async with start() as bench:
            info = await bench.upload(source(), "a", expected="")
            await bench.manager.rescan(settled=True)
            assert [i.version for i in bench.manager.list()] == [info.version]

    async def test_stays_when_the_directory_of_an_older_version_goes(
        self, start, source, put, root
    ):
        put("a", 9)
        async with start() as bench:
            info = await bench.upload(source(), "a")
            shutil.rmtree(root / "a")
            await bench.manager.rescan(settled=True)
            assert (await bench.manager.get("a")).version == info.version
        async with start() as bench:
            assert (await bench.manager.get("a")).version == info.version

    async def test_old_versions_are_dropped_but_not_from_under_a_request(self, start, source):
        async with start() as bench:
            first = await bench.upload(source(0), "a")
            holder = await Holder(bench.manager, "a").holding()
            for seed in range(1, 5):
                await bench.upload(source(seed), "a")
            with pytest.raises(AdapterNotFound):
                await bench.manager.get(f"a@{first.version}")
            assert holder.key in bench.host.loaded
            await holder.end()
            assert bench.host.loaded == {}


class TestAnotherServer:
    """On the same directory."""

    @pytest.fixture
    def publish(self, base, root, tmp_path) -> Callable[..., str]:
        def publish(name: str, seed: int, keep_versions: int = 5) -> str:
            other = AdapterStore(root, keep_versions)
            with other.staging() as staged:
                shutil.copytree(
                    write_adapter(tmp_path / str(seed), base, seed=seed), staged, dirs_exist_ok=True
                )
                return other.publish(name, staged).version

        return publish

    async def test_its_uploads_are_served(self, start, publish):
        async with start() as bench:
            version = publish("a", 1)
            await bench.manager.rescan()
            async with bench.manager.lease("a") as lease:
                assert lease.version == version
            two = publish("a", 2)
            await bench.manager.rescan()
            assert bench.host.loaded == {}
            assert [i.version for i in bench.seen.lists[-1]] == [two]

    async def test_its_rollback_and_its_deletion_are_followed(self, start, put, root):
        one = put("a", 1)
        async with start() as bench:
            put("a", 2)
            await bench.manager.rescan(settled=True)
            holder = await Holder(bench.manager, "a").holding()
            AdapterStore(root).set_current("a", one)
            await bench.manager.rescan()
            assert (await bench.manager.get("a")).version == one
            AdapterStore(root).delete("a")
            await bench.manager.rescan()
            assert bench.manager.list() == [] and bench.host.loaded.keys() == {holder.key}
            await holder.end()
            assert bench.host.loaded == {}

    async def test_expected_version_is_compared_with_what_it_published(
        self, start, publish, base, tmp_path
    ):
        async with start() as bench:
            version = publish("a", 1)
            source = write_adapter(tmp_path / "source", base, seed=5)
            with pytest.raises(VersionConflict, match=f"current is '{version}'"):
                await bench.upload(source, "a", expected="")
            await bench.upload(source, "a", expected=version)

    async def test_removal_of_a_version_by_it_is_followed_by_the_request_that_finds_it(
        self, start, put, publish
    ):
        """It asked for the name, which stands for a version that is there."""
        one = put("a", 1)
        async with start(max_slots=1) as bench:
            for seed in (2, 3):
                version = publish("a", seed, keep_versions=1)
            assert (await bench.manager.get("a")).version == one  # not looked at yet
            async with bench.manager.lease("a") as lease:
                assert lease.version == version
            with pytest.raises(AdapterNotFound):
                await Holder(bench.manager, f"a@{one}").task
            assert bench.host.calls == [f"load a@{version}"]

    async def test_removal_of_the_version_that_was_asked_for_is_a_clean_error(
        self, start, put, publish
    ):
        one = put("a", 1)
        async with start(max_slots=1) as bench:
            for seed in (2, 3):
                publish("a", seed, keep_versions=1)
            for _ in range(2):
                with pytest.raises(AdapterNotFound, match=f"a@{one}"):
                    await Holder(bench.manager, f"a@{one}").task
            assert bench.host.calls == []

    @pytest.mark.parametrize("what", ["load", "merge"])
    async def test_deletion_by_it_is_a_clean_error_whatever_is_asked(self, start, put, root, what):
        put("a", 1)
        async with start(max_slots=1) as bench:
            AdapterStore(root).delete("a")
            with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
                await getattr(bench.manager, what)("a")
            assert bench.manager.list() == []

    async def test_deletion_before_the_next_look_of_what_was_uploaded_is_followed(
        self, start, base, tmp_path, root
    ):
        async with start() as bench:
            await bench.upload(write_adapter(tmp_path / "source", base), "a")
            AdapterStore(root).delete("a")
            await bench.manager.rescan()
            assert bench.manager.list() == []


class TestRetention:
    async def test_spares_the_version_that_a_request_waits_to_load_though_it_is_deleted(
        self, start, put, root
    ):
        """It was admitted before, with that version."""
        one, _ = put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            b = await Holder(bench.manager, "b").holding()
            waiting = Holder(bench.manager, "a")
            assert await blocked(waiting.task)
            await bench.manager.delete("a")
            with pytest.raises(AdapterNotFound):
                await Holder(bench.manager, "a").task
            await b.end()
            assert (await waiting.holding()).key == f"a@{one}"
            await waiting.end()
            assert not (root / ".kasa" / "versions" / "a").exists()
            assert bench.host.loaded == {}

    async def test_spares_the_version_that_a_request_waits_to_load(self, start, put, base, root):
        """The request got its version at admission, then had to wait for a slot."""
        one, _ = put("a", 1), put("b", 2)
        async with start(max_slots=1) as bench:
            b = await Holder(bench.manager, "b").holding()
            waiting = Holder(bench.manager, "a")
            assert await blocked(waiting.task)
            for seed in range(3, 8):
                put("a", seed)
                await bench.manager.rescan(settled=True)
            await b.end()
            assert (await waiting.holding()).key == f"a@{one}"
            await waiting.end()
            put("a", 9)
            await bench.manager.rescan(settled=True)
            with pytest.raises(AdapterNotFound):
                await bench.manager.get(f"a@{one}")


async def test_stack_of_leases_closes_cleanly(start, put):
    put("a", 1), put("b", 2)
    async with start() as bench, AsyncExitStack() as stack:
        for spec in ("a", "b", "a"):
            await stack.enter_async_context(bench.manager.lease(spec))
        assert [i.in_flight for i in bench.manager.list()] == [2, 1]
        await stack.aclose()
        assert [i.in_flight for i in bench.manager.list()] == [0, 0]


class TestModulesTrainedWhole:
    """No engine has a use for them, so an adapter that has some is refused by every way in."""

    MESSAGE = r"trained whole \(lm_head\)"

    @pytest.fixture
    def with_head(self, base, tmp_path: Path) -> Path:
        adapter = make_adapter(base, modules_to_save=("lm_head",))
        saved = {"lm_head.weight": torch.zeros(128, 64)}
        checkpoint.write(tmp_path / "head", replace(adapter, saved=saved))
        assert checkpoint.read(tmp_path / "head", base).saved
        return tmp_path / "head"

    async def test_a_copy_of_it_is_quarantined(self, start, with_head, root):
        shutil.copytree(with_head, root / "head")
        async with start() as bench:
            (info,) = bench.manager.list()
            assert info.state is AdapterState.QUARANTINED
            assert re.search(self.MESSAGE, info.reason)
            with pytest.raises(AdapterQuarantined, match=self.MESSAGE):
                async with bench.manager.lease("head"):
                    pass

    async def test_an_upload_of_it_is_refused(self, start, with_head):
        async with start() as bench:
            with pytest.raises(AdapterInvalid, match=self.MESSAGE):
                await bench.upload(with_head, "head")
            assert bench.manager.list() == []
