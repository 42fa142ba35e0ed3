"""When requests are sent, and from when their times count."""

from __future__ import annotations

import asyncio
import time
from itertools import islice, repeat
from random import Random

import pytest

from kasa_runtime.errors import Overloaded
from kasa_runtime.loadtest.load import Load, Request, Sample
from kasa_runtime.types import FinishReason, TokenChunk, Usage

REQUEST = Request("style", "hello")
CLOCK_S = 0.002  # sleeps may end this much early


async def answer(request, *, first_s=0.0, gap_s=0.0, counts=(1, 2)):
    await asyncio.sleep(first_s)
    for count in counts:
        yield TokenChunk("x", (7,) * count)
        await asyncio.sleep(gap_s)
    yield TokenChunk("", (), finish_reason=FinishReason.STOP, usage=Usage(5, sum(counts), 3))


async def test_a_sample_has_the_times_of_its_tokens():
    load = Load(lambda request: answer(request, first_s=0.1, gap_s=0.05))
    await load.closed_loop([REQUEST], 1, 60.0)
    (sample,) = load.samples
    assert (sample.adapter, sample.num_tokens, sample.error) == ("style", 3, "")
    assert (sample.prompt_tokens, sample.cached_prompt_tokens) == (5, 3)
    assert sample.ttft_s >= 0.1 - CLOCK_S
    assert sample.e2e_s >= 0.2 - CLOCK_S
    first, second = sample.itl_s  # two tokens came in the second message
    assert first == second >= 0.025 - CLOCK_S
    assert load.num_tokens == 3


def test_times_count_from_when_a_request_was_due():
    sample = Sample("", due_s=1.0, sent_s=4.0, end_s=6.0, arrivals=[(5.0, 1), (5.5, 1), (6.0, 2)])
    assert (sample.ttft_s, sample.e2e_s) == (4.0, 5.0)
    assert sample.itl_s == [0.5, 0.25, 0.25]
    assert Sample("", due_s=1.0, sent_s=1.0, end_s=2.0).ttft_s is None


async def test_open_loop_sends_whether_or_not_answers_come():
    held = asyncio.Event()

    async def wait(request):
        await held.wait()
        yield TokenChunk("", (1,), finish_reason=FinishReason.STOP)

    load = Load(wait)
    requests = islice(repeat(REQUEST), 20)
    running = asyncio.create_task(load.open_loop(requests, 1000.0, 60.0, Random(0)))
    while load.in_flight < 20:
        await asyncio.sleep(0.001)
    held.set()
    await running
    assert load.max_in_flight == len(load.samples) == 20


async def test_open_loop_arrivals_are_the_drawn_ones_and_end_with_the_duration():
    load = Load(answer)
    await load.open_loop(repeat(REQUEST), 200.0, 0.5, Random(3))
    generator, due_s, expected = Random(3), 0.0, []
    while (due_s := due_s + generator.expovariate(200.0)) <= 0.5:
        expected.append(due_s)
    assert sorted(sample.due_s for sample in load.samples) == expected
    assert all(sample.sent_s >= sample.due_s for sample in load.samples)


async def test_open_loop_counts_what_a_late_sender_made_wait():
    """Coordinated omission: while the first request stops everything, others are due."""
    first = iter([True])

    async def stop_everything(request):
        if next(first, False):
            time.sleep(0.5)
        yield TokenChunk("", (1,), finish_reason=FinishReason.STOP)

    load = Load(stop_everything)
    await load.open_loop(islice(repeat(REQUEST), 20), 100.0, 60.0, Random(0))
    waited = [sample for sample in load.samples if 0.05 < sample.due_s < 0.4]
    stopped_s = min(sample.due_s for sample in load.samples)
    assert len(waited) > 3
    for sample in waited:
        assert sample.ttft_s >= stopped_s + 0.5 - sample.due_s


async def test_closed_loop_has_as_many_in_flight_as_clients():
    load = Load(lambda request: answer(request, first_s=0.01))
    await load.closed_loop(islice(repeat(REQUEST), 10), 3, 60.0)
    assert (load.max_in_flight, len(load.samples)) == (3, 10)
    assert all(sample.due_s == pytest.approx(sample.sent_s, abs=0.01) for sample in load.samples)


async def test_closed_loop_ends_with_the_duration():
    load = Load(lambda request: answer(request, first_s=0.02))
    await load.closed_loop(repeat(REQUEST), 2, 0.2)
    assert 2 <= len(load.samples) <= 22
    assert max(sample.sent_s for sample in load.samples) < 0.2


async def test_failures_are_samples_and_others_go_on():
    errors = iter([Overloaded("full", retry_after_s=1.0), TimeoutError("late"), None])

    async def fail(request):
        if error := next(errors):
            raise error
        yield TokenChunk("", (1,), finish_reason=FinishReason.CANCELLED)

    load = Load(fail)
    await load.closed_loop(islice(repeat(REQUEST), 3), 1, 60.0)
    found = [sample.error for sample in load.samples]
    assert found == ["OVERLOADED", "DEADLINE_EXCEEDED", "CANCELLED"]
    assert (load.num_failed, load.in_flight) == (3, 0)


async def test_what_is_cut_off_is_no_sample():
    load = Load(lambda request: answer(request, first_s=60.0))
    running = asyncio.create_task(load.closed_loop([REQUEST], 1, 60.0))
    while not load.in_flight:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (load.samples, load.in_flight) == ([], 0)
