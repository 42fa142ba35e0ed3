"""Names of adapters and keys of their versions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import AdapterInfo

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_LISTED = 20


def is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str, field: str = "name") -> str:
    """`name` if it is a legal adapter name; raises InvalidRequest naming `field`."""
    if not is_name(name):
        raise InvalidRequest(
            field, f"want a name like [a-z0-9][a-z0-9._-]{{0,62}} without '..', got {name!r}"
        )
    return name


def listed(names: Iterable[str]) -> str:
    """For messages: all names, or the first of many."""
    known = sorted(names)
    rest = f" and {len(known) - MAX_LISTED} more" if len(known) > MAX_LISTED else ""
    return f"{known[:MAX_LISTED] or 'none'}{rest}"


def key_of(info: AdapterInfo) -> str:
    """What names a version in the engine."""
    return f"{info.name}@{info.version}"


def name_of(key: str) -> str:
    return key.partition("@")[0]
