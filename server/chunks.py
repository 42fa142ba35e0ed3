"""Chunks of a generation: several as one, and streams that do not pile up behind a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

from kasa_runtime.types import TokenChunk

STREAMS_PER_STEP = 16
"""Messages that a step sends at most where their number is not set: more would take the processor
from the next step."""
HELD_S = 0.2
"""The longest that a token waits for those that go with it."""


class Pace:
    """How many tokens streams send at a time. Event loop only."""

    def __init__(self, interval: int = 1) -> None:
        """`interval`: that many; 0: one, and with more than STREAMS_PER_STEP streams as many as
        keep the number of messages."""
        self._interval = interval
        self._num_streams = 0

    @property
    def interval(self) -> int:
        return self._interval or max(1, -(-self._num_streams // STREAMS_PER_STEP))

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One stream, until it ends."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1


def merge_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Consecutive chunks as one. The last one's closing fields are its closing fields."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
        prompt_logprobs=tuple(chain.from_iterable(chunk.prompt_logprobs for chunk in chunks)),
    )


async def coalesced(
    source: AsyncIterator[TokenChunk], pace: Pace | None = None
) -> AsyncGenerator[TokenChunk]:
    """The chunks of `source`; those that came while the reader was busy arrive as one, and so do
    as many tokens as `pace` says. The first one and the end are held back by nothing.

    So a slow reader neither holds up the engine nor makes a queue of messages grow: what waits is
    one chunk, at most as long as the generation. Closing this closes `source`.
    """
    pace = pace or Pace()
    waiting: list[TokenChunk] = []
    arrived = asyncio.Event()
    timer: asyncio.TimerHandle | None = None

    def send() -> None:
        nonlocal timer
        arrived.set()
        if timer is not None:
            timer.cancel()
            timer = None

    async def pump() -> None:
        nonlocal timer
        loop = asyncio.get_running_loop()
        due = 1
        async for chunk in source:
            waiting.append(chunk)
            if len(waiting) >= due:
                send()
                due = pace.interval
            elif timer is None:
                timer = loop.call_later(HELD_S, send)

    with pace.stream():
        task = asyncio.create_task(pump(), name="coalesce")
        task.add_done_callback(lambda _: send())
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
            send()
