"""The wire's messages to the library's types and back: the only place that validates what comes in.

Names of enum values agree on both sides but for the wire's prefix: FINISH_REASON_STOP is
FinishReason.STOP.
"""

from __future__ import annotations

import base64
import binascii
import re
from enum import StrEnum
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from kasa.v1 import adapters_pb2, generation_pb2, model_pb2

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import (
    AdapterInfo,
    AdapterVersion,
    ChatMessage,
    GenerationRequest,
    ManifestFile,
    ModelInfo,
    SamplingParams,
    StructuredOutput,
    TokenChunk,
    TokenLogprobs,
    UploadManifest,
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
VERSION = re.compile(r"[0-9a-f]{1,128}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ROLES = ("system", "user", "assistant", "tool")
DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000
MAX_FILES = 16
MAX_SALT = 256  # characters
MAX_CHUNK_BYTES = 4 * 2**20


# From the wire. All raise InvalidRequest, which names the field.


def generation_request(
    message: generation_pb2.GenerateRequest, request_id: str, deadline_s: float | None
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        adapter=adapter_ref("adapter", message.adapter) if message.adapter else "",
        sampling=_sampling(message.sampling),
        deadline_s=deadline_s,
        cache_salt=cache_salt(message.cache_salt),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        structured_output=_structured_output(message),
        **_input(message),
    )


def tokenize_input(message: model_pb2.TokenizeRequest) -> dict[str, Any]:
    """The arguments of `Runtime.tokenize`."""
    return _input(message)


def adapter_name(field: str, value: str) -> str:
    """A name without version."""
    if not NAME.fullmatch(value):
        raise InvalidRequest(field, f"must match {NAME.pattern}, got {value[:80]!r}")
    return value


def adapter_ref(field: str, value: str) -> str:
    """A name, or name@version."""
    name, at, version = value.partition("@")
    adapter_name(field, name)
    if at and not VERSION.fullmatch(version):
        raise InvalidRequest(
            field, f"must be name or name@version with a version in lower-case hex, got {value!r}"
        )
    return value


def adapter_version(field: str, value: str) -> str:
    """A version, or "" where the request names none."""
    if value and not VERSION.fullmatch(value):
        raise InvalidRequest(field, f"must be a version in lower-case hex, got {value[:80]!r}")
    return value


def upload_manifest(message: adapters_pb2.UploadAdapterRequest) -> UploadManifest:
    """The manifest that the first message of an upload must be."""
    if message.WhichOneof("payload") != "manifest":
        raise InvalidRequest("manifest", "must be the first message of an upload")
    manifest = message.manifest
    expected = manifest.expected_version if manifest.HasField("expected_version") else None
    if not 0 < len(manifest.files) <= MAX_FILES:
        found = len(manifest.files)
        raise InvalidRequest("manifest.files", f"must be 1 to {MAX_FILES} files, got {found}")
    files = tuple(_manifest_file(index, file) for index, file in enumerate(manifest.files))
    if len({file.path for file in files}) < len(files):
        raise InvalidRequest("manifest.files", "must name each file once")
    return UploadManifest(
        name=adapter_name("manifest.name", manifest.name),
        files=files,
        expected_version=expected and adapter_version("manifest.expected_version", expected),
    )


def upload_chunk(message: adapters_pb2.UploadAdapterRequest) -> tuple[str, int, bytes]:
    """Path, offset and data of any later message of an upload."""
    if message.WhichOneof("payload") != "chunk":
        raise InvalidRequest("chunk", "must be every message after the first")
    chunk = message.chunk
    if len(chunk.data) > MAX_CHUNK_BYTES:
        raise InvalidRequest("chunk.data", f"must be at most {MAX_CHUNK_BYTES} bytes")
    return chunk.path, chunk.offset, chunk.data


def page(message: adapters_pb2.ListAdaptersRequest) -> tuple[int, str]:
    """How many adapters to list, and the name after which to begin ("": at the first)."""
    size = min(message.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    try:
        after = base64.b64decode(message.page_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        raise InvalidRequest("page_token", "must be the next_page_token of a page") from None
    return size, after and adapter_name("page_token", after)


def _input(message: Any) -> dict[str, Any]:
    match message.WhichOneof("input"):
        case "prompt":
            return {"prompt": _not_empty("prompt", message.prompt)}
        case "chat":
            return {"messages": _chat(message.chat)}
        case "tokens":
            return {"token_ids": tuple(_not_empty("tokens.ids", message.tokens.ids))}
    choices = [field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields]
    raise InvalidRequest("input", f"must be one of {', '.join(choices)}, got none")


def _structured_output(message: generation_pb2.GenerateRequest) -> StructuredOutput | None:
    if not message.HasField("structured_output"):
        return None
    wire = message.structured_output
    form = wire.WhichOneof("form")
    if form == "choice":
        options = _not_empty("structured_output.choice.options", wire.choice.options)
        return StructuredOutput(choice=tuple(options))
    return StructuredOutput(**{form: getattr(wire, form)} if form else {})


def cache_salt(value: str) -> str:
    if len(value) > MAX_SALT:
        raise InvalidRequest("cache_salt", f"must be at most {MAX_SALT} characters")
    return value


def _not_empty(field: str, value: Any) -> Any:
    if not value:
        raise InvalidRequest(field, "must not be empty")
    return value


def _chat(chat: generation_pb2.Chat) -> tuple[ChatMessage, ...]:
    _not_empty("chat.messages", chat.messages)
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"chat.messages[{index}].role",
                f"must be one of {', '.join(ROLES)}, got {message.role[:80]!r}",
            )
    return tuple(ChatMessage(message.role, message.content) for message in chat.messages)


def _sampling(message: generation_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens or None,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def _manifest_file(index: int, file: adapters_pb2.UploadFile) -> ManifestFile:
    field = f"manifest.files[{index}]"
    if not FILE_NAME.fullmatch(file.path):
        raise InvalidRequest(
            f"{field}.path",
            f"must be a file name that matches {FILE_NAME.pattern}, got {file.path[:80]!r}",
        )
    if not SHA256.fullmatch(file.sha256):
        raise InvalidRequest(
            f"{field}.sha256", f"must be 64 lower-case hex digits, got {file.sha256[:80]!r}"
        )
    return ManifestFile(path=file.path, size_bytes=file.size, sha256=file.sha256)


# To the wire.


def generate_response(chunk: TokenChunk) -> generation_pb2.GenerateResponse:
    """A whole generation, as one chunk."""
    return generation_pb2.GenerateResponse(**_chunk_fields(chunk))


def stream_response(chunk: TokenChunk) -> generation_pb2.GenerateStreamResponse:
    return generation_pb2.GenerateStreamResponse(**_chunk_fields(chunk))


def _chunk_fields(chunk: TokenChunk) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": chunk.text,
        "token_ids": chunk.token_ids,
        "logprobs": [_logprobs(entry) for entry in chunk.logprobs],
        "prompt_logprobs": [_logprobs(entry) for entry in chunk.prompt_logprobs],
    }
    if chunk.finish_reason is None:
        return fields
    fields["finish_reason"] = _enum(generation_pb2.FinishReason, chunk.finish_reason)
    fields["adapter"] = chunk.adapter
    fields["mode"] = _enum(generation_pb2.Mode, chunk.mode)
    if (usage := chunk.usage) is not None:
        fields["usage"] = generation_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
    if (timing := chunk.timing) is not None:
        fields["timing"] = generation_pb2.Timing(
            queue_s=timing.queue_s, ttft_s=timing.ttft_s, total_s=timing.total_s
        )
    return fields


def _logprobs(entry: TokenLogprobs | None) -> generation_pb2.TokenLogprobs:
    """Empty for None, as a prompt's first token has it."""
    if entry is None:
        return generation_pb2.TokenLogprobs()
    return generation_pb2.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=[
            generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in entry.top
        ],
    )


def adapter(info: AdapterInfo) -> adapters_pb2.Adapter:
    readable = bool(info.rank)
    return adapters_pb2.Adapter(
        name=info.name,
        version=info.version,
        rank=info.rank,
        alpha=info.alpha,
        method=_enum(adapters_pb2.AdapterMethod, info.method) if readable else None,
        truncation=_truncation(info) if readable else None,
        target_modules=info.target_modules,
        base_fingerprint=info.base_fingerprint,
        state=_enum(adapters_pb2.AdapterState, info.state),
        size_bytes=info.size_bytes,
        create_time=_timestamp(info.create_time),
        in_flight=info.in_flight,
        reason=info.reason,
        tier=_enum(adapters_pb2.AdapterTier, info.tier),
        pinned=info.pinned,
    )


def adapter_version_of(version: AdapterVersion) -> adapters_pb2.AdapterVersion:
    return adapters_pb2.AdapterVersion(
        version=version.version,
        current=version.current,
        size_bytes=version.size_bytes,
        create_time=_timestamp(version.create_time),
        state=_enum(adapters_pb2.AdapterState, version.state),
        tier=_enum(adapters_pb2.AdapterTier, version.tier),
        in_flight=version.in_flight,
    )


def _timestamp(seconds: float) -> Timestamp | None:
    """Seconds since the epoch; 0 is not known."""
    if not seconds:
        return None
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp


def _truncation(info: AdapterInfo) -> adapters_pb2.Truncation:
    rules = adapters_pb2.TruncationRule
    name = f"TRUNCATION_RULE_{info.truncation_rule.upper()}"
    rule = rules.Value(name) if name in rules.keys() else rules.TRUNCATION_RULE_UNSPECIFIED  # noqa: SIM118
    return adapters_pb2.Truncation(rank=info.truncation_rank, rule=rule)


def adapter_page(
    infos: list[AdapterInfo], size: int, after: str
) -> adapters_pb2.ListAdaptersResponse:
    """The page of `infos` that `page` asked for."""
    rest = sorted((info for info in infos if info.name > after), key=lambda info: info.name)
    token = ""
    if len(rest) > size:
        token = base64.urlsafe_b64encode(rest[size - 1].name.encode()).decode()
    return adapters_pb2.ListAdaptersResponse(
        adapters=[adapter(info) for info in rest[:size]], next_page_token=token
    )


def model(info: ModelInfo) -> model_pb2.Model:
    names = (field.name for field in model_pb2.Model.DESCRIPTOR.fields)
    return model_pb2.Model(**{name: getattr(info, name) for name in names})


def _enum(wire: Any, value: StrEnum) -> Any:
    """The wire's number for `value`; its prefix is the wire enum's name in snake case."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", wire.DESCRIPTOR.name).upper()
    return wire.Value(f"{prefix}_{value.name}")
