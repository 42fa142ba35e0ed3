"""Rows of training data, from files or from a `datasets` name. Every row remembers where it stands,
so that an error can say it; nothing is skipped."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kasa_runtime.errors import ConfigError, DataError

DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. `line` counts from 1; in Parquet files and data sets it is the row's
    number."""

    source: Path | str
    line: int
    fields: Mapping[str, Any]

    def render(self, template: str, **more: Any) -> str:
        """`template` with `{field}`s filled in. Raises DataError for a field that the row lacks."""
        try:
            return template.format_map({**self.fields, **more})
        except KeyError as error:
            raise self.error(
                f"no field {error}, which {template!r} needs; has {', '.join(self.fields)}"
            ) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise self.error(f"cannot fill in the template {template!r} ({error})") from None

    def get(self, field: str) -> Any:
        """The value of a field. Raises DataError where the row has none."""
        if self.fields.get(field) is None:
            raise self.error(f"no field {field!r}; has {', '.join(self.fields)}")
        return self.fields[field]

    def error(self, description: str) -> DataError:
        return DataError(f"{self.source}:{self.line}: {description}")


def read_rows(source: Path | str, columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a source; `columns` names those of a .csv or .tsv file that has no header.

    Raises DataError naming source and line, ConfigError for a form that is not known."""
    if isinstance(source, str) and source.startswith(DATASETS_PREFIX):
        rows = list(_from_datasets(source))
    else:
        path = Path(source)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise ConfigError(
                f"[data] {path}: want a file that ends in {', '.join(_READERS)}, or "
                f'"{DATASETS_PREFIX}NAME[:CONFIG]:SPLIT"'
            )
        try:
            rows = list(reader(path, columns))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); see the comments of run.toml on getting the "
                "data"
            ) from error
    if not rows:
        raise DataError(f"{source}: want at least one row, found none")
    return rows


def shuffled(rows: Sequence[Row], *, seed: int, limit: int = 0) -> list[Row]:
    """The rows in an order that depends on `seed` alone; the first `limit` of them (0: all)."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:limit] if limit else order


def sample(rows: Sequence[Row], count: int, *, seed: int) -> list[Row]:
    """`count` rows drawn with `seed`, in their order; all rows for 0."""
    if not 0 < count < len(rows):
        return list(rows)
    chosen = random.Random(seed).sample(range(len(rows)), count)
    return [rows[index] for index in sorted(chosen)]


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            yield Row(path, number, _json_object(path, number, line))


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}:{number}: want a JSON object, got {type(fields).__name__}")
    return fields


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _table(path, columns, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # A tab separates whatever stands around it: quotation marks are text, as in GLUE's files.
    return _table(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, **dialect)
        names = list(columns)
        line = 1
        try:
            for values in reader:
                if values and not names:
                    names = values
                elif values:
                    yield Row(path, line, _named(path, line, names, values))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not a readable table ({error})") from error


def _named(path: Path, line: int, names: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    if len(values) != len(names):
        raise DataError(
            f"{path}:{line}: want {len(names)} columns ({', '.join(names)}), found {len(values)}"
        )
    return dict(zip(names, values, strict=True))


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    parquet = _extra("pyarrow.parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except _extra("pyarrow").ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return (Row(path, number, fields) for number, fields in enumerate(rows, 1))


def _from_datasets(source: str) -> Iterator[Row]:
    """`datasets:NAME[:CONFIG]:SPLIT`"""
    name, *config, split = [*source.removeprefix(DATASETS_PREFIX).split(":"), ""][:-1] or [""]
    if not name or not split or len(config) > 1:
        raise ConfigError(f"[data] {source!r}: want {DATASETS_PREFIX}NAME[:CONFIG]:SPLIT")
    try:
        rows = _extra("datasets").load_dataset(name, *config, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{source}: datasets cannot load this ({error})") from error
    return (Row(source, number, fields) for number, fields in enumerate(rows, 1))


def _extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"[data] {error.name} is not installed; pip install 'kasa-runtime[train]'"
        ) from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
