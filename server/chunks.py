"""Chunks of a generation: several as one, and streams that do not pile up behind a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from itertools import chain

from kasa_runtime.types import TokenChunk


def merge_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Consecutive chunks as one. The last one's closing fields are its closing fields."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
        prompt_logprobs=chunks[0].prompt_logprobs,
    )


async def coalesced(source: AsyncIterator[TokenChunk]) -> AsyncGenerator[TokenChunk]:
    """The chunks of `source`; those that came while the reader was busy arrive as one.

    So a slow reader neither holds up the engine nor makes a queue of messages grow: what waits is
    one chunk, at most as long as the generation. Closing this closes `source`.
    """
    waiting: list[TokenChunk] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        async for chunk in source:
            waiting.append(chunk)
            arrived.set()

    task = asyncio.create_task(pump(), name="coalesce")
    task.add_done_callback(lambda _: arrived.set())
    ended = False
    try:
        while not ended:
            await arrived.wait()
            arrived.clear()
            ended = task.done()  # before the chunks are taken, so that none can follow them
            if waiting:
                chunk = merge_chunks(waiting)
                waiting.clear()
                yield chunk
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await close(source)


async def close(source: AsyncIterator[TokenChunk]) -> None:
    """Close an iterator that may be a generator; closing the runtime's cancels the request."""
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()
