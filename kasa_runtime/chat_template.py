"""Chat templates: what transformers adds to Jinja, without the seconds that its import takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kasa_runtime.types import ChatMessage


class ChatTemplate:
    """A model's template, as `apply_chat_template` of transformers renders it. `variables` are what
    the template may name beside the messages. Raises jinja2.TemplateError."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = _environment()
        self._variables = dict(variables)
        self._template = environment.from_string(source)
        self._names = meta.find_undeclared_variables(environment.parse(source))

    @property
    def tells_tools(self) -> bool:
        """Whether it writes tools into the conversation."""
        return "tools" in self._names

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The conversation, ready for the assistant's answer. Raises what the template raises."""
        return self._template.render(
            messages=[_turn(message) for message in messages],
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=True,
            **self._variables,
        )


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it. Arguments are objects there, and text in OpenAI's API."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training, changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would misread."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
