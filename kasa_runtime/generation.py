"""One generation on its way from the engine's outputs to the user's chunks: text, counts, times,
events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kasa_runtime.detokenizer import Detokenizer
from kasa_runtime.engine.base import EngineOutput
from kasa_runtime.types import (
    BASE,
    FinishReason,
    GenerationRequest,
    Mode,
    Observer,
    Timing,
    TokenChunk,
    Usage,
)

if TYPE_CHECKING:
    from kasa_runtime.adapter.residency import Lease


@dataclass
class Generation:
    """State between two steps. Event loop only."""

    request: GenerationRequest
    arrival_s: float
    detokenizer: Detokenizer
    observer: Observer
    prompt_ids: tuple[int, ...] = ()
    lease: Lease | None = None
    admitted_s: float | None = None
    leased_s: float | None = None
    _ended: bool = field(default=False, init=False)
    _mode: Mode = field(default=Mode.BASE, init=False)
    _num_tokens: int = field(default=0, init=False)
    _num_cached_tokens: int = field(default=0, init=False)
    _scheduled_s: float | None = field(default=None, init=False)
    _first_token_s: float | None = field(default=None, init=False)
    _last_token_s: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        """The adapter's name without version, as events have it."""
        return self.request.adapter.partition("@")[0]

    def advance(self, output: EngineOutput) -> TokenChunk:
        """The chunk for one output; with the end of the generation if the engine or a stop string
        ended it."""
        self._mode, self._scheduled_s = output.mode, output.scheduled_s
        self._num_cached_tokens = output.num_cached_tokens
        if output.token_ids:
            self._count(len(output.token_ids))
        chunk = TokenChunk(
            self.detokenizer.push(output.token_ids),
            output.token_ids,
            output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
        )
        if self.detokenizer.stopped:
            return self.end(FinishReason.STOP, chunk)
        return chunk if output.finish_reason is None else self.end(output.finish_reason, chunk)

    def end(self, reason: FinishReason, chunk: TokenChunk | None = None) -> TokenChunk:
        """`chunk`, or an empty one, with everything that the last chunk says."""
        chunk = chunk or TokenChunk("", ())
        now_s = time.monotonic()
        total_s = now_s - self.arrival_s
        self._ended = True
        decode_s = self._last_token_s - (self._first_token_s or self._last_token_s)
        self.observer.finished(self.name, self._mode, reason, decode_s=decode_s, total_s=total_s)
        return replace(
            chunk,
            text=chunk.text + self.detokenizer.finish(),
            finish_reason=reason,
            usage=Usage(len(self.prompt_ids), self._num_tokens, self._num_cached_tokens),
            adapter=self.lease.key if self.lease else BASE,
            mode=self._mode,
            timing=Timing(
                queue_s=(self._scheduled_s or now_s) - self.arrival_s,
                ttft_s=(self._first_token_s or now_s) - self.arrival_s,
                total_s=total_s,
            ),
        )

    def abandon(self) -> None:
        """Nobody reads on: that is an end too, unless it had one."""
        if not self._ended:
            self.end(FinishReason.CANCELLED)

    def tell_trace(self) -> None:
        """What the time went to, if somebody wants to know. Once, at the end."""
        trace = self.request.trace
        if trace is None:
            return
        end_s = time.monotonic()
        trace.span("queue", self.arrival_s, self.admitted_s or end_s)
        if self.admitted_s is not None and self.request.adapter != BASE:
            lease = trace.span("lease", self.admitted_s, self.leased_s or end_s)
            if self.lease is not None and self.lease.load_began_s is not None:
                lease.span("load", self.lease.load_began_s, self.leased_s or end_s)
        if self._scheduled_s is not None:
            trace.span("prefill", self._scheduled_s, self._first_token_s or end_s)
        if self._first_token_s is not None:
            trace.span("decode", self._first_token_s, end_s)

    def _count(self, count: int) -> None:
        now_s = time.monotonic()
        self._num_tokens += count
        if self._first_token_s is None:
            self._first_token_s = now_s
            self.observer.first_token(
                self.name,
                queue_s=(self._scheduled_s or now_s) - self.arrival_s,
                load_s=(self.leased_s or 0.0) - (self.admitted_s or 0.0),
                ttft_s=now_s - self.arrival_s,
                prompt_tokens=len(self.prompt_ids),
            )
            self.observer.tokens(self.name, count=count, gap_s=None)
        else:
            self.observer.tokens(self.name, count=count, gap_s=now_s - self._last_token_s)
        self._last_token_s = now_s
