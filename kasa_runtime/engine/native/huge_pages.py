"""Huge pages under the weights: a step that reads all weights once is limited by memory, and by the
translation of the address of every 4 KiB of it unless they lie in pages of 2 MiB.

Linux gives them unasked only where its administrator wants so. Here they are asked for when the
weights are in place (`MADV_COLLAPSE`, Linux 6.1), and only for memory that is resident, so that no
process grows by it. Where they are not to be had, everything stays as it is.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

MADV_COLLAPSE = 25
PRESENT = np.uint64(1 << 63)
SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
PROCESS = Path("/proc/self")


def collapse() -> int:
    """Move this process's resident anonymous memory to huge pages, beside whatever uses it: about
    half a gigabyte a second. Returns the bytes that the system moved or had moved before."""
    start_s, moved = time.monotonic(), 0
    libc = ctypes.CDLL(None)
    try:
        for start, end in resident_regions(int(SIZE.read_text())):
            address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            if libc.madvise(address, length, MADV_COLLAPSE) == 0:
                moved += end - start
    except OSError as error:
        logger.debug("no huge pages: %s", error)
    logger.info("%d MiB on huge pages, in %.1f s", moved >> 20, time.monotonic() - start_s)
    return moved


def collapse_in_background() -> None:
    threading.Thread(target=collapse, name="kasa-huge-pages", daemon=True).start()


def resident_regions(page: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of `page`-sized pieces of private anonymous memory, all of which is
    resident; both are multiples of `page`. Raises OSError where the system does not tell."""
    with (PROCESS / "pagemap").open("rb", buffering=0) as pagemap:
        for low, high in _anonymous_mappings():
            first, last = -(-low // page), high // page
            if first >= last:
                continue
            pagemap.seek(first * page // mmap.PAGESIZE * 8)
            entries = np.frombuffer(
                pagemap.read((last - first) * page // mmap.PAGESIZE * 8), np.uint64
            )
            resident = (entries & PRESENT).reshape(-1, page // mmap.PAGESIZE).all(axis=1)
            edges = np.flatnonzero(np.diff(resident, prepend=False, append=False))
            for start, end in edges.reshape(-1, 2).tolist():
                yield (first + start) * page, (first + end) * page


def _anonymous_mappings() -> list[tuple[int, int]]:
    found = []
    for line in (PROCESS / "maps").read_text().splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            low, high = addresses.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found
