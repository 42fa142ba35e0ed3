"""Bearer tokens: how they are made, what the file of their hashes says, what each of them permits.

The file is TOML, a line for each token; the only reader and the only writer are here:

    alice = { sha256 = "9f86d0...", generate = ["team-a-*", "_base"], upload = ["team-a-*"] }

A token is 256 random bits, so a plain sha256 of it can be neither guessed nor looked up.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from kasa_runtime.errors import AdapterNotFound, ConfigError, PermissionDenied
from kasa_runtime.limits import BASE_NAME
from kasa_runtime.types import BASE

PREFIX = "kasa_"
EVERYTHING = "*"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Action(StrEnum):
    """What a token may do with an adapter; each of them lets it see the adapter, too."""

    GENERATE = "generate"
    UPLOAD = "upload"  # publish, replace, roll back, delete
    ADMINISTER = "administer"  # load, unload, pin, merge, unmerge
    OBSERVE = "observe"  # see; with the pattern "*" the metrics, too


@dataclass(frozen=True)
class Caller:
    """Who calls. `patterns`: of names of adapters (`_base`: the base model), by action; a shell's
    wildcards."""

    name: str
    patterns: Mapping[Action, tuple[str, ...]]

    @property
    def sees_all(self) -> bool:
        return any(EVERYTHING in patterns for patterns in self.patterns.values())

    def may(self, action: Action, adapter: str) -> bool:
        """`adapter`: a name, name@version, or "" for the base model."""
        name = BASE_NAME if adapter == BASE else adapter.partition("@")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.patterns.get(action, ()))

    def sees(self, adapter: str) -> bool:
        return any(self.may(action, adapter) for action in Action)

    def require(self, action: Action, adapter: str) -> None:
        """Raises PermissionDenied; for an adapter that the caller may not even see,
        AdapterNotFound, unless it would be a new one."""
        if self.may(action, adapter):
            return
        if adapter != BASE and action is not Action.UPLOAD:
            self.require_sight(adapter)
        what = f"the adapter {adapter!r}" if adapter else f"the base model ({BASE_NAME})"
        patterns = list(self.patterns.get(action, ()))
        raise PermissionDenied(
            f"token {self.name!r} may not {action} {what}, only {patterns or 'nothing'}"
        )

    def require_sight(self, adapter: str) -> None:
        """Raises AdapterNotFound, as for one that does not exist."""
        if not self.sees(adapter):
            name = adapter.partition("@")[0]
            raise AdapterNotFound(not_found(name), name=name)


ANYONE = Caller("", {action: (EVERYTHING,) for action in Action})
"""Who calls a server without tokens."""


def not_found(name: str) -> str:
    """What a caller that does not see all adapters is told; it names no other."""
    return f"no adapter {name!r}, or no such version of it, that this token may see"


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def line(name: str, token: str, patterns: Mapping[Action, Iterable[str]]) -> str:
    """The token's line of a file. Raises ConfigError for a name that cannot be one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a token's name must match {_NAME.pattern}, got {name!r}")
    values: dict[str, Any] = {"sha256": digest(token)}
    values |= {action.value: list(given) for action, given in patterns.items() if given}
    pairs = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return f"{name} = {{ {', '.join(pairs)} }}"


class Tokens:
    """All tokens that a server knows. Holds none itself, only their hashes."""

    def __init__(self, callers: Iterable[tuple[str, Caller]]) -> None:
        self._callers = tuple(callers)

    @classmethod
    def parse(cls, text: str, where: str) -> Tokens:
        """Raises ConfigError, naming `where`, the line's name and the key."""
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where} is no TOML: {error}") from None
        if not document:
            raise ConfigError(f"{where} has no token; `kasa token new` prints lines for it")
        return cls(
            entry for name, values in document.items() for entry in _entries(name, values, where)
        )

    def find(self, token: str) -> Caller | None:
        """Whose it is; takes as long for a wrong one as for any other."""
        found, wanted = None, digest(token)
        for sha256, caller in self._callers:
            if hmac.compare_digest(sha256, wanted):
                found = caller
        return found


def _entries(name: str, values: Any, where: str) -> Iterable[tuple[str, Caller]]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {name} must be a table, got {values!r}")
    known = ("sha256", *Action)
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigError(f"{where}: {name}.{unknown[0]} is none of {', '.join(known)}")
    digests: Any = values.get("sha256")
    digests = [digests] if isinstance(digests, str) else digests
    if not digests or not _are_strings(digests) or not all(map(_SHA256.fullmatch, digests)):
        raise ConfigError(
            f"{where}: {name}.sha256 must be 64 lower-case hex digits, or an array of such"
        )
    for action in Action:
        if not _are_strings(values.get(action, [])):
            raise ConfigError(f"{where}: {name}.{action} must be an array of patterns")
    patterns = {action: tuple(values.get(action, ())) for action in Action}
    return [(sha256, Caller(name, patterns)) for sha256 in digests]


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
