"""The clients' half of the wire: requests out of arguments, types and errors out of responses.

Both clients make the same `UnaryCall`s; only how they wait for the answer differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, TypedDict, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from kasa.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

from kasa_runtime import errors
from kasa_runtime import types as t
from kasa_runtime.errors import reason

PAGE_SIZE = 1000  # the most that a server gives

Result = TypeVar("Result")


class GenerateOptions(TypedDict, total=False):
    """What a generation takes beside the prompt; prompt, messages or token_ids must be given."""

    messages: Sequence[t.ChatMessage] | None
    token_ids: Sequence[int] | None
    adapter: str  # "" = the base model (default), "name" or "name@version"
    sampling: t.SamplingParams
    timeout_s: float | None  # default: none
    request_id: str  # for the server's log
    cache_salt: str  # only requests with the same one share cached prefixes; default: ""
    prompt_logprobs: int | None  # of the prompt's tokens, and of so many likeliest; default: none
    structured_output: t.StructuredOutput | None  # the form of the text; default: any


class Stubs:
    """The generated stubs of one channel, of either kind."""

    def __init__(self, channel: Any) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.model = model_pb2_grpc.ModelServiceStub(channel)


@dataclass(frozen=True)
class UnaryCall(Generic[Result]):
    """A call with one response: which method, with what, and what the response means."""

    method: Callable[[Stubs], Any]
    request: Any
    result: Callable[[Any], Result]
    options: dict[str, Any] = field(default_factory=dict)

    def timed(self, timeout_s: float | None) -> dict[str, Any]:
        """The call's options, with `timeout_s` where it has no timeout of its own."""
        given_s = self.options.get("timeout")
        return self.options | {"timeout": timeout_s if given_s is None else given_s}


# Calls


def generate(prompt: str | None, options: GenerateOptions) -> UnaryCall[t.TokenChunk]:
    request = generate_request(prompt, options)
    return UnaryCall(lambda s: s.generation.Generate, request, chunk, call_options(options))


def upload(messages: Iterator[Any]) -> UnaryCall[t.AdapterInfo]:
    return UnaryCall(lambda s: s.adapters.UploadAdapter, messages, _adapter_of)


def list_adapters(
    token: str, timeout_s: float | None
) -> UnaryCall[tuple[list[t.AdapterInfo], str]]:
    """One page, and the token of the next."""

    def result(response: Any) -> tuple[list[t.AdapterInfo], str]:
        return [adapter(message) for message in response.adapters], response.next_page_token

    request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, page_token=token)
    return UnaryCall(lambda s: s.adapters.ListAdapters, request, result, {"timeout": timeout_s})


def list_adapter_versions(name: str) -> UnaryCall[list[t.AdapterVersion]]:
    def result(response: Any) -> list[t.AdapterVersion]:
        return [_adapter_version(message) for message in response.versions]

    request = adapters_pb2.ListAdapterVersionsRequest(name=name)
    return UnaryCall(lambda s: s.adapters.ListAdapterVersions, request, result)


def to_adapter(method: str, **arguments: str | bool) -> UnaryCall[t.AdapterInfo]:
    """A method of AdapterService that answers with the adapter."""
    request = getattr(adapters_pb2, f"{method}Request")(**arguments)
    return UnaryCall(lambda s: getattr(s.adapters, method), request, _adapter_of)


def delete_adapter(name: str) -> UnaryCall[None]:
    request = adapters_pb2.DeleteAdapterRequest(name=name)
    return UnaryCall(lambda s: s.adapters.DeleteAdapter, request, lambda _: None)


def unmerge_adapter() -> UnaryCall[None]:
    request = adapters_pb2.UnmergeAdapterRequest()
    return UnaryCall(lambda s: s.adapters.UnmergeAdapter, request, lambda _: None)


