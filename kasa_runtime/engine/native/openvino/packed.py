"""Weights in the layout of our products (`product.hpp`), on huge pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

PANEL = 32
"""Outputs that are stored together."""


class PackedWeights(Mapping[str, NDArray[np.float32]]):
    """Memory for the weights of layers, by name; `shapes`: their (out, in)."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        sizes = [packed_size(*shape) for shape in shapes.values()]
        memory = mmap.mmap(-1, max(1, 4 * sum(sizes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # of kernels that have none
            memory.madvise(mmap.MADV_HUGEPAGE)
        floats = np.frombuffer(memory, np.float32, sum(sizes))
        ends = accumulate(sizes)
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


def packed_size(out_features: int, in_features: int) -> int:
    """In floats."""
    return -(-out_features // PANEL) * PANEL * in_features


def unpacked(packed: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """A copy (out, in)."""
    out_features, in_features = shape
    panels = packed.reshape(-1, in_features, PANEL).transpose(0, 2, 1)
    return panels.reshape(-1, in_features)[:out_features].copy()
