"""Weights in the layout of our products (`product.hpp`), on huge pages."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kasa_runtime.base_model.cache import build_once
from kasa_runtime.engine.native import huge_pages
from kasa_runtime.errors import ModelError

logger = logging.getLogger(__name__)

FILE = "weights.bin"
LAYOUT = 1
"""Of what is stored; raise it when that changes."""
PANEL = 32
"""Outputs that are stored together."""


class PackedWeights(Mapping[str, NDArray[np.float32]]):
    """Memory for the weights of layers, by name; `shapes`: their (out, in)."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        sizes = [packed_size(*shape) for shape in shapes.values()]
        self._memory = huge_pages.allocate(4 * sum(sizes))
        floats = np.frombuffer(self._memory, np.float32, sum(sizes))
        ends = accumulate(sizes)
        self._made_of = repr((LAYOUT, PANEL, list(shapes.items())))
        self._is_shown = False
        self._arrays = {
            name: floats[end - size : end]
            for name, size, end in zip(shapes, sizes, ends, strict=True)
        }

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def show_or_fill(self, directory: Path, fill: Callable[[], None]) -> None:
        """Show the file under the directory that holds what `fill` fills them with, or make it.
        Best effort: where the disk refuses, they are filled at every start."""
        if not self._arrays:
            return
        digest = hashlib.sha256(self._made_of.encode()).hexdigest()[:16]
        final = directory / f"packed-{digest}"
        if self._show(final / FILE):
            return
        fill()
        try:
            build_once(final, self._write, is_complete=self._is_whole, say=logger.info)
        except ModelError as error:
            logger.warning("%s; the next start takes longer", error)

    def _show(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                if not self._is_whole(path.parent):
                    raise ValueError("it is not whole")
                huge_pages.show(file.fileno(), self._memory)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            logger.warning("%s: not used and made again (%s)", path, error)
            return False
        self._is_shown = True
        return True

    def _is_whole(self, final: Path) -> bool:
        path = final / FILE
        return path.is_file() and path.stat().st_size == len(self._memory)

    def _write(self, to: Path) -> None:
        (to / FILE).write_bytes(self._memory)

    def settle(self) -> None:
        """Move them from a file's pages to huge ones, beside whatever reads them."""
        if self._is_shown:
            huge_pages.own(self._memory)
            self._is_shown = False


def packed_size(out_features: int, in_features: int) -> int:
    """In floats."""
    return -(-out_features // PANEL) * PANEL * in_features


def unpacked(packed: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """A copy (out, in)."""
    out_features, in_features = shape
    panels = packed.reshape(-1, in_features, PANEL).transpose(0, 2, 1)
    return panels.reshape(-1, in_features)[:out_features].copy()
