"""Where models, tails and fingerprints are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def kasa_home() -> Path:
    """`$KASA_HOME`, else `~/.cache/kasa`."""
    return Path(os.environ.get("KASA_HOME") or Path.home() / ".cache" / "kasa")
