"""What a start remembers of earlier ones, and when it does not believe it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from adapter.fake_host import FakeHost, Recorder
from adapter.making import edit_json, write_adapter
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter import index as index_module
from kasa_runtime.adapter import store as store_module
from kasa_runtime.adapter.checkpoint import META_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.index import AdapterIndex, Entry
from kasa_runtime.adapter.manager import AdapterManager
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterInfo, AdapterMethod, AdapterState

INFO = AdapterInfo(
    "a", "0123", AdapterState.READY, 4, 8.0, AdapterMethod.KASA, 4, "min_dim", ("q_proj",), "f", 99
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def put(base, root: Path) -> Callable[..., str]:
    """Put an adapter into the directory, as people do; its version."""

    def put(name: str, seed: int = 0) -> str:
        return content_digest(write_adapter(root / name, base, seed=seed))

    return put


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Directories whose weights were read, and those that were hashed, since the last clear()."""
    seen: list[str] = []
    read, digest = checkpoint.read, store_module.content_digest
    monkeypatch.setattr(
        checkpoint, "read", lambda d, b, **o: seen.append(f"read {d.name}") or read(d, b, **o)
    )
    monkeypatch.setattr(
        store_module, "content_digest", lambda d: seen.append(f"hash {d.name}") or digest(d)
    )
    return seen


@pytest.fixture
def start(root: Path, tails) -> Callable[[], AbstractAsyncContextManager[AdapterManager]]:
    @asynccontextmanager
    async def start() -> AsyncIterator[AdapterManager]:
        manager = AdapterManager(
            AdapterStore(root),
            tails,
            FakeHost(2),
            max_slots=2,
            observer=Recorder(),
            poll_interval_s=3600,
        )
        await manager.start()
        try:
            yield manager
        finally:
            await manager.close()

    return start


@pytest.fixture
def no_wait(monkeypatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr("kasa_runtime.adapter.loader.COARSEST_FILE_TIME_S", -3600.0)


@pytest.mark.usefixtures("no_wait")
class TestStart:
    async def test_reads_no_adapter_that_an_earlier_one_read(self, start, put, reads):
        versions = {put("a", 1), put("b", 2)}
        async with start() as manager:
            before = manager.list()
        reads.clear()
        async with start() as manager:
            assert manager.list() == before
            assert {info.version for info in manager.list()} == versions
            assert reads == []

    async def test_finds_what_changed_meanwhile(self, start, put, root, reads):
        put("a", 1), put("b", 2)
        async with start():
            pass
        two = put("a", 3)
        shutil.rmtree(root / "b")
        reads.clear()
        async with start() as manager:
            assert [(i.name, i.version) for i in manager.list()] == [("a", two)]

    async def test_content_of_the_same_size_and_time_is_new_content(self, start, put, root):
        put("a", 1)
        stat = (root / "a" / WEIGHTS_FILE).stat()
        async with start():
            pass
        two = put("a", 2)
        os.utime(root / "a" / WEIGHTS_FILE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (root / "a" / WEIGHTS_FILE).stat().st_size == stat.st_size
        async with start() as manager:
            assert (await manager.get("a")).version == two

    async def test_version_that_was_changed_on_the_disk_is_checked_again(self, start, put):
        put("a", 1)
        async with start() as manager:
            stored = manager.store.current("a").directory
        edit_json(stored / META_FILE, base_fingerprint="ab" * 32)
        async with start() as manager:
            assert "abababab" in (await manager.get("a")).reason

    async def test_load_checks_the_digest_whatever_the_index_says(self, start, put, reads):
        """A byte that rotted shows in no signature."""
        put("a", 1)
        async with start() as manager:
            weights = manager.store.current("a").directory / WEIGHTS_FILE
        stat = weights.stat()
        with weights.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x01")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        async with start() as manager:
            with pytest.raises(AdapterInvalid, match="changed on disk"):
                await manager.load("a")

    @pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b"0 00000000\n{}"])
    async def test_damaged_entry_is_made_again(self, start, put, root, reads, damage):
        put("a", 1)
        async with start() as manager:
            before = manager.list()
        (entry,) = (root / ".kasa" / "index").glob("*/a.json")
        entry.write_bytes(damage)
        reads.clear()
        async with start() as manager:
            assert manager.list() == before and reads
        reads.clear()
        async with start():
            assert reads == []

    async def test_removed_index_is_made_again(self, start, put, root, reads):
        put("a", 1)
        async with start():
            pass
        shutil.rmtree(root / ".kasa" / "index")
        async with start() as manager:
            assert [info.name for info in manager.list()] == ["a"]
        reads.clear()
        async with start():
            assert reads == []

    async def test_deleted_name_leaves_no_entry(self, start, put, root):
        put("a", 1)
        async with start() as manager:
            await manager.delete("a")
        assert list((root / ".kasa" / "index").glob("*/*")) == []


async def test_directory_that_just_changed_is_read_by_the_next_start_too(start, put, reads):
    """Its times could not tell a change that follows within their grain."""
    put("a", 1)
    async with start():
        pass
    reads.clear()
    async with start():
        assert reads == ["hash a"]


class TestIndex:
    def test_gives_back_what_was_put(self, tmp_path):
        index = AdapterIndex(tmp_path, "f" * 64)
        assert index.get("a") is None
        entry = Entry(INFO, "1|2", "3")
        index.put(entry)
        assert index.get("a") == entry
        assert isinstance(index.get("a").info.state, AdapterState)
        index.drop("a")
        index.drop("a")
        assert index.get("a") is None

    def test_bases_do_not_mix(self, tmp_path):
        AdapterIndex(tmp_path, "a" * 64).put(Entry(INFO, ""))
        assert AdapterIndex(tmp_path, "b" * 64).get("a") is None

    def test_another_version_of_the_package_checks_again(self, tmp_path, monkeypatch):
        AdapterIndex(tmp_path, "a" * 64).put(Entry(INFO, ""))
        monkeypatch.setattr(index_module, "__version__", "99")
        assert AdapterIndex(tmp_path, "a" * 64).get("a") is None

    def test_every_changed_byte_is_noticed(self, tmp_path):
        index = AdapterIndex(tmp_path, "a" * 64)
        index.put(Entry(replace(INFO, reason=""), "signature", "source"))
        (path,) = tmp_path.glob("index/*/a.json")
        good = path.read_bytes()
        for i in range(len(good)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            assert index.get("a") is None, i

    def test_place_that_cannot_be_written_costs_nothing_but_time(self, tmp_path):
        (tmp_path / "index").write_text("not a directory")
        index = AdapterIndex(tmp_path, "a" * 64)
        index.put(Entry(INFO, ""))
        assert index.get("a") is None
