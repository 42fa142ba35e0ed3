"""Folded adapters that are in no slot, so that they come back without disk, digest and fold.

A version is here or in a slot, never in both: the engine goes on using the weights it was given.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from kasa_runtime.adapter.loader import AdapterLoader
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.adapter.names import key_of, name_of
from kasa_runtime.background import in_background
from kasa_runtime.types import AdapterInfo, Observer

T = TypeVar("T")


class HostTier:
    """By key, the least recently used first; at most `max_bytes`, 0 for none. Event loop only."""

    def __init__(self, max_bytes: int, loader: AdapterLoader, observer: Observer) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._loader = loader
        self._observer = observer
        self._held: OrderedDict[str, tuple[AdapterWeights, int]] = OrderedDict()
        self._fetching: dict[str, asyncio.Task[AdapterWeights]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        """Keys, those that are on their way here included."""
        return iter({**self._held, **self._fetching})

    def names(self) -> set[str]:
        return {name_of(key) for key in self._held}

    def put(self, weights: AdapterWeights) -> None:
        """Keep them; others go if need be. What is larger than the whole tier is not kept."""
        self.pop(weights.key)
        size_bytes = weights.size_bytes
        if size_bytes > self._max_bytes:
            return
        while self.num_bytes + size_bytes > self._max_bytes:
            self.pop(next(iter(self._held)))
        self._held[weights.key] = weights, size_bytes
        self.num_bytes += size_bytes

    def forget(self, key: str) -> None:
        """Drop a version; if it is on its way here, it will not stay."""
        self._fetching.pop(key, None)
        self.pop(key)

    def pop(self, key: str) -> AdapterWeights | None:
        """A version's weights, which are not here any more then; None if they are not."""
        weights, size_bytes = self._held.pop(key, (None, 0))
        self.num_bytes -= size_bytes
        return weights

    async def read(self, info: AdapterInfo) -> AdapterWeights:
        """A version's weights from the disk, once if they are on their way here. Raises
        AdapterNotFound, AdapterInvalid."""
        fetching = self._fetching.get(key_of(info))
        return await (asyncio.shield(fetching) if fetching else self._read(info))

    async def fetch(self, info: AdapterInfo, is_wanted: Callable[[], bool]) -> None:
        """Bring a version here, if `is_wanted` still when it has been read. Nothing where there is
        no tier. Raises as `read`."""
        key = key_of(info)
        if not self._max_bytes:
            return
        if key in self._held:
            self._held.move_to_end(key)
            return
        if key not in self._fetching:
            fetching = self._fetch(info, is_wanted)
            self._fetching[key] = asyncio.create_task(fetching, name=f"fetch {key}")
        await asyncio.shield(self._fetching[key])

    async def _fetch(self, info: AdapterInfo, is_wanted: Callable[[], bool]) -> AdapterWeights:
        key, this = key_of(info), asyncio.current_task()
        try:
            weights = await self._read(info)
            if self._fetching.get(key) is this and is_wanted():
                self.put(weights)
            return weights
        finally:
            if self._fetching.get(key) is this:
                del self._fetching[key]

    async def _read(self, info: AdapterInfo) -> AdapterWeights:
        async with self._loader.hold(info):
            reading = in_background(self._loader.read, key_of(info), info)
            return await timed(self._observer, info.name, "read", reading)


async def timed(observer: Observer, name: str, stage: str, work: Awaitable[T]) -> T:
    """Await a stage of loading an adapter, and tell how long it took, or that it failed."""
    start = time.perf_counter()
    try:
        result = await work
    except Exception as error:
        observer.adapter_load_failed(name, error)
        raise
    observer.adapter_loaded(name, stage=stage, seconds=time.perf_counter() - start)
    return result
