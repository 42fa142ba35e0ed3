"""Huge pages under the weights and the KV cache: a step that reads all weights once is limited by
memory, and by the translation of the address of every 4 KiB of it unless they lie in pages of 2
MiB.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23
"""Of Linux 5.14; older kernels refuse it."""
POPULATED_AT_ONCE = 8 << 20
"""Bytes. Whoever maps memory waits meanwhile, and a system that is short of it takes long."""
SETTLED_AFTER_S = 1.0
"""The first request should not wait for it."""
MADV_POPULATE_READ = 22
MADV_COLLAPSE = 25
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
PRESENT = np.uint64(1 << 63)
MAP_FIXED = 16
ALIGNMENT = 2 << 20
SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
PROCESS = Path("/proc/self")


def reserve(num_bytes: int) -> mmap.mmap:
    """Zeroed memory of the process's own. It is a multiple of `ALIGNMENT`, for Linux aligns only
    such memory to huge pages."""
    num_bytes = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def allocate(num_bytes: int) -> mmap.mmap:
    """`reserve`, on huge pages where the system has them."""
    memory = reserve(num_bytes)
    want(memory)
    return memory


def want(memory: mmap.mmap) -> None:
    """Let what nobody has touched yet come as huge pages, where the system has them."""
    with suppress(OSError, AttributeError):  # of kernels that have none
        memory.madvise(mmap.MADV_HUGEPAGE)


def populate(memory: mmap.mmap) -> None:
    """Make it present, so that no step is the first to touch it. Best effort, and without changing
    what is in it: steps may be running already."""
    view = np.frombuffer(memory, np.uint8)
    libc = _libc()
    for start in range(0, view.nbytes, POPULATED_AT_ONCE):
        piece = view[start : start + POPULATED_AT_ONCE]
        if libc.madvise(piece.ctypes.data, piece.nbytes, MADV_POPULATE_WRITE) != 0:
            return


def show(file: int, memory: mmap.mmap) -> None:
    """Put the content of a file (a descriptor) in the place of the memory's own, without reading it
    now. Raises OSError."""
    libc, size = _libc(), len(memory)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    flags = mmap.MAP_PRIVATE | MAP_FIXED
    if libc.mmap(address, size, mmap.PROT_READ, flags, file, 0) != address:
        raise OSError(ctypes.get_errno(), "cannot map a file over memory")
    libc.madvise(address, size, MADV_POPULATE_READ)  # what the page cache has, at once


def own(memory: mmap.mmap) -> None:
    """Give memory that shows a file a content of its own, the same, beside whatever reads it: a
    file's pages are small. Best effort: kernels before Linux 5.7 keep showing the file."""
    shown = np.frombuffer(memory, np.uint8)
    copy = np.frombuffer(allocate(shown.nbytes), np.uint8)
    np.copyto(copy, shown)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    to = ctypes.c_void_p(shown.ctypes.data)
    _libc().mremap(copy.ctypes.data, copy.nbytes, copy.nbytes, flags, to)


def collapse() -> int:
    """Move this process's resident anonymous memory to huge pages, beside whatever uses it: about
    half a gigabyte a second. Returns the bytes that the system moved or had moved before."""
    start_s, moved = time.monotonic(), 0
    libc = _libc()
    try:
        for start, end in resident_regions(int(SIZE.read_text())):
            if libc.madvise(start, end - start, MADV_COLLAPSE) == 0:
                moved += end - start
    except OSError as error:
        logger.debug("no huge pages: %s", error)
    logger.info("%d MiB on huge pages, in %.1f s", moved >> 20, time.monotonic() - start_s)
    return moved


def settle_in_background(cache: mmap.mmap, settle_weights: Callable[[], None]) -> None:
    """After a start: the cache becomes present, then the weights move."""

    def settle() -> None:
        time.sleep(SETTLED_AFTER_S)
        want(cache)
        populate(cache)
        settle_weights()
        collapse()

    threading.Thread(target=settle, name="kasa-huge-pages", daemon=True).start()


def _libc() -> ctypes.CDLL:
    """The system's library; unlike `mmap.madvise` it leaves the interpreter to others."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.madvise.argtypes = [address, size, number]
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.mmap.restype = address
    libc.mremap.argtypes = [address, size, size, number]
    libc.mremap.restype = address
    return libc


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
