"""The set of labels, and rows outside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kasa_runtime.errors import ConfigError, DataError
from kasa_runtime.training.config import DataSection
from kasa_runtime.training.labels import Labels
from kasa_runtime.training.rows import Row


def rows(*labels: object) -> list[Row]:
    return [Row(Path("a.tsv"), line, {"label": label}) for line, label in enumerate(labels, 1)]


def labels_of(*found: object, **settings: tuple[str, ...]) -> Labels:
    return Labels.of(DataSection(train=Path("a.tsv"), **settings), rows(*found))


def test_labels_of_the_training_rows_are_sorted() -> None:
    labels = labels_of("spam", "ham", "spam")
    assert labels.values == labels.names == ("ham", "spam")
    assert [labels.index(row) for row in rows("spam", "ham")] == [1, 0]


def test_given_labels_keep_their_order_and_have_names() -> None:
    labels = labels_of("0", labels=("1", "0"), label_names=("good", "bad"))
    assert labels.names[labels.index(rows(0)[0])] == "bad"  # a number in JSON, a text in a table


def test_label_outside_the_set_names_the_row_and_the_set() -> None:
    labels = labels_of(labels=("0", "1"))
    with pytest.raises(DataError, match=r"a.tsv:2: label: want one of 0, 1, got '2'"):
        labels.index(rows("0", "2")[1])


def test_missing_and_empty_labels_name_the_row() -> None:
    with pytest.raises(DataError, match=r"a.tsv:2: field 'label' is null"):
        labels_of("0", None)
    with pytest.raises(DataError, match=r"a.tsv:2: label: the label is empty"):
        labels_of("0", " ")


@pytest.mark.parametrize("found", [("0",), ("0", "0")])
def test_one_label_is_no_classification(found: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"labels: want at least two different ones, found 0"):
        labels_of(*found)


def test_labels_must_differ() -> None:
    with pytest.raises(ConfigError, match=r"at least two different ones, found 0, 0"):
        labels_of(labels=("0", "0"))


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ("a", "b", "c")])
def test_names_must_be_one_for_each_label(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"label_names: want 2 different names, one for each of"):
        labels_of("0", "1", label_names=names)
