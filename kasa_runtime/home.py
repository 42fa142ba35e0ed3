"""Where this library keeps what it can make again: base models, their tails, and what is known
about them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def kasa_home() -> Path:
    """`$KASA_HOME`, or `~/.cache/kasa`. The directory need not exist yet."""
    return Path(os.environ.get("KASA_HOME") or "~/.cache/kasa").expanduser()


def remembered(
    kind: str, made_of: Mapping[str, str], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `make` returns, which is JSON: from `${KASA_HOME}/<kind>/` if it was made of the same
    before, and kept there if it can be. `made_of` is all that it depends on.

    A file that is torn, or of something else, is made again. Raises what `make` raises."""
    key = _sha256(json.dumps(made_of, sort_keys=True))
    path = kasa_home() / kind / f"{key[:32]}.json"
    known = _read(path, key)
    if known is None:
        known = make()
        body = json.dumps({"made_of": key, "value": known})
        keep(path, f"{_sha256(body)}\n{body}")
    return known


def keep(path: Path, text: str) -> None:
    """Write a file of the cache, by rename. Best effort: a full or read-only disk costs the next
    start time."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_text(text, encoding="utf-8")
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.warning("%s: cannot be written, the next start will take longer (%s)", path, error)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """None where there is no file, or none that was made of the same and is whole."""
    try:
        digest, _, body = path.read_text(encoding="utf-8").partition("\n")
        if digest != _sha256(body):
            raise ValueError("it is not whole")
        stored = json.loads(body)
        if stored["made_of"] != key:
            raise ValueError("it is of something else")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: not used and made again (%s)", path, error)
        return None
    value: dict[str, Any] = stored["value"]
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
