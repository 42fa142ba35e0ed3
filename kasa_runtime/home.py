"""Where this library keeps what it can make again: base models and their tails."""

from __future__ import annotations

import os
from pathlib import Path


def kasa_home() -> Path:
    """`$KASA_HOME`, or `~/.cache/kasa`. The directory need not exist yet."""
    return Path(os.environ.get("KASA_HOME") or "~/.cache/kasa").expanduser()
