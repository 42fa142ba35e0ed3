"""The types that everything else speaks: requests, results, adapters as users see them.

Light: imports neither torch nor protobuf. The wire's twins of these types live in `proto/` and meet
them in `server/convert.py` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from kasa_runtime.errors import InvalidRequest

BASE = ""
"""The adapter name that stands for the base model."""

MAX_LOGPROBS = 20
"""Tokens that are told in the place of one, at most."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # the client went away or asked to stop
    DEADLINE = "deadline"  # the request's deadline passed


class Mode(StrEnum):
    """How the adapter of a request was applied."""

    BASE = "base"  # no adapter
    BATCHED = "batched"  # low-rank delta beside the base weights
    MERGED = "merged"  # inside the weights


class AdapterMethod(StrEnum):
    KASA = "kasa"
    LORA = "lora"


class AdapterState(StrEnum):
    """Where an adapter is in its life."""

    READY = "ready"  # checked, on disk
    LOADING = "loading"  # on its way into the engine
    RESIDENT = "resident"  # in an engine slot
    MERGED = "merged"  # inside the weights
    QUARANTINED = "quarantined"  # refused; `AdapterInfo.reason` says why


class AdapterTier(StrEnum):
    """Where the weights of an adapter are, the fastest place that has them."""

    DISK = "disk"
    HOST = "host"  # in memory, ready for a slot
    SLOT = "slot"  # in the engine


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    Order of application: penalties, temperature, top_k, top_p, min_p, draw. `temperature == 0` is
    greedy, and then top_k, top_p and min_p have no effect. Raises InvalidRequest naming
    `sampling.<field>`.
    """

    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0  # end of sequence and stop strings are ignored before this many tokens
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = (
        1.0  # over prompt and output; divides positive logits, multiplies negative ones
    )
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output, times the count
    seed: int | None = None  # None: a fresh one per request
    stop: tuple[str, ...] = ()  # cut from the text
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'

    def __post_init__(self) -> None:
        _require(
            self.max_tokens is None or self.max_tokens >= 1,
            "max_tokens",
            "at least 1",
            self.max_tokens,
        )
        _require(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        if self.max_tokens is not None:
            _require(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                "at most max_tokens",
                self.min_tokens,
            )
        _require(
            _within(self.temperature, 0.0, 100.0), "temperature", "from 0 to 100", self.temperature
        )
        _require(_within(self.top_p, 0.0, 1.0) and self.top_p > 0, "top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        _require(_within(self.min_p, 0.0, 1.0), "min_p", "from 0 to 1", self.min_p)
        penalty = self.repetition_penalty
        _require(
            _within(penalty, 0.0, 100.0) and penalty > 0,
            "repetition_penalty",
            "in (0, 100]",
            penalty,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_within(value, -100.0, 100.0), name, "from -100 to 100", value)
        _require(
            self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed
        )
        _require(len(self.stop) <= 16, "stop", "at most 16 strings", len(self.stop))
        _require(
            all(0 < len(s) <= 1024 for s in self.stop),
            "stop",
            "strings of 1 to 1024 characters",
            self.stop,
        )
        if self.logprobs is not None:
            wanted = f"from 0 to {MAX_LOGPROBS}"
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", wanted, self.logprobs)


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that a generated text must have; exactly one of the fields says it. Raises
    InvalidRequest naming `structured_output`."""

    json_schema: str | None = None  # a JSON Schema, as JSON text; "{}" is any JSON value
    regex: str | None = None  # the whole text matches it
    choice: tuple[str, ...] = ()  # the text is one of these
    grammar: str | None = None  # a context-free grammar in Lark's syntax, from its rule `start`

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("json_schema", "regex", "choice", "grammar")
            if getattr(self, name) not in (None, ())
        ]
        if len(given) != 1:
            raise InvalidRequest(
                "structured_output",
                "must be one of json_schema, regex, choice, grammar, got "
                + (" and ".join(given) or "none"),
            )


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _require(ok: bool, field_name: str, wanted: str, found: object) -> None:
    if not ok:
        raise InvalidRequest(f"sampling.{field_name}", f"must be {wanted}, got {found!r}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant called. `arguments`: a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, as the chat template takes it."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str = ""  # of the call that a tool answers


class Trace(Protocol):
    """Where the parts of one request's time are told, when it has ended."""

    def span(self, name: str, start_s: float, end_s: float) -> Trace:
        """A part, in seconds of `time.monotonic`; what is told to the result lies within it."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. Exactly one of `prompt`, `messages` and `token_ids` is given.

    `adapter` is "" (base model), "name" (its current version) or "name@version". `deadline_s` is on
    the clock of `time.monotonic`. `request_id` must be unique among the requests in flight. Only
    requests with one `cache_salt` share what is in the prefix cache. Raises InvalidRequest naming
    `prompt_logprobs`.
    """

    request_id: str
    adapter: str = BASE
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    deadline_s: float | None = None
    cache_salt: str = ""
    structured_output: StructuredOutput | None = None
    prompt_logprobs: int | None = None  # None: none; n: of each prompt token and the n likeliest
    tools: tuple[Mapping[str, Any], ...] = ()  # that the chat template tells of, as OpenAI has them
    trace: Trace | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        count = self.prompt_logprobs
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(
                "prompt_logprobs", f"must be from 0 to {MAX_LOGPROBS}, got {count}"
            )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability (natural logarithm, of the model's own distribution before penalties and
    temperature) of one token, generated or the prompt's, and of the ones most likely in its place,
    most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request arrived: until it was first scheduled, until its first token, until
    its end."""

    queue_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What one step added to a generation. The last chunk has `finish_reason` and all fields below
    it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    adapter: str = BASE  # resolved "name@version"; "" for the base model
    mode: Mode = Mode.BASE
    timing: Timing | None = None
    # Of the prompt's tokens, whose first follows nothing; in the first chunk, where asked for.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter as `ListAdapters` shows it. A quarantined one has only `name`, `state` and
    `reason`, and what of the rest could be read."""

    name: str
    version: str  # digest of the content
    state: AdapterState
    rank: int = 0
    alpha: float = 0.0
    method: AdapterMethod = AdapterMethod.LORA
    truncation_rank: int = 0
    truncation_rule: str = "none"
    target_modules: tuple[str, ...] = ()
    base_fingerprint: str = ""  # "" when the adapter does not say
    size_bytes: int = 0
    create_time: float = 0.0  # seconds since the epoch
    in_flight: int = 0  # requests that hold it
    reason: str = ""  # why it is quarantined
    tier: AdapterTier = AdapterTier.DISK
    pinned: bool = False  # stays in its slot


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A version of an adapter that is kept on the disk, so that `name@version` and a rollback reach
    it."""

    version: str  # digest of the content
    current: bool  # what the name alone stands for
    size_bytes: int
    create_time: float  # seconds since the epoch
    state: AdapterState = AdapterState.READY
    tier: AdapterTier = AdapterTier.DISK
    in_flight: int = 0  # requests that hold it


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model that a runtime serves."""

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    num_layers: int
    num_parameters: int
    engine: str
    executor: str
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class ManifestFile:
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadManifest:
    """What an upload announces before its bytes. `expected_version`: None = do not check; "" = the
    name must be new; a version = must be the current one."""

    name: str
    files: tuple[ManifestFile, ...]
    expected_version: str | None = None


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """A snapshot for gauges."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float  # 0 to 1
    prefix_cache_queries: int  # prompt tokens looked for in the KV cache
    prefix_cache_hits: int  # those of them that were found
    merged_adapter: str  # "name@version" or ""
    resident_adapters: Mapping[str, AdapterTier] = field(
        default_factory=dict
    )  # those in memory, by name
    token_shares: Mapping[str, float] = field(
        default_factory=dict
    )  # "name@version" -> share that auto mode decides by, 0 to 1; empty in manual mode
    host_tier_bytes: int = 0  # weights of adapters in memory that are in no slot
    num_slots: int = 0
    num_steps: int = 0  # of the engine, since it started
    num_preemptions: int = 0  # requests that gave their place in the KV cache to others
    running_adapters: Mapping[str, int] = field(
        default_factory=dict
    )  # name -> requests that are in the engine; "" for the base model
    waiting_adapters: Mapping[str, int] = field(
        default_factory=dict
    )  # name -> requests that wait in front of it


class Observer:
    """Receives events of the runtime, on the event loop. Every method does nothing here;
    `server/metrics.py` counts.

    `adapter` is a name without version, "" for the base model.
    """

    def queued(self, adapter: str) -> None: ...

    def first_token(
        self, adapter: str, *, queue_s: float, load_s: float, ttft_s: float, prompt_tokens: int
    ) -> None:
        """Seconds since the arrival: `queue_s` until the first step with the request, of which it
        waited for its adapter for `load_s`, and `ttft_s` until the token."""

    def tokens(self, adapter: str, *, count: int, gap_s: float | None) -> None:
        """`count` tokens arrived `gap_s` seconds after the previous ones (None: they were the
        first)."""

    def finished(
        self, adapter: str, mode: Mode, reason: FinishReason, *, decode_s: float, total_s: float
    ) -> None:
        """`decode_s` seconds passed between the first token and the last, 0 without two."""

    def failed(self, adapter: str, error: BaseException) -> None: ...

    def adapter_loaded(self, adapter: str, *, stage: str, seconds: float) -> None:
        """`stage` is one of read, tail, slot."""

    def adapter_load_failed(self, adapter: str, error: BaseException) -> None:
        """A stage of loading an adapter raised."""

    def merged(self, adapter: str, *, seconds: float) -> None:
        """An adapter was merged, or with "" the pristine weights were put back."""

    def merge_decided(self, adapter: str) -> None:
        """Auto mode is about to merge an adapter, or with "" to put the pristine weights back."""

    def upload_rejected(self, reason: str) -> None: ...

    def adapters_changed(self, adapters: Sequence[AdapterInfo]) -> None: ...
