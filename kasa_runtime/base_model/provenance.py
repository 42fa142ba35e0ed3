"""`kasa_source.json`: where a fetched model came from, what made it, and whether it is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE_NAME = "kasa_source.json"
FORMAT = 1
"""Goes up when the converter's output changes, so that older caches are made again."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a directory was made from. `name` is the catalog's alias or the file's name."""

    name: str
    sha256: str  # of the GGUF, or of the safetensors that were taken as they are
    licence: str = ""  # "" takes what the GGUF says


def write(directory: Path, origin: Origin, details: dict[str, Any]) -> None:
    """Record `origin`, the converter's versions and the files that are now in `directory`.

    Holds no time and no path: converting the same file twice gives the same bytes.
    """
    record = {
        "format": FORMAT,
        "name": origin.name,
        "weights_sha256": origin.sha256,
        "licence": origin.licence,
        **details,
        "converter": {name: version(name) for name in ("kasa-runtime", "transformers", "gguf")},
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    (directory / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read(directory: Path) -> dict[str, Any]:
    """The record, or {} where there is none that can be read."""
    try:
        record = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_complete(directory: Path) -> bool:
    """Whether `directory` is of this format and every file has the size it was written with."""
    record = read(directory)
    files = record.get("files")
    if record.get("format") != FORMAT or not isinstance(files, dict):
        return False
    try:
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False
