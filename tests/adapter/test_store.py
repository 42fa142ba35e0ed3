"""Files of the adapters directory: versions, atomic moves of names, crashes at every step."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kasa_runtime.adapter import records, staging, versions
from kasa_runtime.adapter import store as store_module
from kasa_runtime.adapter.checkpoint import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.names import check_name
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.adapter.versions import StoredVersion
from kasa_runtime.errors import AdapterInvalid, AdapterNotFound, InvalidRequest, StoreReadOnly


class Killed(BaseException):
    """The process ends here."""


def fill(directory: Path, content: str) -> Path:
    """Files that the store takes for an adapter; it does not look into them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps({"content": content}))
    (directory / WEIGHTS_FILE).write_text(f"weights of {content}")
    return directory


def content_of(stored: StoredVersion) -> str:
    assert (stored.directory / WEIGHTS_FILE).is_file()
    return json.loads((stored.directory / CONFIG_FILE).read_text())["content"]


def publish(store: AdapterStore, name: str, content: str) -> StoredVersion:
    with store.staging() as staged:
        return store.publish(name, fill(staged, content))


def accept(directory: Path) -> None:
    assert (directory / CONFIG_FILE).is_file() and (directory / WEIGHTS_FILE).is_file()


def leftovers(root: Path) -> list[Path]:
    return list((root / ".kasa" / "staging").iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def store(root: Path) -> AdapterStore:
    return AdapterStore(root, keep_versions=3)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "0", "sql-expert", "a.b_c-1", "v1.5", "a" * 63])
    def test_legal(self, name):
        assert check_name(name) == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            ".a",
            "-a",
            "_a",
            "a/b",
            "a\\b",
            "../a",
            "a..b",
            "A",
            "é",
            "a b",
            "a\n",
            "a\0",
            "a@1",
            "a" * 64,
            ".kasa",
            "a/../b",
            "/etc",
        ],
    )
    def test_illegal(self, name):
        with pytest.raises(InvalidRequest, match="name: want a name like") as caught:
            check_name(name)
        assert caught.value.field == "name"

    @pytest.mark.parametrize("name", ["../escape", "a..b", "UPPER", ""])
    def test_nothing_is_published_under_an_illegal_one(self, store, root, name):
        with pytest.raises(InvalidRequest):
            publish(store, name, "one")
        assert store.names() == [] and leftovers(root) == []
        assert not list((root / ".kasa" / "versions").iterdir())

    @pytest.mark.parametrize("name", ["a..b", "Upper", ".hidden", "with space"])
    def test_directory_with_an_illegal_one_is_no_adapter(self, store, root, name):
        fill(root / name, "one")
        assert store.scan() == {}


class TestDigest:
    def test_is_stable(self, tmp_path):
        """Versions are written into logs, requests and rollbacks: they may never change."""
        (tmp_path / CONFIG_FILE).write_text("{}")
        (tmp_path / WEIGHTS_FILE).write_bytes(b"\0" * 8)
        assert content_digest(tmp_path) == "928aaf59b4919b7f"

    def test_does_not_depend_on_time_place_or_other_files(self, tmp_path):
        one, two = fill(tmp_path / "one", "x"), fill(tmp_path / "two", "x")
        os.utime(two / CONFIG_FILE, (1, 1))
        (two / "optimizer.pt").write_text("not a part of the adapter")
        assert content_digest(one) == content_digest(two)

    @pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE])
    def test_depends_on_every_file_of_the_adapter(self, tmp_path, file):
        one, two = fill(tmp_path / "one", "x"), fill(tmp_path / "two", "x")
        (two / file).write_text("changed")
        assert content_digest(one) != content_digest(two)

    def test_does_not_confuse_files(self, tmp_path):
        one, two = fill(tmp_path / "one", "x"), fill(tmp_path / "two", "x")
        a, b = (two / CONFIG_FILE).read_bytes(), (two / WEIGHTS_FILE).read_bytes()
        (two / CONFIG_FILE).write_bytes(b)
        (two / WEIGHTS_FILE).write_bytes(a)
        assert content_digest(one) != content_digest(two)


