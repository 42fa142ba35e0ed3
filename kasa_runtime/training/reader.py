"""run.toml -> RunConfig.

Keys may be overridden by `--set section.key=value`. A path inside the file is relative to the file;
a path given with `--set` is relative to the working directory, as on any command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import (
    PRESETS,
    DataSection,
    EvalSection,
    MethodSection,
    ModelSection,
    OutputSection,
    Preset,
    RunConfig,
    TrainSection,
)
from kasa_runtime.training.rows import DATASETS_PREFIX

_SECTIONS: dict[str, type[Any]] = {
    "model": ModelSection,
    "data": DataSection,
    "method": MethodSection,
    "train": TrainSection,
    "eval": EvalSection,
    "output": OutputSection,
}
_TYPE_NAMES = {str: "a string", bool: "true or false", int: "an integer", Path: "a path"}
_BOUNDS = {"low": "at least", "above": "more than", "below": "less than"}


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` and apply `section.key=value` overrides.

    Raises ConfigError naming file, section and key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    tables = _tables(path, document)
    overridden = _apply_overrides(tables, overrides)
    _apply_preset(tables)
    sections = {
        name: _SectionReader(path, name, cls, overridden).read(tables.get(name, {}))
        for name, cls in _SECTIONS.items()
    }
    config = RunConfig(**sections, path=path, overrides=tuple(overrides))
    if config.data.system and not config.data.chat:
        raise ConfigError(f"{path}: [data] system needs chat = true")
    return config


def _tables(path: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    for name, table in document.items():
        if name not in _SECTIONS:
            raise ConfigError(f"{path}: unknown section [{name}]{_near(name, _SECTIONS)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a section [{name}], got {table!r}")
    return {name: dict(table) for name, table in document.items()}


def _apply_overrides(
    tables: dict[str, dict[str, Any]], overrides: Sequence[str]
) -> set[tuple[str, str]]:
    """Write the overrides into `tables`; returns the (section, key) pairs that they set."""
    overridden = set()
    for item in overrides:
        dotted, equals, text = item.partition("=")
        section, dot, key = dotted.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {item}: want section.key=value, such as train.epochs=2")
        if section not in _SECTIONS:
            near = _near(section, _SECTIONS)
            raise ConfigError(f"--set {item}: unknown section {section!r}{near}")
        tables.setdefault(section, {})[key] = _toml_value(text.strip())
        overridden.add((section, key))
    return overridden


def _apply_preset(tables: dict[str, dict[str, Any]]) -> None:
    """Fill in what `[method] preset` says and the file does not; a name that is no preset is left
    to the section's own check."""
    method = tables.get("method", {})
    with contextlib.suppress(ValueError):
        tables["method"] = {**PRESETS[Preset(method.get("preset", "none"))], **method}


def _toml_value(text: str) -> Any:
    """A TOML value, or the text itself: quotes around a word are a nuisance on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


@dataclasses.dataclass(frozen=True, slots=True)
class _SectionReader:
    """Turns one TOML table into one section, checking names, types and bounds."""

    path: Path
    section: str
    cls: type[Any]
    overridden: set[tuple[str, str]]

    def read(self, table: Mapping[str, Any]) -> Any:
        fields = {item.name: item for item in dataclasses.fields(self.cls)}
        hints = typing.get_type_hints(self.cls)
        for key in table:
            if key not in fields:
                raise self._error(f"unknown key {key!r}{_near(key, fields)}")
        for name, item in fields.items():
            required = item.default is item.default_factory is dataclasses.MISSING
            if required and name not in table:
                raise self._error(f"needs the key {name!r}")
        values = {key: self._convert(key, hints[key], value) for key, value in table.items()}
        for key, value in values.items():
            self._check_bounds(key, value, fields[key].metadata)
        return self.cls(**values)

    def _convert(self, key: str, hint: Any, value: Any) -> Any:
        if isinstance(hint, types.UnionType):  # None is a default, never written
            kinds = [x for x in typing.get_args(hint) if x is not type(None)]
            if Path in kinds and str(value).startswith(DATASETS_PREFIX):
                return value
            if str in kinds and Path not in kinds and isinstance(value, str):
                return value
            hint = kinds[-1] if Path not in kinds else Path
        if hint is Path and isinstance(value, str):
            given = (self.section, key) in self.overridden
            return (Path.cwd() if given else self.path.parent) / Path(value).expanduser()
        if typing.get_origin(hint) is tuple:
            return self._strings(key, value)
        if typing.get_origin(hint) is Mapping:
            return self._table(key, typing.get_args(hint)[1], value)
        if issubclass(hint, StrEnum):
            return self._member(key, hint, value)
        if hint is float and type(value) is int:
            return float(value)
        if type(value) is not hint:
            raise self._wrong(key, _TYPE_NAMES.get(hint, "a number"), value)
        return value

    def _strings(self, key: str, value: Any) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(x, str) and x for x in values):
            raise self._wrong(key, "a list of strings", value)
        return tuple(values)

    def _table(self, key: str, kind: type, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(key, "a table", value)
        for name, number in value.items():
            if type(number) not in (int, kind) or not 0 < number < math.inf:
                raise self._wrong(f"{key}.{name}", "a number above 0", number)
        return {name: kind(number) for name, number in value.items()}

    def _member(self, key: str, hint: type[StrEnum], value: Any) -> StrEnum:
        try:
            return hint(value)
        except ValueError:
            raise self._wrong(key, "one of " + ", ".join(hint), value) from None

    def _check_bounds(self, key: str, value: Any, bounds: Mapping[str, float]) -> None:
        for kind, bound in bounds.items():
            ok = {"low": value >= bound, "above": value > bound, "below": value < bound}[kind]
            if not ok or not math.isfinite(value):
                raise self._wrong(key, f"{_BOUNDS[kind]} {bound:g}", value)

    def _wrong(self, key: str, wanted: str, found: object) -> ConfigError:
        return self._error(f"{key} must be {wanted}, got {found!r}")

    def _error(self, description: str) -> ConfigError:
        return ConfigError(f"{self.path}: [{self.section}] {description}")
