"""Noticing what changes in the directory, and when a copy is complete."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import watchfiles

from adapter.test_store import accept, content_of, fill
from kasa_runtime.adapter import watcher as watcher_module
from kasa_runtime.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.content import file_being_written
from kasa_runtime.adapter.notifications import Notifications, is_remote
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.watcher import DirectoryWatcher


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


class Watched:
    """A watcher that takes everything in, and what it was told."""

    def __init__(self, store: AdapterStore, **options: object) -> None:
        self.store = store
        self.told: list[str] = []
        self.num_looks = 0
        options = {"poll_interval_s": 0.02, "force_polling": False} | options
        self.watcher = DirectoryWatcher(store, self._take_in, self._forget, self._follow, **options)

    async def __aenter__(self) -> Watched:
        await self.watcher.first_look()
        self.watcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.watcher.close()

    async def _take_in(self, name: str, signature: str) -> bool:
        self.told.append(f"take in {name}")
        return True

    async def _forget(self, name: str) -> None:
        self.told.append(f"forget {name}")

    async def _follow(self, name: str) -> None:
        self.told.append(f"follow {name}")

    async def until(self, event: str) -> None:
        async with asyncio.timeout(20):
            while event not in self.told:
                await asyncio.sleep(0.01)


@pytest.fixture
def num_scans(store, monkeypatch) -> list[int]:
    count = [0]
    scan = store.scan

    def counted() -> dict[str, str]:
        count[0] += 1
        return scan()

    monkeypatch.setattr(store, "scan", counted)
    return count


@pytest.mark.parametrize("force_polling", [False, True])
class TestChanges:
    async def test_are_told(self, store, force_polling):
        async with Watched(store, force_polling=force_polling) as watched:
            fill(store.root / "a", "one")
            await watched.until("take in a")
            watched.told.clear()
            fill(store.root / "a", "two, of another length")
            await watched.until("take in a")
            shutil.rmtree(store.root / "a")
            await watched.until("forget a")

    async def test_of_names_by_other_processes_are_told(self, store, force_polling):
        async with Watched(store, force_polling=force_polling) as watched:
            other = AdapterStore(store.root)
            with other.staging() as staged:
                other.publish("b", fill(staged, "one"))
            await watched.until("follow b")


class TestNotifications:
    async def test_spare_the_looks_while_nothing_changes(self, store, num_scans):
        async with Watched(store) as watched:
            fill(store.root / "a", "one")
            await watched.until("take in a")
            await asyncio.sleep(1.0)  # the notes of these changes come in
            before = num_scans[0]
            await asyncio.sleep(0.5)
            assert num_scans[0] == before
        assert watched.told == ["take in a"]

    async def test_uploads_in_progress_wake_nobody(self, store, num_scans):
        async with Watched(store):
            await asyncio.sleep(1.0)
            before = num_scans[0]
            with store.staging() as staged:
                fill(staged, "one")
                await asyncio.sleep(0.8)
            assert num_scans[0] == before

    async def test_what_they_do_not_tell_is_found_later(self, store, monkeypatch, tmp_path):
        """Such as a file that is changed behind a link."""
        monkeypatch.setattr(watcher_module, "LOOK_ANYWAY_S", 0.1)
        monkeypatch.setattr(Notifications, "_counts", lambda *_: False)
        async with Watched(store) as watched:
            fill(store.root / "a", "one")
            await watched.until("take in a")

    @pytest.mark.parametrize("error", [OSError(28, "inotify watch limit"), RuntimeError("Rust")])
    async def test_without_them_it_polls(self, store, monkeypatch, caplog, error):
        async def refuse(*_: object, **__: object):
            raise error
            yield

        monkeypatch.setattr(watchfiles, "awatch", refuse)
        async with Watched(store) as watched:
            fill(store.root / "a", "one")
            await watched.until("take in a")
            assert str(error) in caplog.text

    async def test_end_at_once(self, store):
        async with Watched(store):
            await asyncio.sleep(0.5)
            began = time.monotonic()
        assert time.monotonic() - began < 2


class TestRemote:
    @pytest.mark.parametrize(
        ("path", "remote"),
        [
            ("/data/adapters", True),
            ("/data", True),
            ("/data/local/adapters", False),
            ("/database", False),
            ("/with space/x", True),
        ],
    )
    def test_by_the_deepest_mount(self, tmp_path, path, remote):
        mounts = tmp_path / "mountinfo"
        mounts.write_text(
            "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
            "30 22 0:40 / /data rw shared:9 - nfs4 server:/export rw\n"
            "31 30 254:1 / /data/local rw - xfs /dev/vdb rw\n"
            "32 22 0:41 / /with\\040space rw - fuse.sshfs host: rw\n"
        )
        assert is_remote(Path(path), mounts) is remote

    def test_unknown_is_local(self, tmp_path):
        assert not is_remote(tmp_path, tmp_path / "none")

    async def test_first_look_takes_two(self, store, monkeypatch):
        monkeypatch.setattr(watcher_module, "is_remote", lambda _: True)
        fill(store.root / "a", "one")
        watched = Watched(store)
        await watched.watcher.rescan(settled=False)
        assert watched.told == []
        async with watched:
            assert watched.told == ["take in a"]
            assert not watched.watcher._notifications.working


class TestCopies:
    def write_slowly(self, path: Path) -> Callable[[], None]:
        stream = path.open("ab")
        stream.write(b"more")
        stream.flush()
        return stream.close

    @pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
    def test_in_progress_is_not_taken_in_however_slow_it_is(self, store, file):
        """Not a byte comes for minutes, and what is there may look complete."""
        source = fill(store.root / "a", "one")
        close = self.write_slowly(source / file)
        long_ago = time.time() - 600
        os.utime(source / file, (long_ago, long_ago))
        assert file_being_written(source) == file
        with pytest.raises(BlockingIOError, match=f"{file} is still being written"):
            store.take_in("a", accept)
        assert store.names() == []
        close()
        assert file_being_written(source) == ""
        if file == CONFIG_FILE:
            fill(source, "one")
        assert content_of(store.take_in("a", accept)) == "one"

    def test_in_progress_over_a_good_one_leaves_it_served(self, store):
        source = fill(store.root / "a", "one")
        good = store.take_in("a", accept)
        close = self.write_slowly(source / WEIGHTS_FILE)
        with pytest.raises(BlockingIOError):
            store.take_in("a", accept)
        assert store.current("a") == good
        close()
        assert store.take_in("a", accept).version != good.version

    def test_reader_is_no_writer(self, store):
        source = fill(store.root / "a", "one")
        with (source / WEIGHTS_FILE).open("rb"):
            assert file_being_written(source) == ""

    def test_file_that_a_copying_program_will_rename_counts(self, store):
        """rsync and its like write beside the file."""
        source = fill(store.root / "a", "one")
        before = store.scan()
        (source / f".{WEIGHTS_FILE}.x7Yz").write_text("half")
        assert store.scan() != before

    def test_directory_that_changes_while_it_is_checked_is_not_taken_in(self, store):
        source = fill(store.root / "a", "one")

        def check(staged: Path) -> None:
            (source / WEIGHTS_FILE).write_text("changed")

        with pytest.raises(BlockingIOError, match="changed while it was read"):
            store.take_in("a", check)
        assert store.names() == []