def get_model() -> UnaryCall[t.ModelInfo]:
    def result(response: Any) -> t.ModelInfo:
        return _same(t.ModelInfo, response.model)

    return UnaryCall(lambda s: s.model.GetModel, model_pb2.GetModelRequest(), result)


def tokenize(prompt: str | None, messages: Sequence[t.ChatMessage] | None) -> UnaryCall[list[int]]:
    _require_one(prompt=prompt, messages=messages)
    request = model_pb2.TokenizeRequest(prompt=prompt, chat=_chat(messages))
    return UnaryCall(lambda s: s.model.Tokenize, request, lambda r: list(r.token_ids))


# Requests


def generate_request(prompt: str | None, options: GenerateOptions) -> Any:
    messages, token_ids = options.get("messages"), options.get("token_ids")
    _require_one(prompt=prompt, messages=messages, token_ids=token_ids)
    sampling = asdict(options.get("sampling") or t.SamplingParams())
    return generation_pb2.GenerateRequest(
        adapter=options.get("adapter", ""),
        prompt=prompt,
        chat=_chat(messages),
        tokens=None if token_ids is None else generation_pb2.TokenIds(ids=token_ids),
        sampling=generation_pb2.SamplingParams(**sampling),
        cache_salt=options.get("cache_salt", ""),
        prompt_logprobs=options.get("prompt_logprobs"),
        structured_output=_structured_output(options.get("structured_output")),
    )


def call_options(
    options: GenerateOptions, default_timeout_s: float | None = None
) -> dict[str, Any]:
    """Timeout and metadata of a generation's call."""
    timeout_s = options.get("timeout_s")
    request_id = options.get("request_id")
    metadata = (("x-request-id", request_id),) if request_id else ()
    timeout_s = default_timeout_s if timeout_s is None else timeout_s
    return {"timeout": timeout_s, "metadata": metadata}


def _require_one(**inputs: object) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise errors.InvalidRequest("input", f"give one of {', '.join(inputs)}, got {found}")


def _structured_output(wanted: t.StructuredOutput | None) -> Any:
    if wanted is None:
        return None
    choice = generation_pb2.Choice(options=wanted.choice) if wanted.choice else None
    return generation_pb2.StructuredOutput(
        json_schema=wanted.json_schema, regex=wanted.regex, choice=choice, grammar=wanted.grammar
    )


def _chat(messages: Sequence[t.ChatMessage] | None) -> Any:
    if messages is None:
        return None
    wire = [generation_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
    return generation_pb2.Chat(messages=wire)


# Responses


def chunk(message: Any) -> t.TokenChunk:
    """A response of Generate, or a message of GenerateStream."""
    usage, timing = message.usage, message.timing
    return t.TokenChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprobs(entry) for entry in message.logprobs),
        finish_reason=_enum(t.FinishReason, generation_pb2.FinishReason, message.finish_reason),
        usage=_same(t.Usage, usage) if message.HasField("usage") else None,
        adapter=message.adapter,
        mode=_enum(t.Mode, generation_pb2.Mode, message.mode) or t.Mode.BASE,
        timing=_same(t.Timing, timing) if message.HasField("timing") else None,
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs),
    )


def adapter(message: Any) -> t.AdapterInfo:
    method = _enum(t.AdapterMethod, adapters_pb2.AdapterMethod, message.method)
    rule = adapters_pb2.TruncationRule.Name(message.truncation.rule)
    return t.AdapterInfo(
        name=message.name,
        version=message.version,
        state=_enum(t.AdapterState, adapters_pb2.AdapterState, message.state),
        rank=message.rank,
        alpha=message.alpha,
        method=method or t.AdapterMethod.LORA,
        truncation_rank=message.truncation.rank,
        truncation_rule=rule.removeprefix("TRUNCATION_RULE_").lower(),
        target_modules=tuple(message.target_modules),
        base_fingerprint=message.base_fingerprint,
        size_bytes=message.size_bytes,
        create_time=message.create_time.ToMicroseconds() / 1e6,
        in_flight=message.in_flight,
        reason=message.reason,
        tier=_enum(t.AdapterTier, adapters_pb2.AdapterTier, message.tier) or t.AdapterTier.DISK,
        pinned=message.pinned,
    )


