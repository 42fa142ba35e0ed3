"""`proto/breaking.sh` finds what an older client would not understand, and what to compare with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[1] / "proto"
BUF = Path(sys.executable).with_name("buf")

pytestmark = pytest.mark.skipif(
    not BUF.exists() or shutil.which("git") is None, reason="needs buf and git"
)


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--allow-empty", "--message", "one")


def replace(root: Path, old: str, new: str) -> None:
    path = root / "proto" / "kasa" / "v1" / "adapters.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def break_it(root: Path) -> None:
    replace(root, "string reason = 13;", "string reason = 113;")


def check(root: Path) -> tuple[int, str]:
    command = [str(root / "proto" / "breaking.sh"), str(BUF)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A working tree with this proto/, not yet in git."""
    shutil.copytree(PROTO, tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def main(root: Path) -> Path:
    """The same with one commit, on main."""
    git(root, "init")
    commit(root)
    return root


def test_without_history_there_is_nothing_to_compare_with(root: Path) -> None:
    break_it(root)
    status, output = check(root)
    assert (status, "skipped" in output) == (0, True)


def test_a_shallow_clone_has_nothing_to_compare_with(main: Path, tmp_path: Path) -> None:
    commit(main)
    git(main, "clone", "--depth", "1", f"file://{main}", "shallow")
    status, output = check(tmp_path / "shallow")
    assert (status, "skipped" in output) == (0, True)


def test_on_main_it_is_the_commit_before(main: Path) -> None:
    replace(main, "string reason = 13;", "string reason = 13;\n  string note = 114;")
    commit(main)
    assert check(main)[0] == 0
    break_it(main)
    commit(main)
    status, output = check(main)
    assert status != 0
    assert 'field "13" with name "reason"' in output


def test_on_a_branch_it_is_where_it_left_main(main: Path) -> None:
    git(main, "checkout", "-b", "work")
    break_it(main)
    commit(main)
    commit(main)
    assert check(main)[0] != 0
    git(main, "checkout", "main")
    replace(main, "string reason = 13;", "string reason = 13;\n  string note = 114;")
    commit(main)
    git(main, "checkout", "-b", "older", "HEAD^")
    commit(main)
    assert check(main)[0] == 0  # what main has got since is not missing here


def test_with_tags_it_is_the_last_one(main: Path) -> None:
    git(main, "tag", "v1")
    break_it(main)
    commit(main)
    commit(main)
    status, output = check(main)
    assert status != 0
    assert "comparing with v1" in output
    git(main, "tag", "v2")
    assert check(main)[0] != 0
    commit(main)
    assert check(main)[0] == 0
