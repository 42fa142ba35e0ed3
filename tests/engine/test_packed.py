from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")

from kasa_runtime.engine.native.openvino.packed import PackedWeights

SHAPES = {"a": (64, 512), "b": (40, 3000)}


class Filler:
    """Fills weights with the same numbers every time, and counts."""

    def __init__(self, shapes: dict[str, tuple[int, int]] = SHAPES) -> None:
        self.weights = PackedWeights(shapes)
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        numbers = np.random.default_rng(0)
        for array in self.weights.values():
            array[:] = numbers.standard_normal(array.size)


def filled(directory: Path, shapes: dict[str, tuple[int, int]] = SHAPES) -> Filler:
    filler = Filler(shapes)
    filler.weights.show_or_fill(directory, filler)
    return filler


def same(left: PackedWeights, right: PackedWeights) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


def test_filled_once_and_shown_from_then_on(tmp_path: Path) -> None:
    first, second = filled(tmp_path), filled(tmp_path)
    assert (first.calls, second.calls) == (1, 0)
    assert same(first.weights, second.weights)
    assert len(list(tmp_path.glob("packed-*"))) == 1


def test_of_other_layers_is_another_file(tmp_path: Path) -> None:
    filled(tmp_path)
    assert filled(tmp_path, {"a": (64, 512), "b": (3000, 40)}).calls == 1
    assert filled(tmp_path, {"b": (64, 512), "a": (40, 3000)}).calls == 1


def test_torn_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = filled(tmp_path)
    [path] = tmp_path.glob("packed-*/*")
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert filled(tmp_path).calls == 1
    assert "not whole" in caplog.text
    again = filled(tmp_path)
    assert again.calls == 0
    assert same(first.weights, again.weights)


def test_without_a_disk_they_are_filled_every_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = tmp_path / "file" / "missing"
    nowhere.parent.touch()
    with caplog.at_level(logging.WARNING):
        assert [filled(nowhere).calls, filled(nowhere).calls] == [1, 1]
    assert "the next start takes longer" in caplog.text


def test_settled_weights_outlive_their_file(tmp_path: Path) -> None:
    """They are the process's own: what becomes of the file changes nothing."""
    first, second = filled(tmp_path), filled(tmp_path)
    second.weights.settle()
    [path] = tmp_path.glob("packed-*/*")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(first.weights, second.weights)
    second.weights["a"][:] = 1  # and may be written
    assert np.all(second.weights["a"] == 1)


def test_readers_see_nothing_of_the_settling(tmp_path: Path) -> None:
    shapes = {"a": (2048, 4096)}
    want = filled(tmp_path, shapes).weights["a"].copy()
    for _ in range(5):
        weights, stop, wrong = filled(tmp_path, shapes).weights, threading.Event(), []

        def read(array=weights["a"], stop=stop, wrong=wrong) -> None:  # type: ignore[no-untyped-def]
            while not stop.is_set():
                if not np.array_equal(array, want):
                    wrong.append(1)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        weights.settle()
        stop.set()
        for reader in readers:
            reader.join()
        assert not wrong
