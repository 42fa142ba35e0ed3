"""Several servers on one adapters directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from adapter.test_store import accept, content_of, fill, leftovers, publish
from kasa_runtime.adapter.checkpoint import CONFIG_FILE
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.versions import StoredVersion, present
from kasa_runtime.errors import AdapterNotFound, VersionConflict


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def stores(root: Path) -> list[AdapterStore]:
    return [AdapterStore(root, keep_versions=2) for _ in range(2)]


def at_once(*actions: Callable[[], object]) -> None:
    """Run each on a thread of its own; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class TestStaging:
    def test_second_server_leaves_what_the_first_is_working_on(self, stores, root):
        with stores[0].staging() as staged:
            fill(staged, "one")
            AdapterStore(root)
            assert content_of(stores[0].publish("a", staged)) == "one"
        assert leftovers(root) == []

    def test_server_in_another_process_leaves_it_too(self, stores, root):
        start = "import sys; from pathlib import Path; " + (
            "from kasa_runtime.adapter.store import AdapterStore; AdapterStore(Path(sys.argv[1]))"
        )
        with stores[0].staging() as staged:
            fill(staged, "one")
            subprocess.run([sys.executable, "-c", start, str(root)], check=True)
            assert (staged / CONFIG_FILE).is_file()

    def test_what_a_dead_process_left_is_removed(self, stores, root):
        die = "import os, sys; from pathlib import Path; " + (
            "from kasa_runtime.adapter.store import AdapterStore; "
            "staging = AdapterStore(Path(sys.argv[1])).staging(); staging.__enter__(); "
            "os.kill(os.getpid(), 9)"
        )
        died = subprocess.run([sys.executable, "-c", die, str(root)])
        assert died.returncode == -9 and len(leftovers(root)) == 1
        AdapterStore(root)
        assert leftovers(root) == []


class TestChanges:
    def test_are_seen_by_the_other(self, stores):
        one, two = stores
        before = two.records()
        published = publish(one, "a", "one")
        assert two.current("a") == published
        assert before == {} and two.records().keys() == {"a"}
        seen = two.records()
        publish(one, "a", "two")
        assert two.records() != seen
        two.delete("a")
        assert one.names() == [] == list(one.records())

    def test_at_the_same_time_lose_nothing(self, root):
        stores = [AdapterStore(root, keep_versions=100) for _ in range(4)]
        at_once(
            *(
                lambda s=store, i=i: [publish(s, "a", f"{i} {n}") for n in range(8)]
                for i, store in enumerate(stores)
            )
        )
        versions = stores[0].versions("a")
        found = {content_of(stores[0].version("a", version)) for version in versions}
        assert found == {f"{i} {n}" for i in range(4) for n in range(8)}

    def test_of_two_that_expect_the_same_version_one_wins(self, stores):
        base = publish(stores[0], "a", "base").version
        conflicts = []

        def replace(store: AdapterStore, content: str) -> None:
            try:
                with store.staging() as staged:
                    store.publish("a", fill(staged, content), expected=base)
            except VersionConflict:
                conflicts.append(content)

        at_once(*(lambda s=s, i=i: replace(s, str(i)) for i, s in enumerate(stores)))
        (loser,) = conflicts
        assert content_of(stores[0].current("a")) == ("1" if loser == "0" else "0")

    def test_directory_taken_in_by_one_does_not_undo_a_later_upload(self, stores, root):
        """Both find it; the slower one gets to publish it only after an upload."""
        fill(root / "a", "one")

        def taken_in_and_replaced_meanwhile(directory: Path) -> None:
            stores[1].take_in("a", accept)
            publish(stores[1], "a", "uploaded")

        stores[0].take_in("a", taken_in_and_replaced_meanwhile)
        assert content_of(stores[0].current("a")) == "uploaded"

    def test_reader_of_a_name_that_moves_all_the_time_always_finds_a_version(self, root):
        writer, reader = (AdapterStore(root, keep_versions=1) for _ in range(2))
        publish(writer, "a", "0")
        done = threading.Event()

        def write() -> None:
            for n in range(1, 60):
                publish(writer, "a", str(n))
            done.set()

        def read() -> None:
            while not done.is_set():
                reader.current("a")

        at_once(write, read)


