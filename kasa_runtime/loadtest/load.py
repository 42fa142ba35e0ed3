"""Load on a server: when requests are sent, and what came of each. All is measured here, at the
client.

In an open loop requests arrive by a Poisson process, whatever the server does. Their times count
from when they were due, not from when they were sent: neither a slow server nor a late sender hides
what a user would have waited (no coordinated omission). In a closed loop a number of clients send
one request after another, each as soon as it has the answer to the last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from kasa_runtime.errors import KasaError, reason
from kasa_runtime.types import FinishReason, TokenChunk


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, and of which adapter ("": the base model)."""

    adapter: str
    prompt: str


@dataclass(slots=True)
class Sample:
    """What came of a request. Times are in seconds since the load began."""

    adapter: str
    due_s: float
    sent_s: float
    end_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    error: str = ""  # the reason, as in `google.rpc.ErrorInfo`; "": it succeeded

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    def spread(self, num_tokens: int) -> int:
        """Add tokens that came with others but were not counted, as over HTTP, to all messages but
        the first alike. How many that were."""
        if num_tokens <= 0 or not self.arrivals:
            return 0
        first, *rest = self.arrivals
        rest = rest or [first]
        for i, (at_s, count) in enumerate(rest):
            more = (i + 1) * num_tokens // len(rest) - i * num_tokens // len(rest)
            self.arrivals[i - len(rest)] = (at_s, count + more)
        return num_tokens

    @property
    def ttft_s(self) -> float | None:
        """From when it was due to its first token; None if there was none."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    @property
    def e2e_s(self) -> float:
        """From when it was due to its end."""
        return self.end_s - self.due_s

    @property
    def itl_s(self) -> list[float]:
        """Between tokens. Tokens that came in one message share the time since the one before."""
        return [
            (after - before) / count
            for (before, _), (after, count) in pairwise(self.arrivals)
            for _ in range(count)
        ]


Ask = Callable[[Request], AsyncIterator[TokenChunk]]


class Refused(KasaError):
    """A request failed for a reason that is no class of ours."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Load:
    """Sends requests by `ask` and keeps a sample of each that ended. Event loop only."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._start_s = time.perf_counter()
        self.samples: list[Sample] = []
        self.num_tokens = 0
        self.in_flight = 0
        self.max_in_flight = 0

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def num_failed(self) -> int:
        return sum(bool(sample.error) for sample in self.samples)

    async def open_loop(
        self, requests: Iterable[Request], rate: float, duration_s: float, generator: Random
    ) -> None:
        """Send `rate` requests per second, on average, for `duration_s`; wait for their answers."""
        self._start_s, due_s = time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as group:
            for request in requests:
                due_s += generator.expovariate(rate)
                if due_s > duration_s:
                    return
                await asyncio.sleep(max(0.0, due_s - self.now_s))
                group.create_task(self._send(request, due_s))

    async def closed_loop(
        self, requests: Iterable[Request], concurrency: int, duration_s: float
    ) -> None:
        """Have `concurrency` clients send requests for `duration_s`; wait for the last answers."""
        self._start_s, waiting = time.perf_counter(), iter(requests)

        async def client() -> None:
            for request in waiting:
                await self._send(request, self.now_s)
                if self.now_s >= duration_s:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

    async def _send(self, request: Request, due_s: float) -> None:
        sample = Sample(request.adapter, due_s, self.now_s)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            async for chunk in self._ask(request):
                self._arrived(chunk, sample)
        except TimeoutError:
            sample.error = "DEADLINE_EXCEEDED"
        except Refused as error:
            sample.error = error.reason
        except KasaError as error:
            sample.error = reason(type(error))
        finally:
            self.in_flight -= 1
        sample.end_s = self.now_s
        self.samples.append(sample)

    def _arrived(self, chunk: TokenChunk, sample: Sample) -> None:
        if chunk.token_ids:
            sample.arrivals.append((self.now_s, len(chunk.token_ids)))
            self.num_tokens += len(chunk.token_ids)
        if chunk.usage is not None:
            sample.prompt_tokens = chunk.usage.prompt_tokens
            sample.cached_prompt_tokens = chunk.usage.cached_prompt_tokens
            self.num_tokens += sample.spread(chunk.usage.completion_tokens - sample.num_tokens)
        if chunk.finish_reason is FinishReason.CANCELLED:
            sample.error = "CANCELLED"  # by the server, as when it stops
