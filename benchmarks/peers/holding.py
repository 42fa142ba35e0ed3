"""The adapters of our own systems: a runtime and a client are told the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import adapter_name
from kasa_runtime.client import AsyncClient
from kasa_runtime.runtime import Runtime


def own_copy(settings: dict[str, Any]) -> Path:
    """Of the adapters: the store keeps its state in the directory, and other processes have their
    own."""
    directory = Path(tempfile.mkdtemp(dir=settings["scratch_dir"]))
    shutil.copytree(settings["adapters_dir"], directory, dirs_exist_ok=True)
    return directory


async def hold(host: Runtime | AsyncClient, num_before: int, num_held: int, merged: bool) -> None:
    """Load the first `num_held` adapters, of which `num_before` are, and merge the first one."""
    await host.unmerge_adapter()
    for i in range(num_held, num_before):
        await host.unload_adapter(adapter_name(i))
    for i in range(num_before, num_held):
        await host.load_adapter(adapter_name(i))
    if merged:
        await host.merge_adapter(adapter_name(0))