@contextmanager
def held(store: AdapterStore, stored: StoredVersion) -> Iterator[None]:
    store.hold(stored.name, stored.version)
    try:
        yield
    finally:
        if store.let_go(stored.name, stored.version):
            store.sweep(stored.name)


class TestHeld:
    def test_keep_a_version_that_retention_would_remove(self, stores):
        store = stores[0]
        first = publish(store, "a", "first")
        with held(store, first):
            for n in range(4):
                publish(store, "a", str(n))
            assert content_of(store.version("a", first.version)) == "first"
        publish(store, "a", "last")
        with pytest.raises(AdapterNotFound):
            store.version("a", first.version)
        assert not first.directory.exists()

    def test_count(self, stores):
        store = stores[0]
        first = publish(store, "a", "first")
        with ExitStack() as stack:
            with held(store, first):
                stack.enter_context(held(store, first))
            for n in range(3):
                publish(store, "a", str(n))
            assert content_of(store.version("a", first.version)) == "first"

    def test_keep_a_version_of_a_deleted_name_until_they_end(self, stores, root):
        store = stores[0]
        first, second = publish(store, "a", "first"), publish(store, "a", "second")
        with held(store, first):
            store.delete("a")
            assert store.names() == [] and not second.directory.exists()
            assert content_of(store.held("a", first.version)) == "first"
            with pytest.raises(AdapterNotFound):
                store.version("a", first.version)
            publish(store, "a", "third")
            assert content_of(store.held("a", first.version)) == "first"
        assert [p.name for p in (root / ".kasa/versions/a").iterdir()] == [*store.versions("a")]
        with pytest.raises(AdapterNotFound):
            store.held("a", first.version)

    def test_leave_nothing_of_a_deleted_name(self, stores, root):
        store = stores[0]
        first = publish(store, "a", "first")
        with held(store, first):
            store.delete("a")
        assert not (root / ".kasa/versions/a").exists()

    def test_what_was_deleted_and_came_again_stays(self, stores):
        store = stores[0]
        first = publish(store, "a", "first")
        with held(store, first):
            store.delete("a")
            publish(store, "a", "first")
        assert content_of(store.current("a")) == "first"

    def test_version_removed_while_it_is_read_is_not_found(self, stores):
        first = publish(stores[0], "a", "first")
        with (
            pytest.raises(AdapterNotFound, match="not on disk any more"),
            present("a", first.version, first.directory),
        ):
            stores[0].delete("a")
            (first.directory / CONFIG_FILE).read_bytes()

    def test_error_of_a_version_that_is_there_is_told_as_it_is(self, stores):
        first = publish(stores[0], "a", "first")
        with pytest.raises(PermissionError), present("a", "x", first.directory):
            raise PermissionError


class TestSweep:
    def test_versions_that_no_record_knows_are_removed(self, stores, root):
        kept = publish(stores[0], "a", "one")
        fill(root / ".kasa/versions/a/0123456789abcdef", "never recorded")
        fill(root / ".kasa/versions/b/0123456789abcdef", "deleted")
        again = AdapterStore(root)
        assert again.current("a") == kept
        assert [p.name for p in (root / ".kasa/versions/a").iterdir()] == [kept.version]
        assert not (root / ".kasa/versions/b").exists() and leftovers(root) == []

    def test_versions_of_a_damaged_record_are_kept(self, stores, root):
        kept = publish(stores[0], "a", "one")
        (root / ".kasa/names/a.json").write_text("{")
        AdapterStore(root)
        assert content_of(kept) == "one"

    def test_removed_state_is_an_empty_store(self, stores, root):
        publish(stores[0], "a", "one")
        shutil.rmtree(root / ".kasa")
        assert stores[0].names() == [] and stores[0].records() == {}
