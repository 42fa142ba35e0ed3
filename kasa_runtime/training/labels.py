"""The labels of a classification task: their values in the data, their order and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import DataSection
from kasa_runtime.training.rows import Row


@dataclass(frozen=True, slots=True)
class Labels:
    """`values` as they stand in column `field`, as texts; `names` is what each is called."""

    field: str
    values: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, data: DataSection, train: Sequence[Row]) -> Labels:
        """`[data] labels`, or those of the training rows. Raises ConfigError, DataError."""
        values = data.labels or _found(data.label, train)
        names = data.label_names or values
        if len(values) < 2 or len(set(values)) != len(values):
            raise ConfigError(
                f"[data] labels: want at least two different ones, found {', '.join(values)}"
            )
        if len(names) != len(values) or len(set(names)) != len(names):
            raise ConfigError(
                f"[data] label_names: want {len(values)} different names, one for each of "
                f"{', '.join(values)}; got {', '.join(names)}"
            )
        return cls(data.label, values, names)

    def __len__(self) -> int:
        return len(self.values)

    def index(self, row: Row) -> int:
        """Which label a row has. Raises DataError for one outside the set."""
        value = str(row.get(self.field))
        if value not in self.values:
            raise row.error(
                f"{self.field}: want one of {', '.join(self.values)}, got {value!r}; [data] labels "
                "lists them"
            )
        return self.values.index(value)


def _found(field: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of `rows`, sorted."""
    values = set()
    for row in rows:
        value = str(row.get(field))
        if not value.strip():
            raise row.error(f"{field}: the label is empty")
        values.add(value)
    return tuple(sorted(values))
