from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from kasa_runtime.background import in_background


async def test_runs_beside_the_caller_and_returns() -> None:
    assert await in_background(threading.current_thread) is not threading.current_thread()
    assert await in_background(int, "12", base=3) == 5


async def test_raises_what_the_function_raises() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await in_background(int, "x")


async def test_uses_one_torch_thread_and_leaves_the_callers_alone() -> None:
    before = torch.get_num_threads()
    try:
        for count in (2, 3):  # whatever is set elsewhere, also after the thread's first use
            torch.set_num_threads(count)
            assert await in_background(torch.get_num_threads) == 1
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities are the process's")
async def test_its_threads_come_after_the_callers() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await in_background(priority) > priority()