class TestPublish:
    def test_makes_a_version_current(self, store):
        stored = publish(store, "a", "one")
        assert store.names() == ["a"]
        assert store.current("a") == store.version("a", stored.version) == stored
        assert content_of(stored) == "one"
        assert stored.version == content_digest(stored.directory)
        assert stored.size_bytes == sum(p.stat().st_size for p in stored.directory.iterdir())

    def test_replaces_the_current_and_keeps_the_old(self, store):
        one, two = publish(store, "a", "one"), publish(store, "a", "two")
        assert store.current("a") == two
        assert store.versions("a") == (one.version, two.version)
        assert content_of(store.version("a", one.version)) == "one"

    def test_same_content_is_the_same_version(self, store):
        one = publish(store, "a", "one")
        publish(store, "a", "two")
        again = publish(store, "a", "one")
        assert again.version == one.version
        assert store.current("a").version == one.version
        assert len(store.versions("a")) == 2

    def test_same_content_under_two_names_is_kept_apart(self, store):
        publish(store, "a", "one")
        publish(store, "b", "one")
        store.delete("a")
        assert content_of(store.current("b")) == "one"

    def test_survives_a_restart(self, store, root):
        one, two = publish(store, "a", "one"), publish(store, "a", "two")
        again = AdapterStore(root)
        assert again.names() == ["a"]
        assert again.current("a") == two
        assert again.versions("a") == (one.version, two.version)

    def test_keeps_the_last_versions_only(self, store, root):
        versions = [publish(store, "a", str(i)).version for i in range(5)]
        assert store.versions("a") == tuple(versions[-3:])
        assert {p.name for p in (root / ".kasa/versions/a").iterdir()} == set(versions[-3:])
        with pytest.raises(AdapterNotFound):
            store.version("a", versions[0])
        assert leftovers(root) == []

    def test_leaves_nothing_behind(self, store, root):
        publish(store, "a", "one")
        with pytest.raises(AdapterInvalid), store.staging() as staged:
            fill(staged, "two")
            raise AdapterInvalid("refused")
        assert leftovers(root) == []
        assert content_of(store.current("a")) == "one"

    def test_heals_a_version_whose_files_were_damaged(self, store):
        stored = publish(store, "a", "one")
        (stored.directory / WEIGHTS_FILE).unlink()
        assert content_of(publish(store, "a", "one")) == "one"
        assert store.current("a") == stored or store.current("a").version == stored.version


class TestVersionLookup:
    @pytest.fixture
    def versions(self, store) -> list[str]:
        return [publish(store, "a", str(i)).version for i in range(3)]

    def test_by_an_unambiguous_beginning(self, store, versions):
        for version in versions:
            for digits in (4, 8, 16):
                assert store.version("a", version[:digits]).version == version

    def test_ambiguous_beginning_is_refused(self, store, versions):
        with pytest.raises(AdapterNotFound, match="found 3 that match"):
            store.version("a", "")

    @pytest.mark.parametrize("version", ["ffffffffffffffff", "../a", "x", "/"])
    def test_unknown_version_lists_those_that_are_there(self, store, versions, version):
        with pytest.raises(AdapterNotFound, match=versions[1]) as caught:
            store.version("a", version)
        assert caught.value.name == "a"

    def test_unknown_name_lists_those_that_are_there(self, store, versions):
        with pytest.raises(AdapterNotFound, match=r"no adapter 'b'; there are \['a'\]"):
            store.current("b")
        with pytest.raises(AdapterNotFound):
            store.version("b", versions[0])
        assert store.versions("b") == ()

    def test_version_that_left_the_disk_is_not_found(self, store, versions):
        shutil.rmtree(store.version("a", versions[0]).directory)
        with pytest.raises(AdapterNotFound, match="is not on disk any more"):
            store.version("a", versions[0])


