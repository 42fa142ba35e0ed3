"""Starts with adapters that nobody has checked yet: they are taken in while others are served."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter.bench import Holder, blocked, until
from adapter.making import edit_json, write_adapter
from kasa_runtime.adapter import catalog as catalog_module
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.checkpoint import CONFIG_FILE
from kasa_runtime.adapter.intake import Change, Intake
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.errors import AdapterNotFound, AdapterQuarantined
from kasa_runtime.types import AdapterState

NAMES = [f"a{i}" for i in range(8)]
TAKE_IN = AdapterStore.take_in


class Gate:
    """Lets as many adapters be checked as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.checked: list[str] = []
        self._may_check = threading.Semaphore(0)
        monkeypatch.setattr(AdapterStore, "take_in", lambda *given: self._take_in(*given))

    def open(self, count: int = 1000) -> None:
        self._may_check.release(count)

    def _take_in(self, store, name, verify):
        self.begun.append(name)
        self._may_check.acquire()
        self.checked.append(name)
        return TAKE_IN(store, name, verify)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def many(put) -> dict[str, str]:
    """Versions by name."""
    return {name: put(name, seed) for seed, name in enumerate(NAMES)}


class TestStart:
    async def test_serves_before_all_is_checked(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            assert bench.manager.list() == []
            gate.open(2)
            await until(lambda: len(bench.manager.list()) == 2)
            await bench.manager.load("a0")
            gate.open()
            await bench.manager._watcher.all_arrived()
            assert [info.name for info in bench.manager.list()] == NAMES

    async def test_waits_for_all_if_that_is_soon(self, start, many):
        async with start(start_wait_s=300) as bench:
            assert [info.name for info in bench.manager.list()] == NAMES

    async def test_known_ones_are_served_at_once(self, start, many, put, gate):
        gate.open(len(NAMES))
        async with start():
            pass
        put("new", 99)
        async with start(start_wait_s=0.01) as bench:
            assert {info.name for info in bench.manager.list()} == set(NAMES)
            async with bench.manager.lease("a3") as lease:
                assert lease.version == many["a3"]
            gate.open()

    async def test_recorded_one_that_has_to_be_read_again_is_read_beside(
        self, start, base, root, monkeypatch
    ):
        """As after an upgrade of this package, or on another base."""
        async with start() as bench:
            info = await bench.upload(write_adapter(root / "a", base), "b")
        shutil.rmtree(root / "a"), shutil.rmtree(root / ".kasa" / "index")
        reading, read = threading.Semaphore(0), checkpoint.read

        def slow(directory: Path, base: object, **options: object) -> object:
            reading.acquire()
            return read(directory, base, **options)

        monkeypatch.setattr(checkpoint, "read", slow)
        async with start(start_wait_s=0.01) as bench:
            assert bench.manager.list() == []
            getting = asyncio.create_task(bench.manager.get("b"))
            assert await blocked(getting)
            reading.release()
            assert await getting == info

    async def test_close_waits_for_what_is_being_taken_in_and_begins_no_more(
        self, start, many, gate, root
    ):
        async with start(start_wait_s=0.01) as bench:
            await until(lambda: gate.begun)
            closing = asyncio.create_task(bench.manager.close())
            await until(lambda: not bench.manager._watcher.num_pending)
            assert await blocked(closing)
            gate.open()
            await closing
        assert gate.begun == gate.checked == ["a0"]
        assert {path.stem for path in (root / ".kasa" / "names").iterdir()} == {"a0"}
        assert bench.manager._watcher._intake._task is None


class TestNamedOnes:
    """Requests that name what has not been checked yet."""

    async def test_are_checked_next_and_served(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            holder = Holder(bench.manager, "a6")
            assert await blocked(holder.task)
            gate.open(2)
            await holder.holding()
            assert holder.key == f"a6@{many['a6']}"
            assert gate.checked == ["a0", "a6"]  # the first was under way
            assert "a5" not in {info.name for info in bench.manager.list()}
            await holder.end()
            gate.open()

    @pytest.mark.parametrize("method", ["get", "load", "merge", "unload", "rollback"])
    async def test_wait_whatever_is_asked(self, start, many, gate, method):
        async with start(start_wait_s=0.01) as bench:
            asked = asyncio.create_task(getattr(bench.manager, method)("a5"))
            assert await blocked(asked)
            gate.open()
            if method == "rollback":
                with pytest.raises(AdapterNotFound, match="has no version before"):
                    await asked
            else:
                assert (await asked).version == many["a5"]

    async def test_by_version_too(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            asked = asyncio.create_task(bench.manager.get(f"a7@{many['a7'][:6]}"))
            assert await blocked(asked)
            gate.open()
            assert (await asked).version == many["a7"]

    async def test_that_are_refused(self, start, many, gate, root):
        edit_json(root / "a7" / CONFIG_FILE, use_dora=True)
        async with start(start_wait_s=0.01) as bench:
            asked, shown = (
                asyncio.create_task(bench.manager.load("a7")),
                asyncio.create_task(bench.manager.get("a7")),
            )
            assert await blocked(asked)
            gate.open()
            with pytest.raises(AdapterQuarantined, match="use_dora"):
                await asked
            assert (await shown).state is AdapterState.QUARANTINED

    async def test_that_nobody_has_are_not_found_at_once(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            with pytest.raises(AdapterNotFound):
                await bench.manager.load("nobody")
            gate.open()

    async def test_cancelled_wait_changes_nothing(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            holder = Holder(bench.manager, "a6")
            assert await blocked(holder.task)
            await holder.cancel()
            gate.open()
            await bench.manager.load("a6")

    async def test_deleted_before_they_were_checked(self, start, many, gate):
        async with start(start_wait_s=0.01) as bench:
            waiting = Holder(bench.manager, "a7")
            assert await blocked(waiting.task)
            deletion = asyncio.create_task(bench.manager.delete("a6"))
            gate.open()
            await deletion
            await (await waiting.holding()).end()
            await bench.manager._watcher.all_arrived()
            assert {i.name for i in bench.manager.list()} == {*NAMES} - {"a6"}
            await bench.manager.rescan()
            await bench.manager.rescan()
            assert "a6" not in {i.name for i in bench.manager.list()}

    async def test_uploaded_before_they_were_checked(self, start, many, gate, base, tmp_path):
        """What lay in the directory came first, and does not replace the upload later."""
        source = write_adapter(tmp_path / "new", base, seed=99)
        async with start(start_wait_s=0.01) as bench:
            upload = asyncio.create_task(bench.upload(source, "a6"))
            assert await blocked(upload)
            gate.open()
            info = await upload
            await bench.manager._watcher.all_arrived()
            assert (await bench.manager.get("a6")).version == info.version
            assert bench.store.versions("a6") == (many["a6"], info.version)


class TestWhileItGoesOn:
    async def test_changes_of_others_are_followed(self, start, many, gate, base, tmp_path):
        gate.open(1)
        async with start(start_wait_s=0.01, poll_interval_s=0.02, force_polling=True) as bench:
            await until(lambda: len(bench.manager.list()) == 1)
            source = write_adapter(tmp_path / "other", base, seed=99)
            with bench.store.staging() as staged:
                shutil.copytree(source, staged, dirs_exist_ok=True)
                version = bench.store.publish("other", staged).version
            await until(lambda: "other" in bench.manager._watcher._intake)
            asked = asyncio.create_task(bench.manager.get("other"))
            gate.open(1)  # a1, which is under way
            assert (await asked).version == version
            gate.open()

    async def test_the_observer_is_not_told_of_each(self, start, many, gate, monkeypatch):
        """A list of all at every one of thousands would take the event loop for minutes."""
        monkeypatch.setattr(catalog_module, "TELL_S", 3600)
        async with start(start_wait_s=0.01) as bench:
            gate.open()
            await bench.manager._watcher.all_arrived()
            assert [[info.name for info in told] for told in bench.seen.lists] == [NAMES]

    async def test_one_that_cannot_be_read_stops_nobody(self, start, many, monkeypatch, caplog):
        def refuse(store, name, verify):
            if name == "a3":
                raise RuntimeError("a bug")
            return TAKE_IN(store, name, verify)

        monkeypatch.setattr(AdapterStore, "take_in", refuse)
        async with start() as bench:
            assert {i.name for i in bench.manager.list()} == {*NAMES} - {"a3"}
            assert "cannot take in a3" in caplog.text
            with pytest.raises(AdapterNotFound):
                await bench.manager.load("a3")


class TestIntake:
    @pytest.fixture
    def looked(self) -> list[tuple[str, Change]]:
        return []

    @pytest.fixture
    def make(self, looked) -> Callable[..., Intake]:
        async def look(name: str, change: Change) -> None:
            await asyncio.sleep(0)
            looked.append((name, change))

        return lambda caught_up=lambda: None: Intake(look, caught_up)

    async def test_joins_changes_of_one_name(self, make, looked):
        intake = make()
        intake.add("a", Change(record=True))
        intake.add("a", Change(signature="1"))
        intake.add("a", Change(signature="2"))
        await intake.wait_for_all()
        assert looked == [("a", Change(True, "2"))]

    async def test_change_while_it_is_looked_at_is_looked_at_again(self, make, looked):
        intake = make()
        intake.add("a", Change(signature="1"))
        await asyncio.sleep(0)  # it looks
        assert intake.num_pending == 0 and "a" in intake
        intake.add("a", Change(signature="2"))
        await intake.wait_for("a")
        assert [change.signature for _, change in looked] == ["1", "2"]

    async def test_dropped_one_releases_who_waits(self, make, looked):
        intake = make()
        for name in "ab":
            intake.add(name, Change(signature="1"))
        waiting = asyncio.create_task(intake.wait_for("b"))
        await asyncio.sleep(0)
        intake.drop("b")
        await waiting
        await intake.wait_for_all()
        assert [name for name, _ in looked] == ["a"] and "b" not in intake

    async def test_dropped_directory_leaves_the_change_of_the_record(self, make, looked):
        intake = make()
        intake.add("a", Change(True, "1"))
        intake.drop("a")
        await intake.wait_for_all()
        assert looked == [("a", Change(record=True))]

    async def test_closed_one_releases_who_waits(self, make, looked):
        intake = make()
        for name in "ab":
            intake.add(name, Change(signature="1"))
        waiting = asyncio.create_task(intake.wait_for("a"))
        await asyncio.sleep(0)
        await intake.close()
        await waiting
        assert looked == []

    async def test_tells_when_it_has_caught_up_every_time(self, make):
        times = []
        intake = make(lambda: times.append(intake.num_pending))
        for _ in range(2):
            intake.add("a", Change(record=True))
            intake.add("b", Change(record=True))
            await intake.wait_for_all()
        assert times == [0, 0]
        await intake.wait_for("a")
        await intake.close()
