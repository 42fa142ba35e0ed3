"""Rows of training data, from files or from a `datasets` name. Every row remembers where it stands,
so that an error can say it; nothing is skipped."""

from __future__ import annotations

import csv
import difflib
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kasa_runtime.errors import ConfigError, DataError

DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. `line` is where it begins, from 1; in Parquet files, JSON arrays and
    data sets it is the row's number."""

    source: Path | str
    line: int
    fields: Mapping[str, Any]

    def render(self, template: str, **more: Any) -> str:
        """`template` with `{field}`s filled in. Raises DataError for a field that the row lacks, or
        that is null."""
        values = {name: value for name, value in self.fields.items() if value is not None}
        try:
            return template.format_map({**values, **more})
        except KeyError as error:
            raise self._lacks(str(error.args[0]), f", which {template!r} needs") from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise self.error(f"cannot fill in the template {template!r} ({error})") from None

    def get(self, field: str) -> Any:
        """The value of a field. Raises DataError where the row has none, or null."""
        if self.fields.get(field) is None:
            raise self._lacks(field)
        return self.fields[field]

    def _lacks(self, field: str, why: str = "") -> DataError:
        if field in self.fields:
            return self.error(f"field {field!r} is null{why}")
        near = difflib.get_close_matches(field, self.fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return self.error(f"no field {field!r}{why}; has {', '.join(self.fields)}{hint}")

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
        except OSError as error:
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


def _text(path: Path) -> str:
    """The file's text, without a byte-order mark. Raises DataError naming the line that is not
    UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _json_row(path, number, _json_value(path, number, line))


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """An array of objects, or JSON Lines under this name."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _jsonl(path, columns)
    values = enumerate(_json_value(path, 1, text), 1)
    return (_json_row(path, number, value) for number, value in values)


def _json_value(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(f"{path}:{line}: not valid JSON ({error})") from error


def _json_row(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: want a JSON object, got {type(value).__name__}")
    return Row(path, number, value)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _table(path, columns, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # A tab separates whatever stands around it: quotation marks are text, as in GLUE's files.
    return _table(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[Row]:
    """A row may span lines, by a line break in quotation marks: it is named by its first one."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    reader = csv.reader(io.StringIO(_text(path), newline=""), **dialect)
    names = list(columns)
    line = 1
    try:
        for values in reader:
            if values and not names:
                names = _header(path, line, values)
            elif values:
                yield Row(path, line, _named(path, line, names, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a readable table ({error})") from error


_MAX_FIELD_CHARS = 2**31 - 1
"""Python's limit of 131,072 is less than a long document, and a C long may have 32 bits."""


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}:{line}: the header has two columns named {twice[0]!r}")
    return names


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


_DATASET = re.compile(r"(?P<name>[^:]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[.*\])?)")


def _from_datasets(source: str) -> Iterator[Row]:
    """`datasets:NAME[:CONFIG]:SPLIT`; a split may be a part, such as train[:1000]."""
    match = _DATASET.fullmatch(source.removeprefix(DATASETS_PREFIX))
    if match is None:
        raise ConfigError(f"[data] {source!r}: want {DATASETS_PREFIX}NAME[:CONFIG]:SPLIT")
    datasets = _extra("datasets")
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"])
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
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
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