class TestKept:
    def test_is_what_versions_are_found_among(self, store):
        published = [publish(store, "a", content) for content in ("1", "2", "3", "4")]
        current, kept = store.kept("a")
        assert (current, kept) == (published[-1].version, published[1:])
        assert all(store.version("a", each.version) == each for each in kept)

    def test_leaves_out_what_was_removed_meanwhile(self, store):
        one, two = publish(store, "a", "1"), publish(store, "a", "2")
        shutil.rmtree(one.directory)
        assert store.kept("a") == (two.version, [two])

    def test_of_an_unknown_name(self, store):
        publish(store, "a", "1")
        with pytest.raises(AdapterNotFound, match=r"there are \['a'\]"):
            store.kept("b")


class TestSetCurrent:
    def test_what_a_new_version_replaces_is_kept_and_comes_before_it(self, store):
        oldest, *_ = (publish(store, "a", content) for content in "one")  # three versions
        store.set_current("a", oldest.version)
        new = publish(store, "a", "new")
        assert store.versions("a")[-2:] == (oldest.version, new.version)
        assert content_of(store.version("a", oldest.version)) == "o"

    def test_moves_the_name_and_keeps_all_versions(self, store, root):
        one, two = publish(store, "a", "one"), publish(store, "a", "two")
        assert store.set_current("a", one.version[:6]) == one
        assert AdapterStore(root).current("a") == one
        assert store.versions("a") == (one.version, two.version)

    def test_unknown_version_changes_nothing(self, store):
        two = publish(store, "a", "two")
        with pytest.raises(AdapterNotFound):
            store.set_current("a", "ffff")
        assert store.current("a") == two


class TestDelete:
    def test_removes_name_versions_and_directory(self, store, root):
        fill(root / "a", "one")
        store.take_in("a", accept)
        publish(store, "a", "two")
        store.delete("a")
        assert store.names() == [] and store.scan() == {}
        assert not (root / "a").exists()
        assert not (root / ".kasa/versions/a").exists()
        assert leftovers(root) == []
        with pytest.raises(AdapterNotFound):
            store.current("a")

    def test_unknown_name(self, store):
        with pytest.raises(AdapterNotFound, match="no adapter 'a'; there are none"):
            store.delete("a")

    def test_directory_that_was_never_taken_in(self, store, root):
        fill(root / "refused", "bad")
        store.delete("refused")
        assert not (root / "refused").exists()

    def test_link_is_removed_and_not_what_it_points_to(self, store, root, tmp_path):
        fill(tmp_path / "elsewhere", "one")
        (root / "a").symlink_to(tmp_path / "elsewhere")
        store.take_in("a", accept)
        store.delete("a")
        assert not (root / "a").exists()
        assert (tmp_path / "elsewhere" / WEIGHTS_FILE).is_file()

    def test_name_can_be_used_again(self, store):
        publish(store, "a", "one")
        store.delete("a")
        two = publish(store, "a", "two")
        assert store.versions("a") == (two.version,)


