"""The engine protocol: token ids in, token ids out, adapters by key.

An engine knows no names, versions, files or text, but for what a structured output is made of;
`runtime.py` translates. Everything here is
called on the event loop and never blocks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kasa_runtime.types import (
    FinishReason,
    Mode,
    SamplingParams,
    StructuredOutput,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from kasa_runtime.adapter.lora import AdapterWeights


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """`adapter` is the key of a loaded adapter, None for the base. `deadline_s` is on
    time.monotonic's clock. The engine is shared fairly between clients. Only requests with the
    same `cache_salt` share keys and values. With a `structured_output` no token leaves the form:
    the end of sequence comes only where the text is whole, and where nothing may follow the
    generation ends with STOP, whatever `min_tokens` and `ignore_eos` say."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    deadline_s: float | None = None
    client: str = ""
    cache_salt: str = ""
    prompt_logprobs: int | None = None  # as of GenerationRequest
    structured_output: StructuredOutput | None = None


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step added to a request; the last one has `finish_reason`. `scheduled_s`
    (time.monotonic) is when the request first entered a step; None while it never did.
    `num_cached_tokens` of its prompt were then found in the cache. `prompt_logprobs` is with its
    first token."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    scheduled_s: float | None = None
    mode: Mode = Mode.BASE
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0 to 1
    num_preemptions: int
    num_steps: int
    prefix_cache_queries: int  # prompt tokens looked for in the KV cache
    prefix_cache_hits: int  # those of them that were found


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine and its model allow."""

    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    max_slots: int
    max_rank: int
    executor: str
    dtype: str
    num_layers: int
    num_parameters: int


class Engine(ABC):
    """One base model, running. Every method may raise EngineDead once the step loop has died."""

    limits: EngineLimits

    @abstractmethod
    async def start(self) -> None:
        """Load the model and begin stepping. Raises ModelError."""

    @abstractmethod
    async def close(self) -> None:
        """End running requests as cancelled, stop stepping, free the model."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """False once the step loop has ended."""

    @abstractmethod
    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of one request, one item per step that produced something.

        Closing the generator cancels: it takes effect at the next step and frees the cache. Raises
        KeyError when the adapter is not loaded, and InvalidRequest when its structured output
        cannot be had, at the first iteration; InvalidRequest later too, where a grammar comes to
        nothing or is too complex to follow."""

    @abstractmethod
    async def load_adapter(self, adapter: AdapterWeights, instead_of: str | None = None) -> None:
        """Put an adapter into a slot, while requests run; no-op if it is there. `instead_of`: the
        key of one that leaves its slot at the same time, if it is in one.

        Raises CapacityExceeded when its rank or the number of slots does not allow it."""

    @abstractmethod
    async def unload_adapter(self, key: str) -> None:
        """Free the slot; no-op if it is not there. The caller guarantees that no request uses
        it."""

    @abstractmethod
    async def merge_adapter(self, key: str) -> None:
        """Write a loaded adapter into the weights, between two steps. Its requests then cost
        nothing extra; all others, running ones included, go on exactly, by the difference of
        deltas. Replaces the one merged before."""

    @abstractmethod
    async def unmerge_adapter(self) -> None:
        """Put the pristine weights back, bit for bit; no-op when nothing is merged."""

    @abstractmethod
    def stats(self) -> EngineStats: ...
