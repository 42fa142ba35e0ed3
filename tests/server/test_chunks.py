from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing

import pytest

from kasa_runtime.types import FinishReason, TokenChunk
from server import chunks
from server.chunks import STREAMS_PER_STEP, Pace, coalesced


async def tokens(count: int, *, then: asyncio.Event | None = None) -> AsyncIterator[TokenChunk]:
    """One after another, each seen before the next; the end follows `then`."""
    for i in range(count):
        yield TokenChunk(f"{i} ", (i,))
        for _ in range(5):
            await asyncio.sleep(0)
    if then is not None:
        await then.wait()
    yield TokenChunk("", (), finish_reason=FinishReason.STOP)


async def sizes(source: AsyncIterator[TokenChunk], pace: Pace | None = None) -> list[int]:
    async with aclosing(coalesced(source, pace)) as found:
        return [len(chunk.token_ids) async for chunk in found]


async def test_without_a_pace_every_token_is_sent_when_it_comes():
    assert await sizes(tokens(4)) == [1, 1, 1, 1, 0]


async def test_the_first_token_waits_for_nothing_and_later_ones_for_each_other():
    assert await sizes(tokens(8), Pace(3)) == [1, 3, 3, 1]


async def test_nothing_is_lost_or_reordered():
    async with aclosing(coalesced(tokens(10), Pace(4))) as found:
        parts = [chunk async for chunk in found]
    assert [i for chunk in parts for i in chunk.token_ids] == list(range(10))
    assert "".join(chunk.text for chunk in parts) == "0 1 2 3 4 5 6 7 8 9 "
    assert [chunk.finish_reason for chunk in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason is FinishReason.STOP


async def test_a_token_that_is_held_goes_out_when_no_other_follows(monkeypatch):
    monkeypatch.setattr(chunks, "HELD_S", 0.01)
    go_on = asyncio.Event()
    received = []
    async with aclosing(coalesced(tokens(3, then=go_on), Pace(10))) as found:
        async for chunk in found:
            received.append(chunk.token_ids)
            if len(received) == 2:
                go_on.set()  # so the second came while the source stood still
    assert received == [(0,), (1, 2), ()]


async def test_every_held_token_is_timed_anew(monkeypatch):
    monkeypatch.setattr(chunks, "HELD_S", 0.01)

    async def slow() -> AsyncIterator[TokenChunk]:
        for i in range(4):
            yield TokenChunk("", (i,))
            await received.acquire()

    received = asyncio.Semaphore(0)
    async with aclosing(coalesced(slow(), Pace(100))) as found:
        async for chunk in found:
            assert len(chunk.token_ids) == 1
            received.release()


@pytest.mark.parametrize(
    ("num_streams", "interval"),
    [(1, 1), (STREAMS_PER_STEP, 1), (STREAMS_PER_STEP + 1, 2), (10 * STREAMS_PER_STEP, 10)],
)
def test_a_step_sends_a_bounded_number_of_messages(num_streams: int, interval: int):
    pace = Pace(0)
    with ExitStack() as streams:
        for _ in range(num_streams):
            streams.enter_context(pace.stream())
        assert pace.interval == interval
    assert pace.interval == 1


async def test_an_ended_or_abandoned_stream_counts_no_more():
    pace = Pace(0)
    await sizes(tokens(2), pace)
    async with aclosing(coalesced(tokens(5), pace)) as found:
        await anext(found)
        assert pace._num_streams == 1
    assert pace._num_streams == 0
