"""What a client asked for, as a generation of the runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kasa_runtime.errors import AdapterNotFound, InvalidRequest
from kasa_runtime.types import (
    BASE,
    ChatMessage,
    GenerationRequest,
    SamplingParams,
    StructuredOutput,
    ToolCall,
)
from server import convert
from server.http.openai.requests import (
    GenerationParameters,
    Message,
    ResponseFormat,
    StructuredOutputs,
)

# OpenAI's defaults, where they are not the library's.
TEMPERATURE = 1.0
MAX_TOKENS = 16  # of completions

# Parameters by the library's names of them; `sampling.top_p` is just top_p.
NAMES = {"chat": "messages", "tokens.ids": "prompt"}
FORM = "structured_output"
# Those that say the form of an answer.
FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
SEEDS = 2**63
ANY_OBJECT = '{"type": "object"}'


@contextmanager
def named_as_asked(form: str = FORMS[0]) -> Iterator[None]:
    """Errors of the library within name the parameters as clients know them. `form`: the parameter
    that says the form of the answer."""
    try:
        yield
    except InvalidRequest as error:
        name = NAMES.get(error.field, error.field.removeprefix("sampling."))
        if name.partition(".")[0] == FORM:
            name = form
        raise InvalidRequest(name, error.description) from None


def adapter_of(model: str, base: str) -> str:
    """The adapter that a model's name stands for. Raises AdapterNotFound."""
    if model == base:
        return BASE
    try:
        return convert.adapter_ref("model", model)
    except InvalidRequest:
        raise AdapterNotFound(
            f"the model {model[:80]!r} does not exist: want {base!r}, the name of an adapter, or "
            "name@version",
            name=model.partition("@")[0][:80],
        ) from None


@dataclass(frozen=True)
class Asked:
    """What all generations of a request have in common. `max_tokens` None: until the context is
    full. `logprobs`: as of SamplingParams."""

    parameters: GenerationParameters
    adapter: str
    max_tokens: int | None
    logprobs: int | None
    structured_output: StructuredOutput | None
    prompt_logprobs: int | None

    def request(self, request_id: str, index: int, **fields: Any) -> GenerationRequest:
        """The generation for choice `index` of a prompt, which is in `fields`."""
        return GenerationRequest(
            request_id,
            self.adapter,
            sampling=self._sampling(index),
            cache_salt=convert.cache_salt(self.parameters.cache_salt or ""),
            structured_output=self.structured_output,
            prompt_logprobs=self.prompt_logprobs,
            **fields,
        )

    def _sampling(self, index: int) -> SamplingParams:
        asked = self.parameters
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=asked.min_tokens or 0,
            temperature=TEMPERATURE if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=0 if asked.top_k in (None, -1) else asked.top_k,
            min_p=asked.min_p or 0.0,
            repetition_penalty=_or(asked.repetition_penalty, 1.0),
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            seed=None if asked.seed is None else (asked.seed + index) % SEEDS,
            stop=tuple(asked.stop or ()),
            ignore_eos=bool(asked.ignore_eos),
            logprobs=self.logprobs,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check_stream_options(asked: GenerationParameters) -> None:
    """Raises InvalidRequest."""
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("stream_options", "belongs to stream: true")


def form_parameter(asked: GenerationParameters) -> str:
    """The parameter that says the form of the answer, if one does."""
    return next((name for name in FORMS if getattr(asked, name) is not None), FORMS[0])


def structured_output(asked: GenerationParameters) -> StructuredOutput | None:
    """OpenAI's `response_format`, vLLM's `structured_outputs`, or its older `guided_*`; one of
    them. Raises InvalidRequest."""
    forms = {
        "response_format": _of_format(asked.response_format),
        "structured_outputs": _of_extension(asked.structured_outputs),
        "guided_json": _form("guided_json", json_schema=asked.guided_json),
        "guided_regex": _form("guided_regex", regex=asked.guided_regex),
        "guided_choice": _form("guided_choice", choice=asked.guided_choice),
        "guided_grammar": _form("guided_grammar", grammar=asked.guided_grammar),
    }
    given = [(name, form) for name, form in forms.items() if form is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1][0], f"must not be given beside {given[0][0]}")
    return given[0][1] if given else None


def _of_format(form: ResponseFormat | None) -> StructuredOutput | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutput(json_schema=ANY_OBJECT)
    if form.json_schema is None:
        raise InvalidRequest("response_format.json_schema", "is required")
    return _form("response_format", json_schema=form.json_schema.schema_ or {})


def _of_extension(asked: StructuredOutputs | None) -> StructuredOutput | None:
    if asked is None:
        return None
    schema = ANY_OBJECT if asked.json_object and asked.json_ is None else asked.json_
    form = _form(
        "structured_outputs",
        json_schema=schema,
        regex=asked.regex,
        choice=asked.choice,
        grammar=asked.grammar,
    )
    if form is None:
        wanted = "json, regex, choice, grammar, json_object"
        raise InvalidRequest("structured_outputs", f"must be one of {wanted}, got none")
    return form


def _form(name: str, **forms: Any) -> StructuredOutput | None:
    """The one of these that is given; None if none is. Raises InvalidRequest naming `name`."""
    given = {key: value for key, value in forms.items() if value is not None}
    if not given:
        return None
    if isinstance(given.get("json_schema"), dict):
        given["json_schema"] = json.dumps(given["json_schema"], ensure_ascii=False)
    if "choice" in given:
        given["choice"] = tuple(given["choice"])
    try:
        return StructuredOutput(**given)
    except InvalidRequest as error:
        raise InvalidRequest(name, error.description) from None


def chat_messages(given: list[Message]) -> tuple[ChatMessage, ...]:
    """Raises InvalidRequest naming the message."""
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(given))


def _message(where: str, message: Message) -> ChatMessage:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{where}.content", "is required")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{where}.tool_calls", "are the assistant's")
    if message.tool_call_id and message.role != "tool":
        raise InvalidRequest(f"{where}.tool_call_id", "belongs to messages of the role tool")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=message.content or "",
        tool_calls=tuple(
            ToolCall(call.id, call.function.name, _arguments(f"{where}.tool_calls[{index}]", call))
            for index, call in enumerate(message.tool_calls or ())
        ),
        tool_call_id=message.tool_call_id or "",
    )


def _arguments(where: str, call: Any) -> str:
    arguments = str(call.function.arguments)
    try:
        good = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise InvalidRequest(
            f"{where}.function.arguments", f"must be a JSON object, got {arguments[:80]!r}"
        )
    return arguments