def _adapter_version(message: Any) -> t.AdapterVersion:
    return t.AdapterVersion(
        version=message.version,
        current=message.current,
        size_bytes=message.size_bytes,
        create_time=message.create_time.ToMicroseconds() / 1e6,
        state=_enum(t.AdapterState, adapters_pb2.AdapterState, message.state),
        tier=_enum(t.AdapterTier, adapters_pb2.AdapterTier, message.tier),
        in_flight=message.in_flight,
    )


def _adapter_of(response: Any) -> t.AdapterInfo:
    return adapter(response.adapter)


def _logprobs(entry: Any) -> t.TokenLogprobs:
    top = tuple((each.token_id, each.logprob) for each in entry.top)
    return t.TokenLogprobs(entry.token_id, entry.logprob, top)


def _prompt_logprobs(entries: Sequence[Any]) -> tuple[t.TokenLogprobs | None, ...]:
    """The first token's is None, as it follows nothing."""
    return (None, *map(_logprobs, entries[1:])) if entries else ()


def _same(result: type[Result], message: Any) -> Result:
    """A dataclass from a message with the same fields."""
    names = (f.name for f in fields(result))  # type: ignore[arg-type]  # Result is a dataclass
    return result(**{name: getattr(message, name) for name in names})


def _enum(ours: Callable[[str], Result], wire: Any, number: int) -> Any:
    """The wire's FINISH_REASON_STOP is our FinishReason.STOP; its zero is None."""
    zero = wire.Name(0)
    prefix = zero.removesuffix("UNSPECIFIED")
    return ours(wire.Name(number).removeprefix(prefix).lower()) if number else None


# Errors


def _tree(error_type: type[errors.KasaError]) -> Iterator[type[errors.KasaError]]:
    yield error_type
    for subclass in error_type.__subclasses__():
        yield from _tree(subclass)


_CLASSES = {reason(error_type): error_type for error_type in _tree(errors.KasaError)}


def error(rpc_error: Any, address: str) -> Exception:
    """The library's error that the server raised, found in the status's details."""
    message = rpc_error.details() or ""
    details = _details(rpc_error)
    info = details.get("ErrorInfo")
    error_type = None if info is None else _CLASSES.get(info.reason)
    if info is None or error_type is None:
        return _unexplained(rpc_error.code(), message, address)
    if issubclass(error_type, errors.InvalidRequest):
        violation = details["BadRequest"].field_violations[0]
        return error_type(violation.field, violation.description)
    if issubclass(error_type, errors.Overloaded):
        retry_after_s = details["RetryInfo"].retry_delay.ToNanoseconds() / 1e9
        if issubclass(error_type, errors.LimitExceeded):
            name = info.metadata.get("adapter", "")
            return error_type(message, retry_after_s=retry_after_s, name=name)
        return error_type(message, retry_after_s=retry_after_s)
    if issubclass(error_type, errors.AdapterError):
        return error_type(message, name=info.metadata.get("adapter", ""))
    return error_type(message)


def _unexplained(code: grpc.StatusCode, message: str, address: str) -> Exception:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(message)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unreachable(
            f"no answer from {address} ({message}); is `kasa serve` running there?"
        )
    return errors.KasaError(f"{address} answered {code.name}: {message}")


def _details(rpc_error: Any) -> dict[str, Any]:
    status = rpc_status.from_call(rpc_error)
    found = {}
    for packed in status.details if status is not None else ():
        name = packed.TypeName().removeprefix("google.rpc.")
        message_type = getattr(error_details_pb2, name, None)
        if message_type is not None:
            found[name] = message_type()
            packed.Unpack(found[name])
    return found