class TestTakeIn:
    def test_copies_what_lies_in_the_directory(self, store, root):
        source = fill(root / "a", "one")
        (source / "optimizer.pt").write_text("not a part of the adapter")
        stored = store.take_in("a", accept)
        assert content_of(stored) == "one"
        assert {p.name for p in stored.directory.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
        (source / WEIGHTS_FILE).write_text("changed")
        assert content_of(store.current("a")) == "one"
        assert content_digest(stored.directory) == stored.version

    def test_same_content_is_taken_in_once(self, store, root):
        fill(root / "a", "one")
        assert store.take_in("a", accept) is not None
        assert store.take_in("a", accept) is None
        assert AdapterStore(root).take_in("a", accept) is None

    def test_new_content_is_a_new_version(self, store, root):
        one = store.take_in("a", accept) if fill(root / "a", "one") else None
        fill(root / "a", "two")
        two = store.take_in("a", accept)
        assert store.versions("a") == (one.version, two.version)

    def test_verify_sees_the_copy_and_its_refusal_changes_nothing(self, store, root):
        one = store.take_in("a", accept) if fill(root / "a", "one") else None
        fill(root / "a", "two")
        seen: list[Path] = []

        def refuse(directory: Path) -> None:
            seen.append(directory)
            raise AdapterInvalid("no")

        with pytest.raises(AdapterInvalid):
            store.take_in("a", refuse)
        assert seen[0] != root / "a"
        assert store.current("a") == one and leftovers(root) == []
        assert store.take_in("a", accept) is not None  # the refused content was not remembered

    def test_uploaded_version_stays_until_the_directory_changes(self, store, root):
        fill(root / "a", "one")
        store.take_in("a", accept)
        uploaded = publish(store, "a", "uploaded")
        assert store.take_in("a", accept) is None
        assert store.current("a") == uploaded
        fill(root / "a", "two")
        assert content_of(store.take_in("a", accept)) == "two"

    def test_somebody_still_writing_is_noticed(self, store, root, monkeypatch):
        fill(root / "a", "one")
        copyfile = shutil.copyfile

        def copy_and_write_on(source: Path, target: Path) -> None:
            copyfile(source, target)
            (root / "a" / CONFIG_FILE).write_text("more")
            copyfile(source, target)

        monkeypatch.setattr(shutil, "copyfile", copy_and_write_on)
        with pytest.raises(OSError, match="changed while it was read"):
            store.take_in("a", accept)
        assert store.names() == [] and leftovers(root) == []


class TestForget:
    def test_drops_what_was_taken_from_the_directory(self, store, root):
        fill(root / "a", "one")
        store.take_in("a", accept)
        shutil.rmtree(root / "a")
        assert store.forget_if_taken_from("a")
        assert store.names() == []

    def test_keeps_what_was_uploaded_since(self, store, root):
        fill(root / "a", "one")
        store.take_in("a", accept)
        uploaded = publish(store, "a", "two")
        shutil.rmtree(root / "a")
        assert not store.forget_if_taken_from("a")
        assert store.current("a") == uploaded

    def test_name_that_was_never_recorded(self, store):
        assert store.forget_if_taken_from("a")


class TestScan:
    def test_finds_directories_with_a_config(self, store, root):
        fill(root / "a", "one")
        (root / "b").mkdir()
        (root / "c").write_text("a file")
        (root / "README.md").write_text("about")
        publish(store, "uploaded", "x")
        assert list(store.scan()) == ["a"]

    def test_signature_stays_until_a_file_is_written(self, store, root):
        fill(root / "a", "one")
        before = store.scan()
        assert store.scan() == before
        os.utime(root / "a" / WEIGHTS_FILE, ns=(1, 1))
        assert store.scan() != before

    @pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE])
    def test_signature_changes_with_every_file(self, store, root, file):
        fill(root / "a", "one")
        before = store.scan()
        (root / "a" / file).write_text("longer than it was before, for sure")
        assert store.scan() != before

    def test_follows_links(self, store, root, tmp_path):
        fill(tmp_path / "elsewhere", "one")
        (root / "a").symlink_to(tmp_path / "elsewhere")
        (root / "broken").symlink_to(tmp_path / "nowhere")
        assert list(store.scan()) == ["a"]

    def test_root_that_vanished_has_nothing(self, store, root):
        shutil.rmtree(root)
        assert store.scan() == {}


