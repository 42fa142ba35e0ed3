"""What a client may ask for: every parameter, its type, and those that are accepted only with the
value that changes nothing. Whatever else a request has is an error that names it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
)

MAX_CHOICES = 128
"""Generations of one request, all prompts together."""
MAX_MESSAGES = 4096


class Parameters(BaseModel):
    """An object of a request."""

    # Built when the first request comes: a start need not wait for it.
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


def _only(*allowed: Any) -> PlainValidator:
    """Of a parameter that may only have a value that changes nothing here."""

    def check(value: Any) -> None:
        if not any(type(value) is type(item) and value == item for item in allowed):
            shown = " or ".join(map(json.dumps, allowed))
            raise ValueError(f"is not supported here but as {shown}")

    return PlainValidator(check)


Strings = Annotated[list[str], Field(fail_fast=True)]
Nothing = Annotated[Any, _only(None)]
Off = Annotated[Any, _only(None, False)]
On = Annotated[Any, _only(None, True)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four kinds of prompts, as a list of them."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    several = isinstance(value, list) and 0 < len(value) <= MAX_CHOICES
    if several and (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        return list(value)
    raise ValueError(
        "must be a string, an array of token ids, or an array of either, with 1 to "
        f"{MAX_CHOICES} of them"
    )


def _text(value: Any) -> Any:
    """A message's content: a string, or parts that are all text."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(f"must be a string, or parts of the type text, got {part!r:.80}")
    return "\n".join(part["text"] for part in value)


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _tool_choice(value: Any) -> str | dict[str, Any]:
    """none, auto, required, or the object that names a function."""
    match value:
        case "none" | "auto" | "required":
            return str(value)
        case {"type": "function", "function": {"name": str()}, **rest} if not rest:
            return dict(value)
    raise ValueError(
        "must be none, auto, required, or an object of the type function with its name"
    )


class StreamOptions(Parameters):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off = None


class JsonSchema(Parameters):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(Parameters):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Parameters):
    """vLLM's."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: Any = None  # there is none
    disable_any_whitespace: Off = None
    disable_additional_properties: Off = None
    whitespace_pattern: Nothing = None
    structural_tag: Nothing = None


class GenerationParameters(Parameters):
    """What completions and chat completions have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[Strings | None, BeforeValidator(_strings)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    cache_salt: str | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    # With values that change nothing.
    logit_bias: Annotated[Any, _only(None, {})] = None
    stop_token_ids: Annotated[Any, _only(None, [])] = None
    bad_words: Annotated[Any, _only(None, [])] = None
    length_penalty: Annotated[Any, _only(None, 1, 1.0)] = None
    priority: Annotated[Any, _only(None, 0)] = None
    use_beam_search: Off = None
    include_stop_str_in_output: Off = None
    return_tokens_as_token_ids: Off = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None
    detokenize: On = None
    truncate_prompt_tokens: Nothing = None
    allowed_token_ids: Nothing = None
    logits_processors: Nothing = None
    guided_decoding_backend: Nothing = None


class CompletionParameters(GenerationParameters):
    """Of `POST /v1/completions`."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    add_special_tokens: On = None
    suffix: Annotated[Any, _only(None, "")] = None


class Function(Parameters):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Parameters):
    type: Literal["function"]
    function: Function


class CalledFunction(Parameters):
    name: str
    arguments: str


class CalledTool(Parameters):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class Message(Parameters):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    annotations: Annotated[Any, _only(None, [])] = None
    function_call: Nothing = None


class ChatParameters(GenerationParameters):
    """Of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[Any, PlainValidator(_tool_choice)] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off = None
    add_generation_prompt: On = None
    add_special_tokens: Off = None
    continue_final_message: Off = None
    echo: Off = None
    modalities: Annotated[Any, _only(None, ["text"])] = None
    chat_template: Nothing = None
    chat_template_kwargs: Annotated[Any, _only(None, {})] = None
    audio: Nothing = None
    documents: Nothing = None
    function_call: Nothing = None
    functions: Nothing = None
    prediction: Nothing = None
    prompt_cache_retention: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None


class LoadAdapter(Parameters):
    """Of `POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None  # new files in the directory are a new version anyway


class UnloadAdapter(Parameters):
    """Of `POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None  # vLLM's own number, which means nothing here
