"""What is kept under KASA_HOME for the next start: believed only where it is whole and of the
same, and never needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kasa_runtime.home import remembered

MADE_OF = {"config": "a", "version": "1"}
VALUE = {"layers": {"q_proj": [64, 32, False]}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def calls() -> list[str]:
    """Gets an entry whenever something is made."""
    return []


@pytest.fixture
def ask(home: Path, calls: list[str]) -> Callable[..., dict[str, object]]:
    def ask(**made_of: str) -> dict[str, object]:
        return remembered("things", MADE_OF | made_of, lambda: calls.append("made") or VALUE)

    return ask


def the_file(home: Path) -> Path:
    (path,) = (home / "things").iterdir()
    return path


class TestRemembered:
    def test_is_made_once(self, ask, calls):
        assert ask() == ask() == VALUE
        assert len(calls) == 1

    @pytest.mark.parametrize("change", [{"config": "b"}, {"version": "2"}, {"more": ""}])
    def test_is_made_again_of_something_else(self, ask, calls, change):
        assert ask() == ask(**change) == VALUE
        assert len(calls) == 2

    @pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, -1])
    def test_torn_file_is_made_again(self, home, ask, calls, keep):
        ask()
        whole = the_file(home).read_bytes()
        the_file(home).write_bytes(whole[: int(keep * len(whole)) if keep >= 0 else -1])
        assert ask() == VALUE
        assert len(calls) == 2
        assert the_file(home).read_bytes() == whole

    @pytest.mark.parametrize(
        "data", [b"\xff\xfe\n", b"[]", b"no digest\n{}", b"\0" * 100], ids=range(4)
    )
    def test_foreign_file_is_made_again(self, home, ask, calls, data):
        ask()
        the_file(home).write_bytes(data)
        assert ask() == VALUE
        assert len(calls) == 2

    def test_changed_value_is_not_believed(self, home, ask, calls):
        ask()
        text = the_file(home).read_text()
        the_file(home).write_text(text.replace("64", "65"))
        assert ask() == VALUE
        assert len(calls) == 2

    def test_file_of_something_else_in_its_place_is_not_believed(self, home, ask, calls):
        ask()
        mine = the_file(home)
        ask(config="b")
        (other,) = set((home / "things").iterdir()) - {mine}
        other.replace(mine)
        assert ask() == VALUE
        assert len(calls) == 3

    def test_directory_in_its_place_is_no_obstacle(self, home, ask):
        ask()
        path = the_file(home)
        path.unlink()
        path.mkdir()
        assert ask() == VALUE

    def test_needs_no_home_to_write_to(self, home, ask):
        home.write_text("a file where the directory should be")
        assert ask() == VALUE

    def test_full_disk_costs_nothing_but_time(self, home, ask, calls, monkeypatch):
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            assert ask() == VALUE
        assert list((home / "things").iterdir()) == []
        assert ask() == ask() == VALUE
        assert len(calls) == 2

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
    def test_read_only_home_costs_nothing_but_time(self, home, ask):
        home.mkdir(mode=0o555)
        assert ask() == VALUE

    def test_error_of_making_is_the_callers_and_is_not_kept(self, home):
        def fail() -> dict[str, object]:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            remembered("things", MADE_OF, fail)
        assert not (home / "things").exists()

    def test_value_comes_back_as_json_says(self, home):
        value = {"é": [1, None, {"x": "\n"}], "empty": {}}
        remembered("things", {}, lambda: value)
        again = remembered("things", {}, lambda: pytest.fail("made again"))
        assert again == json.loads(json.dumps(value))
