"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only get in each other's way

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whomever


LONG = (
    "test_parity.py",
    "test_distributed.py",
    "test_resume.py",
    "test_run.py",
    "test_start_up.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One KASA_HOME for all tests, so that what is computed once stays computed."""
    return tmp_path_factory.mktemp("kasa-home")


@pytest.fixture(autouse=True)
def kasa_home(
    request: pytest.FixtureRequest, session_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep tests away from the user's caches; only tests marked real_model use them."""
    if request.node.get_closest_marker("real_model") is None:
        monkeypatch.setenv("KASA_HOME", str(session_home))


@pytest.fixture
def own_home(tmp_path: Path, session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KASA_HOME of the test's own, with nothing in it but what takes a C++ compiler a quarter of
    a minute."""
    home, compiled = tmp_path / "home", session_home / "native"
    home.mkdir()
    compiled.mkdir(exist_ok=True)
    (home / "native").symlink_to(compiled)
    monkeypatch.setenv("KASA_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Llama with random weights; see `tiny.py`."""
    from tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template; see `tiny.py`."""
    from tiny import save_tiny_chat_model

    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the real smollm2-135m, fetched on first use; for tests marked real_model."""
    from kasa_runtime.base_model.source import resolve

    return resolve("smollm2-135m")
