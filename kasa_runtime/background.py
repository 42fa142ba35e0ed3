"""Threads for work beside the step loop: files, checks, folding, merged weights.

Such a thread must never use torch with more than one thread. OpenMP would give it a team of its
own, and with more threads than cores libgomp stops spinning between parallel regions, in every team
and for good: decoding, which is made of thousands of short regions, then loses a third of its
speed.

And whatever processor it takes from a thread of the model, all of the model's threads wait for. A
low priority alone does not help: those threads yield when they wait for each other, and then a
thread of any priority gets a whole time slice. So background threads have a low priority and yield
often, by `give_way`: on a busy machine they get what the model leaves, and elsewhere all they can
use.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import cache
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 4
NICENESS = 10
"""Above that of the process."""


async def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)` on a background thread; raises what it raises."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_pool(), lambda: function(*args, **kwargs))


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled, who learns of that afterwards: the
    engine and the table of what is in it never disagree."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


async def done_in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `in_background`, and awaited to its end even if the caller is cancelled: for what changes
    something, so that nothing is changed after a lock was released or a runtime closed."""
    return await finish(in_background(function, *args, **kwargs))


def on_loop_clock(deadline_s: float | None) -> float | None:
    """A time.monotonic deadline on the running loop's clock."""
    if deadline_s is None:
        return None
    return asyncio.get_running_loop().time() + deadline_s - time.monotonic()


@asynccontextmanager
async def entered_in_background(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """`context`, entered and left on background threads, and left even if the caller is cancelled
    meanwhile. It is not told of errors."""
    entering = asyncio.ensure_future(in_background(context.__enter__))
    try:
        yield await asyncio.shield(entering)
    finally:
        await finish(_leave(entering, context))


async def _leave(entering: asyncio.Future[T], context: AbstractContextManager[T]) -> None:
    await asyncio.wait([entering])
    if entering.exception() is None:
        await in_background(context.__exit__, None, None, None)


def give_way() -> None:
    """Let threads of the model go first, where there are not processors enough. Work of more than
    some milliseconds calls it in its loops; it costs a microsecond."""
    os.sched_yield()


def return_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it: glibc does, beside every
    thread that allocated some. Takes some milliseconds."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, "kasa-background", initializer=_initialise)


def _initialise() -> None:
    set_torch_threads(1)
    if sys.platform == "linux":  # where a priority is a thread's
        with suppress(OSError):
            thread = threading.get_native_id()
            niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def set_torch_threads(count: int) -> None:
    """Let the calling thread, and no other, use torch with `count` threads.

    The setting is per thread, but a thread's first use of torch takes over the one that was made
    last anywhere; hence the first use before the setting."""
    import torch

    torch.get_num_threads()
    torch.set_num_threads(count)