class TestReadOnly:
    """Running as root ignores permission bits, so a file stands where the state would be."""

    @pytest.fixture
    def frozen(self, root: Path) -> AdapterStore:
        fill(root / "a", "one")
        (root / ".kasa").write_text("not a directory")
        return AdapterStore(root)

    def test_is_noticed(self, frozen, root, caplog):
        assert not frozen.writable
        with caplog.at_level(logging.WARNING):
            AdapterStore(root)
        assert "serving it read-only" in caplog.text

    def test_what_is_served_in_place_is_the_one_version(self, frozen):
        stored = frozen.take_in("a", accept)
        assert frozen.kept("a") == (stored.version, [stored])

    def test_serves_what_lies_there_in_place(self, frozen, root):
        stored = frozen.take_in("a", accept)
        assert stored.directory == root / "a"
        assert frozen.names() == ["a"]
        assert frozen.current("a") == frozen.version("a", stored.version[:6]) == stored
        assert frozen.take_in("a", accept) is None

    def test_new_content_replaces_the_old(self, frozen, root):
        one = frozen.take_in("a", accept)
        fill(root / "a", "two")
        two = frozen.take_in("a", accept)
        assert frozen.current("a") == two != one
        with pytest.raises(AdapterNotFound):
            frozen.version("a", one.version)

    def test_refused_content_is_not_served(self, frozen):
        def refuse(directory: Path) -> None:
            raise AdapterInvalid("no")

        with pytest.raises(AdapterInvalid):
            frozen.take_in("a", refuse)
        assert frozen.names() == []

    def test_directory_that_is_gone_is_forgotten(self, frozen, root):
        frozen.take_in("a", accept)
        shutil.rmtree(root / "a")
        assert frozen.forget_if_taken_from("a")
        assert frozen.names() == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda store: publish(store, "b", "x"),
            lambda store: store.delete("a"),
            lambda store: store.set_current("a", "ffff"),
        ],
        ids=["publish", "delete", "set_current"],
    )
    def test_cannot_be_changed(self, frozen, root, change):
        frozen.take_in("a", accept)
        with pytest.raises(StoreReadOnly, match="mount it writable"):
            change(frozen)
        assert content_of(frozen.current("a")) == "one"

    def test_full_disk_counts(self, root, monkeypatch):
        def full(self: Path, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "touch", full)
        assert not AdapterStore(root).writable


