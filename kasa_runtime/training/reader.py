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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    Quantization,
    RunConfig,
    TaskKind,
    TrainSection,
)
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm
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
    for description in conflicts(config):
        raise ConfigError(f"{path}: {description}")
    return config


def conflicts(config: RunConfig) -> Iterator[str]:
    """What is wrong with keys that are each valid, but not together."""
    yield from _data_conflicts(config)
    yield from _method_conflicts(config)
    yield from _measuring_conflicts(config)


def _data_conflicts(config: RunConfig) -> Iterator[str]:
    data = config.data
    prompted = data.task in (TaskKind.COMPLETION, TaskKind.CHOICE)
    labelled = data.task in (TaskKind.CHOICE, TaskKind.CLASSIFICATION)
    tables = [s for s in (data.train, data.eval, data.test) if str(s).endswith((".csv", ".tsv"))]
    if data.chat and not prompted:
        yield f"[data] chat is for task = completion and choice, not {data.task}"
    if data.system and not data.chat:
        yield "[data] system needs chat = true"
    if data.packing and data.task.has_head:
        yield f"[data] packing is for language models, not task = {data.task}"
    if data.text_pair and not data.task.has_head:
        yield f"[data] text_pair is for task = classification and regression, not {data.task}"
    if (data.labels or data.label_names) and not labelled:
        yield f"[data] labels and label_names are for choice and classification, not {data.task}"
    if data.task is TaskKind.CHOICE and "{label_name" not in data.completion:
        yield (
            "[data] task = choice needs a completion with {label_name}, or all labels are the same "
            f"text, got {data.completion!r}"
        )
    if data.columns and not tables:
        yield "[data] columns names the columns of .csv and .tsv files, and there is no such file"
    if config.model.quantization is not Quantization.NONE and data.task.has_head:
        yield f"[model] quantization is for language models, not task = {data.task}"


def _method_conflicts(config: RunConfig) -> Iterator[str]:
    method = config.method
    qr = method.ortho_form is OrthoForm.QR
    if not method.target_modules:
        yield "[method] target_modules is empty, so nothing would be trained"
    if method.preset is not Preset.NONE and not method.is_kasa:
        yield f"[method] preset = {method.preset} is a form of kind = kasa"
    if qr and not (method.is_kasa and method.diag):
        yield "[method] ortho_form = qr needs kind = kasa and diag = true"
    if qr and method.diag_init is not DiagInit.ZEROS and not method.init_from:
        yield (
            "[method] ortho_form = qr needs diag_init = zeros: A and B start random, and the "
            f"update must start at zero; got {method.diag_init}"
        )


def _measuring_conflicts(config: RunConfig) -> Iterator[str]:
    data, train, metrics = config.data, config.train, config.eval.metrics
    during = ("loss", *metrics) if data.task.has_head else ("loss", "perplexity")
    if train.patience and not train.best_metric:
        yield "[train] patience needs best_metric, the measure that must get better"
    for key in ("best_metric", "eval_steps"):
        if getattr(train, key) and not data.eval:
            yield f"[train] {key} needs [data] eval, the rows that are measured during training"
    if train.best_metric and train.best_metric not in during:
        yield (
            f"[train] best_metric must be measured during training: one of {', '.join(during)}, "
            f"got {train.best_metric!r}"
        )
    if metrics and not (data.test or (data.eval and data.task.has_head)):
        yield "[eval] metrics needs [data] test, the rows that they are measured on"
    if config.eval.references and data.task not in (TaskKind.COMPLETION, TaskKind.CHAT):
        yield f"[eval] references are texts, task = {data.task} has none"


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
        if isinstance(hint, types.UnionType):
            hint = self._alternative(hint, value)
        if hint is Path and isinstance(value, str) and value:
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

    @staticmethod
    def _alternative(hint: types.UnionType, value: Any) -> Any:
        """The type that a value of a key with several of them is to have; None is a default, never
        written."""
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if Path in kinds:
            return str if str(value).startswith(DATASETS_PREFIX) else Path
        return str if str in kinds and isinstance(value, str) and value else kinds[-1]

    def _strings(self, key: str, value: Any) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) and value else value
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
