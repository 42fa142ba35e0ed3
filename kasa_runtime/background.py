"""Threads for work beside the step loop: files, checks, folding, merged weights.

Such a thread must never use torch with more than one thread. OpenMP would give it a team of its
own, and with more threads than cores libgomp stops spinning between parallel regions, in every team
and for good: decoding, which is made of thousands of short regions, then loses a third of its
speed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 4


async def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)` on a background thread; raises what it raises."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_pool(), lambda: function(*args, **kwargs))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, "kasa-background", initializer=_single_threaded)


def _single_threaded() -> None:
    set_torch_threads(1)


def set_torch_threads(count: int) -> None:
    """Let the calling thread, and no other, use torch with `count` threads.

    The setting is per thread, but a thread's first use of torch takes over the one that was made
    last anywhere; hence the first use before the setting."""
    import torch

    torch.get_num_threads()
    torch.set_num_threads(count)