class TestCrash:
    """Killed between any two steps, a restart finds the old state or the new one, whole."""

    def run_until_killed(
        self, monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]
    ) -> bool:
        """Do `action`, killed before its `step`-th change of the disk; False if it has fewer."""
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count > step:
                    raise Killed
                return real(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "mkdir"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(shutil, "copyfile", counted(shutil.copyfile))
            patch.setattr(os, "fsync", counted(os.fsync))
            try:
                action()
            except Killed:
                return True
        return False

    def every_step(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        prepare: Callable[[AdapterStore], object],
        action: Callable[[AdapterStore], object],
        check: Callable[[AdapterStore], object],
    ) -> int:
        for step in range(100):
            root = tmp_path / str(step)
            store = AdapterStore(root, keep_versions=2)
            prepare(store)
            killed = self.run_until_killed(monkeypatch, step, lambda s=store: action(s))
            restarted = AdapterStore(root, keep_versions=2)
            assert leftovers(root) == []
            check(restarted)
            for name in restarted.names():
                current = restarted.current(name)
                assert content_digest(current.directory) == current.version
            # What was interrupted can be done again.
            prepare(restarted)
            action(restarted)
            if not killed:
                return step
        raise AssertionError("never ends")

    def test_while_publishing_a_first_version(self, tmp_path, monkeypatch):
        def check(store: AdapterStore) -> None:
            if store.names():
                assert content_of(store.current("a")) == "one"

        steps = self.every_step(
            tmp_path, monkeypatch, lambda _: None, lambda s: publish(s, "a", "one"), check
        )
        assert steps >= 6

    def test_while_replacing_and_retiring_versions(self, tmp_path, monkeypatch):
        def prepare(store: AdapterStore) -> None:
            publish(store, "a", "one")
            publish(store, "a", "two")

        def check(store: AdapterStore) -> None:
            assert content_of(store.current("a")) in ("two", "three")
            for version in store.versions("a"):
                content_of(store.version("a", version))

        self.every_step(tmp_path, monkeypatch, prepare, lambda s: publish(s, "a", "three"), check)

    def test_while_taking_in(self, tmp_path, monkeypatch):
        def prepare(store: AdapterStore) -> None:
            fill(store.root / "a", "one")
            store.take_in("a", accept)
            fill(store.root / "a", "two")

        def check(store: AdapterStore) -> None:
            assert content_of(store.current("a")) in ("one", "two")
            store.take_in("a", accept)
            assert content_of(store.current("a")) == "two"

        self.every_step(tmp_path, monkeypatch, prepare, lambda s: s.take_in("a", accept), check)

    def test_while_rolling_back(self, tmp_path, monkeypatch):
        versions: list[str] = []

        def prepare(store: AdapterStore) -> None:
            versions[:] = [publish(store, "a", "one").version, publish(store, "a", "two").version]

        self.every_step(
            tmp_path,
            monkeypatch,
            prepare,
            lambda s: s.set_current("a", versions[0]),
            lambda s: content_of(s.current("a")),
        )

    def test_while_deleting(self, tmp_path, monkeypatch):
        def prepare(store: AdapterStore) -> None:
            fill(store.root / "a", "one")
            store.take_in("a", accept)
            publish(store, "b", "two")

        def check(store: AdapterStore) -> None:
            if "a" in store.names():
                assert content_of(store.current("a")) == "one"
            else:
                assert not (store.root / "a").exists()  # or a restart would take it in again
            assert content_of(store.current("b")) == "two"

        self.every_step(tmp_path, monkeypatch, prepare, lambda s: s.delete("a"), check)

    def test_bytes_are_on_the_disk_before_their_names(self, store, monkeypatch):
        """A power cut may undo whatever was not flushed, in any order."""
        events: list[str] = []
        sync, rename, fsync, replace = staging.sync, Path.rename, os.fsync, Path.replace

        def log(event: str, action: Callable[..., object], *args: object) -> object:
            events.append(event)
            return action(*args)

        for module in (store_module, records, versions):
            monkeypatch.setattr(module, "sync", lambda path: log(f"sync {path.name}", sync, path))
        monkeypatch.setattr(os, "fsync", lambda fd: log("fsync", fsync, fd))
        monkeypatch.setattr(Path, "rename", lambda p, t: log("rename", rename, p, t))
        monkeypatch.setattr(Path, "replace", lambda p, t: log("replace", replace, p, t))
        with store.staging() as staged:
            fill(staged, "one")
            name = staged.name
            store.publish("a", staged)
        before, after = events[: events.index("rename")], events[events.index("rename") :]
        assert {f"sync {f}" for f in (CONFIG_FILE, WEIGHTS_FILE, name)} <= set(before)
        rest = [event for event in after if event != "fsync"]
        assert rest == ["rename", "sync a", "replace", "sync names"]
        assert "sync versions" in before  # a/ itself
        assert "fsync" in after[: after.index("replace")][-1:]

    def test_record_is_replaced_and_never_written_over(self, store, root):
        record = root / ".kasa" / "names" / "a.json"
        publish(store, "a", "one")
        with record.open() as old:
            publish(store, "a", "two")
            assert old.read() != record.read_text()
            assert os.fstat(old.fileno()).st_nlink == 0

    def test_half_removed_old_version_does_not_come_back(self, store, root):
        """A crash inside the removal of a directory leaves some of its files."""
        one = publish(store, "a", "one")
        for i in range(3):
            publish(store, "a", str(i))
        assert not one.directory.exists()
        one.directory.mkdir()
        (one.directory / CONFIG_FILE).write_text("{}")
        assert content_of(publish(store, "a", "one")) == "one"

    def test_leftovers_of_an_upload_are_removed_at_start(self, store, root):
        fill(root / ".kasa" / "staging" / "abandoned", "half")
        AdapterStore(root)
        assert leftovers(root) == []

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"current": 3}'])
    def test_damaged_record_costs_its_own_name_only(self, store, root, text):
        publish(store, "a", "one")
        publish(store, "b", "two")
        (root / ".kasa/names/a.json").write_text(text)
        again = AdapterStore(root)
        assert content_of(again.current("b")) == "two"
        with pytest.raises(AdapterInvalid, match=r"a\.json"):
            again.current("a")
        again.delete("a")
        assert content_of(publish(again, "a", "three")) == "three"
