from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from kasa_runtime.engine.native import huge_pages

PAGE = 2 << 20


def touched(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Anonymous memory of its own and its address; written to at every page."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    array[:: mmap.PAGESIZE] = 7
    return memory, array.ctypes.data


def covered(address: int, size: int) -> int:
    """Bytes of [address, address + size) in resident regions."""
    return sum(
        max(0, min(end, address + size) - max(start, address))
        for start, end in huge_pages.resident_regions(PAGE)
    )


def test_only_what_is_resident_is_moved() -> None:
    memory, address = touched(8 * PAGE)
    assert covered(address, 8 * PAGE) >= 7 * PAGE
    untouched = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = np.frombuffer(untouched, np.uint8)
    data[0 : 4 * PAGE : mmap.PAGESIZE] = 1
    found = covered(data.ctypes.data, 8 * PAGE)
    assert 3 * PAGE <= found <= 4 * PAGE
    huge_pages.collapse()
    assert covered(data.ctypes.data, 8 * PAGE) == found
    assert set(np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]) == {7}


def test_regions_are_whole_huge_pages() -> None:
    _memory, _ = touched(4 * PAGE)
    regions = list(huge_pages.resident_regions(PAGE))
    assert regions
    assert all(start % PAGE == end % PAGE == 0 and start < end for start, end in regions)


@pytest.mark.skipif(not huge_pages.SIZE.exists(), reason="no transparent huge pages")
def test_memory_moves_and_keeps_its_content() -> None:
    memory, _ = touched(16 * PAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 256, array.size, dtype=np.uint8)
    before = array.copy()
    moved = huge_pages.collapse()
    assert np.array_equal(array, before)
    if not moved:
        pytest.skip("the system gave none")
    assert moved >= 15 * PAGE


def test_a_system_without_them_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "SIZE", tmp_path / "missing")
    assert huge_pages.collapse() == 0
